"""Solving without a graph, so that those who record one later do not notice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize


@contextmanager
def constant() -> Iterator[None]:
    """`torch.no_grad`, in which `parametrize.cached()` keeps nothing for later.

    A parametrized weight computed here has no graph; kept by that cache, it would be what the tracked evaluation of f
    finds, and its parameters would get no gradient.
    """
    with torch.no_grad():
        if not parametrize._cache_enabled:
            yield
            return
        kept = parametrize._cache
        parametrize._cache = dict(kept)
        try:
            yield
        finally:
            parametrize._cache = kept


@contextmanager
def uncached() -> Iterator[None]:
    """Every parametrized weight is computed anew, from its parameters."""
    kept, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = kept
