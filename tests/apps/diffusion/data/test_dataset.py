"""The digits, and the order in which a run sees its images."""

import pytest
import torch

from apps.diffusion.data import Images, digits, order


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


def test_every_epoch_shows_every_image_once():
    n = 13
    shown = order(n, seed=3, start=0, count=5 * n)
    epochs = [shown[k * n : (k + 1) * n] for k in range(5)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert order(n, seed=4, start=0, count=n) != epochs[0]


@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 20), (12, 1), (13, 40), (27, 0)])
def test_the_order_can_be_entered_anywhere(start, count):
    assert order(13, 3, start, count) == order(13, 3, 0, 100)[start : start + count]


@pytest.mark.parametrize(
    ("x", "y", "classes", "message"),
    [
        (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), 2, "n > 0"),
        (torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.long), 2, r"\(n, C, H, W\)"),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long), 2, "3 images and 2 labels"),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2]), 2, "0..1"),
    ],
)
def test_images_that_do_not_fit_their_labels_are_refused(x, y, classes, message):
    with pytest.raises(ValueError, match=message):
        Images(x, y, classes)
