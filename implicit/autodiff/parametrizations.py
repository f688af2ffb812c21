"""Weights under a parametrization: computed once per solve, with their graph.

`torch.nn.utils.parametrize` computes a weight at every access, and some parametrizations change as they are computed:
`spectral_norm` in training mode takes a step of its power iteration each time. A map that changes from evaluation to
evaluation has no fixed point. Within a solve, its backward pass included, each such weight is therefore computed at
its first access and kept, as by `parametrize.cached()`. The weight is computed with a graph even if the solve itself
records none, so that the parameters of the weight get their gradient. It is computed again if f replaces a parameter,
a buffer or an attribute of the parametrization: by `torch.func.functional_call` with several sets of parameters, or by
a scale that depends on the state. A value that f writes into such a tensor in place is not seen.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from implicit.pytree import Map, State
from implicit.torch_internals import (
    Hooks,
    parametrization_of_lookup,
    parametrize_cache,
    put_saved_tensor_hooks,
    set_parametrize_cache,
    take_saved_tensor_hooks,
    traced,
    transforms_active,
)


class _Weight:
    """A weight, and what it was computed from: the module, its parameters and buffers, and all other attributes."""

    def __init__(self, value: Tensor, parametrization: nn.Module) -> None:
        self.value, self.parts = value, _parts(parametrization)
        self.parametrization = weakref.ref(parametrization)

    def is_of(self, parametrization: nn.Module) -> bool:
        """Whether the module is the same, and no parameter, buffer or attribute of it was replaced."""
        if self.parametrization() is not parametrization:
            return False
        parts = _parts(parametrization)
        return len(parts) == len(self.parts) and all(a is b for a, b in zip(parts, self.parts, strict=True))


def _parts(module: nn.Module) -> list[Any]:
    attributes = (part for m in module.modules() for part in vars(m).values())
    return [*module.parameters(), *module.buffers(), *attributes]


@dataclass(frozen=True)
class WeightsOnce:
    """f with every parametrized weight computed at its first access and kept.

    Within a `parametrize.cached()` of the user, its weights are used and new weights are entered there.
    """

    f: Map
    recorded: bool
    kept: dict[Any, _Weight] = field(default_factory=dict)

    def __call__(self, z: State, *args: object) -> State:
        if traced():  # the compiler and torch.jit do not support this cache
            return self.f(z, *args)
        mode = torch.is_grad_enabled()
        unfinished = _Cache.enter(self)
        try:
            return self.f(z, *args)
        finally:
            _Cache.leave(unfinished)
            torch.set_grad_enabled(mode)


def weights_once(f: Map) -> Map:
    """f, to be evaluated many times with the same parametrized weights.

    Inside a torch.func transform f itself is returned: a weight kept at one level of a transform is invalid at another.
    """
    if transforms_active() or traced():
        return f
    return WeightsOnce(f, torch.is_grad_enabled())


class _Solves(threading.local):
    """For each thread: its solves, innermost last, and the (grad mode, hooks) to restore after computing a weight."""

    def __init__(self) -> None:
        self.solves: list[WeightsOnce] = []
        self.modes: list[tuple[bool, Hooks]] = []


class _Cache(dict[Any, Tensor]):
    """Takes the place of the dictionary of `parametrize.cached()` while any thread evaluates a `WeightsOnce`.

    A look-up finds the weights of the thread's own innermost solve first, then those of the user's `cached()`.
    """

    lock = threading.Lock()
    local = _Solves()
    active = 0
    users: ClassVar[dict[Any, Any]] = {}
    enabled = 0  # how many `cached()` of the user were active

    @classmethod
    def enter(cls, solve: WeightsOnce) -> int:
        """Begin an evaluation; returns the number of weights that are being computed."""
        cls.local.solves.append(solve)
        with cls.lock:
            if not cls.active:
                cls.users, cls.enabled = parametrize_cache()
            cls.active += 1
            cache, enabled = parametrize_cache()
            set_parametrize_cache(cls() if cls.active == 1 else cache, enabled + 1)
        return len(cls.local.modes)

    @classmethod
    def leave(cls, unfinished: int) -> None:
        """End an evaluation, and the computation of weights that an error has ended."""
        cls.local.solves.pop()
        while len(cls.local.modes) > unfinished:
            put_saved_tensor_hooks(cls.local.modes.pop()[1])
        with cls.lock:
            cls.active -= 1
            cache, enabled = parametrize_cache()
            set_parametrize_cache(cache if cls.active else cls.users, enabled - 1)

    def get(self, key: Any, default: Any = None) -> Any:
        solves = self.local.solves
        if not solves:
            return self.users.get(key) if self.enabled else None
        solve, parametrization = solves[-1], parametrization_of_lookup()
        kept = solve.kept.get(key)
        found = kept.value if kept is not None and kept.is_of(parametrization) else None
        if found is None and self.enabled:
            found = self.users.get(key)
        if found is None:
            # torch computes the weight next and enters it by __setitem__: with a graph, if the solve is differentiated,
            # and without a checkpoint's hooks, since the second run of a checkpoint finds the weight here
            self.local.modes.append((torch.is_grad_enabled(), take_saved_tensor_hooks()))
            torch.set_grad_enabled(solve.recorded or torch.is_grad_enabled())
        else:
            solve.kept[key] = _Weight(found, parametrization)
        return found

    def __setitem__(self, key: Any, weight: Tensor) -> None:
        solves = self.local.solves
        if solves:
            mode, hooks = self.local.modes.pop()
            torch.set_grad_enabled(mode)
            put_saved_tensor_hooks(hooks)
            if not transforms_active():
                solves[-1].kept[key] = _Weight(weight, parametrization_of_lookup())
        if self.enabled and not transforms_active():
            self.users[key] = weight
