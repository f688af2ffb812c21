"""The preset for own images on generated shapes: classifiers that are right, and a run of it, cut short."""

import json

import pytest

from apps.diffusion import train
from apps.diffusion.data import ImageFolderDataset
from apps.diffusion.data.dataset import all_images
from benchmarks.diffusion import own_images
from benchmarks.harness import RESULTS


@pytest.mark.slow
def test_a_short_run_of_the_preset_is_scored(tmp_path):
    images = own_images.save_shapes(tmp_path / "shapes", 40)
    classifiers = own_images.Classifiers(tmp_path / "others", each=200)
    x, y = all_images(ImageFolderDataset(images, own_images.SIZE))
    assert x.shape == (120, 3, 16, 16) and min(classifiers.accuracy(x, y).values()) > 0.9
    assert max(classifiers.accuracy(x, (y + 1) % 3).values()) < 0.1
    flags = "--optimizer.images 96 --num-samples 3 --track none --model.hidden 32 --sampling.steps 2 --out"
    assert train.main(["folder-small", "--data.path", str(images), *flags.split(), str(tmp_path / "run")]) == 0
    found = own_images.scored(tmp_path / "run", images, classifiers, 6)
    assert found["images"] == 128 and found["samples"] == 6
    assert min(found["right class, training images"].values()) > 0.9


def test_the_guide_quotes_the_result():
    found = json.loads((RESULTS / "own_images.json").read_text())
    guide = (RESULTS.parents[1] / "docs" / "diffusion.md").read_text()
    right = {name: f"{100 * share:.0f}" for name, share in found["right class"].items()}
    assert f"a support vector machine gave {right['support vectors']} % their class" in guide
    assert f"convolutional network {right['network']} %" in guide
    assert f"Of {found['samples']} samples" in guide and f"{found['cpu seconds of training']:.0f} s of CPU" in guide
