"""Nearest images, compared with a loop over all pairs, and their grid."""

import numpy as np
import pytest
import torch

from apps.diffusion.evaluation.nearest import nearest, neighbor_grid


def images(count, seed, shape=(1, 6, 5)):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8))


def test_distances_are_those_of_all_pairs():
    x, real = images(7, 0), images(300, 1)
    index, distance = nearest(x, real)
    for i in range(7):
        every = [float((((x[i].double() - y.double()) / 255) ** 2).mean().sqrt()) for y in real]
        assert index[i] == int(np.argmin(every)) and distance[i] == pytest.approx(min(every), rel=1e-5)


def test_copies_are_found_at_distance_zero():
    real = images(300, 2, (3, 4, 4))
    index, distance = nearest(real[[5, 123]], real)
    assert index.tolist() == [5, 123] and distance.max() < 1e-3


def test_images_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="1 x 6 x 5"):
        nearest(images(2, 0), images(2, 0, (1, 5, 6)))


def test_the_grid_has_each_image_above_its_nearest():
    real = images(30, 3)
    drawn = np.asarray(neighbor_grid(real[[4, 9, 2]], real, columns=2))
    enlarge = round(64 / 5)
    cell = drawn[::enlarge, ::enlarge]
    assert cell.shape == (4 * 7 + 1, 2 * 6 + 1)
    for column in (0, 1):
        top, bottom = (cell[1 + 7 * row : 7 + 7 * row, 1 + 6 * column : 6 + 6 * column] for row in (0, 1))
        assert np.array_equal(top, bottom)
    assert np.array_equal(cell[1:7, 1:6], real[4, 0].numpy())
