"""Restore module state and random state, so that a diagnosis has no lasting effect on f.

The modules and generators are found that f is, is a method of, closes over or reads as global variables, and those in
its arguments. Restored are the buffers (the statistics of BatchNorm, the vectors of spectral_norm), parameters and
training flags of the modules, and the states of the generators. Other attributes that f writes are not restored.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from implicit.autodiff.reachable_modules import reachable


@contextmanager
def restored(*roots: Any) -> Iterator[None]:
    """At the end, restore the state of all modules and generators within `roots`, and all global random state."""
    modules, generators = reachable(roots)
    kept = [(m, m.training, _tensors(m)) for m in modules]
    drawn = [(g, g.get_state()) for g in generators]
    python, array = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, training, tensors in kept:
            module.training = training
            _put_back(tensors)
        for generator, state in drawn:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(array)


def _tensors(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, Tensor]]:
    """(owner, name, tensor, a copy) of the module's own buffers; parameters, which f does not write, uncopied."""
    held = []
    for owner, copied in ((module._buffers, True), (module._parameters, False)):
        held += [(owner, name, t, t.detach().clone() if copied else t) for name, t in owner.items() if t is not None]
    return held


def _put_back(tensors: list[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
    for owner, name, t, copy in tensors:
        owner[name] = t
        # values are compared, since BatchNorm writes its statistics without raising their version counter
        if copy is not t and not torch.equal(t, copy):
            with torch.no_grad():
                t.copy_(copy)
