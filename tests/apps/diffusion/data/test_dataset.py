"""`TensorDataset`, and the dataset of digits."""

import pytest
import torch
from torch.utils.data import DataLoader

from apps.diffusion.data import TensorDataset, digits


def test_digits_are_split_once_and_cover_everything():
    from sklearn.datasets import load_digits

    train, held_out = digits("train"), digits("held-out")
    assert (len(train), len(held_out), train.num_classes, train.shape) == (1497, 300, 10, (1, 8, 8))
    assert train.x.min() == -1 and train.x.max() == 1 and train.x.dtype == torch.float32
    pixels, labels = load_digits(return_X_y=True)

    def rows(x, y):
        return sorted((*image, int(label)) for image, label in zip(x, y, strict=True))

    both = rows(((torch.cat([train.x, held_out.x]).flatten(1) + 1) * 8).tolist(), torch.cat([train.y, held_out.y]))
    assert both == rows(pixels.tolist(), labels)
    assert torch.equal(digits("train").x, train.x)
    assert all(28 <= int(count) <= 32 for count in held_out.y.bincount())


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held-out"):
        digits("test")


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), 2, r"\(0, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.long), 2, r"\(3, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long), 2, r"^y\b"),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]), 2, "num_classes"),
    ],
)
def test_images_that_do_not_fit_their_labels_are_refused(x, y, classes, message):
    with pytest.raises(ValueError, match=message):
        TensorDataset(x, y, classes)


def test_a_plain_loader_takes_a_dataset():
    x, y = torch.linspace(-1, 1, 24).view(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    images = TensorDataset(x, y, classes=("ant", "bee", "cow"))
    assert (len(images), images.num_classes, images.shape) == (6, 3, (1, 2, 2))
    batches = list(DataLoader(images, batch_size=4))
    assert torch.equal(torch.cat([a for a, _ in batches]), x) and torch.equal(torch.cat([b for _, b in batches]), y)
    assert torch.equal(images[3][0], images[3, 7][0])
    flat = images.unconditional()
    assert flat.num_classes == 0 and flat[1][1] == 0 and flat.classes == ()


def test_the_fingerprint_changes_with_every_value():
    x, y = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1])
    other = x.clone()
    other[1, 0, 1, 1] = 1e-7
    prints = {TensorDataset(x, y).fingerprint(), TensorDataset(other, y).fingerprint()}
    prints.add(TensorDataset(x, y.flip(0)).fingerprint())
    assert len(prints) == 3 and TensorDataset(x.clone(), y.clone()).fingerprint() in prints
