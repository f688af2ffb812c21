"""Measurements on the networks in the repository: they are of the sampler that the commands use."""

import importlib.util

import pytest
import torch

from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.data.mnist import mnist
from apps.diffusion.pipeline import FixedPointPipeline
from benchmarks.diffusion import shipped
from benchmarks.image_scorer import ImageScorer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.mark.parametrize("name", shipped.NETWORKS)
def test_samples_are_those_of_the_pipeline(name):
    pipe = FixedPointPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(class_labels=[0, 1, 2], generator=0, output_type="latent").images
    torch.testing.assert_close(shipped.sampler(open_network(name))(3).samples, latents, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped.NETWORKS)
def test_the_sampler_adds_a_bounded_number_of_kernels_to_its_block_passes(name):
    found = shipped.beside_the_floor(open_network(name), repeats=2)
    ours, bare = found["kernels of a timestep"]["sampler"], found["kernels of a timestep"]["floor"]
    assert bare < ours < bare + 200


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch.compile looks at .grad of everything
def test_half_precision_and_compiled_samples_are_scored_beside_float32():
    scorer = ImageScorer.of(mnist("held-out"), epochs=1)
    exact, half, compiled = shipped.quality(open_network("mnist-fpdm"), scorer, 4, "aot_eager")
    assert exact["RMS difference"] == 0 < half["RMS difference"] < 0.05
    assert compiled["RMS difference"] < 1e-4 and compiled["largest difference"] < 1e-2
    real, wrong = mnist("train").x[:4], torch.zeros(4, 1, 28, 28)
    labels = mnist("train").y[:4]
    assert scorer.score(real, labels).frechet < scorer.score(wrong, labels).frechet
