"""Fixtures of the application's tests."""

import pytest

from tests.apps.diffusion.helpers.forks import Forks
from tests.apps.diffusion.helpers.trained_once import trained_once


@pytest.fixture(scope="session")
def forks():
    """One process for all tests that need several, see helpers/forks.py."""
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session", autouse=True)
def classifiers():
    with trained_once():
        yield
