"""Fixtures of the tests of the benchmarks."""

import pytest

from tests.apps.diffusion.helpers.trained_once import trained_once


@pytest.fixture(scope="session", autouse=True)
def classifiers():
    with trained_once():
        yield
