"""Handwritten digits: 1797 real images of 8 x 8 pixels in ten classes, part of scikit-learn.

Source: E. Alpaydin and C. Kaynak, the test set of "Optical Recognition of Handwritten Digits" (UCI, 1998).
Intensities 0..16 become -1..1. The split is fixed: 300 images, 30 of each class up to rounding, are held out. Neither a
diffusion model nor the classifier that scores it is trained on the held-out images.
"""

import torch

from apps.diffusion.config.checks import check_word
from apps.diffusion.data.dataset import Split, TensorDataset

HELD_OUT = 300


def digits(split: Split = "train") -> TensorDataset:
    """The digits of one split, "train" (1497 images) or "held-out" (300), as float32 images (n, 1, 8, 8) in
    [-1, 1].
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_word("split", split, Split)
    pixels, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT, random_state=0, stratify=labels, shuffle=True
    )
    chosen = torch.tensor(train if split == "train" else held_out)
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    y = torch.from_numpy(labels).long()
    return TensorDataset(x[chosen], y[chosen], num_classes=int(y.max()) + 1)
