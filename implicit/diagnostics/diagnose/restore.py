"""Restore module state and random state, so that a diagnosis has no lasting effect on f.

The modules and generators are found that f is, is a method of, closes over or reads as global variables, and those in
its arguments. Restored are the buffers (the statistics of BatchNorm, the vectors of spectral_norm), parameters and
training flags of the modules, and the states of the generators. Other attributes that f writes are not restored.
"""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 6  # levels of nested containers and closures that are searched


@contextmanager
def restored(*roots: Any) -> Iterator[None]:
    """At the end, restore the state of all modules and generators within `roots`, and all global random state."""
    modules, generators = _found(roots)
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


def _found(roots: Any) -> tuple[list[nn.Module], list[torch.Generator]]:
    """Modules, children included, and generators within `roots`."""
    modules: dict[int, nn.Module] = {}
    generators: dict[int, torch.Generator] = {}
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice

    def visit(thing: Any, depth: int) -> None:
        if depth > _DEPTH or id(thing) in seen or isinstance(thing, Tensor | str | int | float | None):
            return
        seen[id(thing)] = thing
        if isinstance(thing, torch.Generator):
            generators[id(thing)] = thing
        elif isinstance(thing, nn.Module):
            for child in thing.modules():
                modules[id(child)] = child
                for value in vars(child).values():
                    visit(value, depth + 1)
        else:
            for part in _parts(thing):
                visit(part, depth + 1)

    visit(list(roots), 0)
    return list(modules.values()), list(generators.values())


def _parts(thing: Any) -> list[Any]:
    """The objects that a container, a function, a method, a partial or a callable object holds."""
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, tuple | list | set | frozenset):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    parts = [getattr(thing, "__self__", None), getattr(thing, "__wrapped__", None), getattr(thing, "__func__", None)]
    code = getattr(thing, "__code__", None)
    if code is not None:
        for cell in getattr(thing, "__closure__", None) or ():
            try:
                parts.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
        names = getattr(thing, "__globals__", {})
        parts += [names[name] for name in code.co_names if name in names]
        parts += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
        parts += list(vars(thing).values())
    return parts
