"""Fixtures of the application's tests."""

import functools

import pytest

from apps.diffusion.evaluation import feature_extractors
from apps.diffusion.files.hashing import of_tensors
from tests.apps.diffusion.helpers.forks import Forks


@pytest.fixture(scope="session")
def forks():
    """One process for all tests that need several, see helpers/forks.py."""
    forks = Forks()
    yield forks
    forks.close()


def _memoized(train):
    known = {}

    @functools.wraps(train)
    def memoized(images, *options, **named):
        key = of_tensors({"x": images.x, "y": images.y}), images.num_classes, options, tuple(named.items())
        if key not in known:
            known[key] = train(images, *options, **named)
        return known[key]

    return memoized


@pytest.fixture(scope="session", autouse=True)
def classifiers():
    """A classifier of real images is a function of its images, seed and epochs: each is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_classifier", "train_lenet"):
            patch.setattr(feature_extractors, name, _memoized(getattr(feature_extractors, name)))
        yield
