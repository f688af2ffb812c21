"""A classifier of real images is a function of its images, seed and epochs: each is trained once in a process."""

import functools
from contextlib import contextmanager

import pytest

from apps.diffusion.evaluation import feature_extractors
from apps.diffusion.files.hashing import of_tensors


def _memoized(train):
    known = {}

    @functools.wraps(train)
    def memoized(images, *options, **named):
        key = of_tensors({"x": images.x, "y": images.y}), images.num_classes, options, tuple(named.items())
        if key not in known:
            known[key] = train(images, *options, **named)
        return known[key]

    return memoized


TRAINING = {name: _memoized(getattr(feature_extractors, name)) for name in ("train_classifier", "train_lenet")}


@contextmanager
def trained_once():
    """Every classifier comes from `TRAINING`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, train in TRAINING.items():
            patch.setattr(feature_extractors, name, train)
        yield
