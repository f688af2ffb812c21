"""Weights under a parametrization: computed once a solve, with their graph.

`torch.nn.utils.parametrize` computes a weight at every access, and some parametrizations change as they are computed:
`spectral_norm` in training mode takes a step of its power iteration each time. A map that changes from evaluation to
evaluation has no fixed point. Within a solve, its backward pass included, each such weight is therefore computed at
its first access and kept, as `parametrize.cached()` would. It is computed with a graph even where the solve itself
records none, so that its parameters get their gradient.
"""

import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from implicit.pytree import Map, State


@dataclass(frozen=True)
class WeightsOnce:
    """f with every parametrized weight computed at its first access and kept.

    Weights that `parametrize.cached()` holds are used, and new ones are entered there, while it is active.
    """

    f: Map
    recorded: bool
    kept: dict[Any, Tensor] = field(default_factory=dict)

    def __call__(self, z: State, *args: object) -> State:
        if _traced():
            return self.f(z, *args)
        mode = torch.is_grad_enabled()
        _Cache.enter(self)
        try:
            return self.f(z, *args)
        finally:
            _Cache.leave()
            torch.set_grad_enabled(mode)


def weights_once(f: Map) -> Map:
    """f, to be evaluated many times with the same parametrized weights.

    Inside a torch.func transform it is f itself: a weight kept at one level of a transform has no meaning at another.
    """
    if torch._C._are_functorch_transforms_active() or _traced():
        return f
    return WeightsOnce(f, torch.is_grad_enabled())


def _traced() -> bool:
    """Whether torch.compile or torch.jit records, which see no such cache."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class _Cache(dict[Any, Tensor]):
    """Stands in for the dictionary of `parametrize.cached()` while some thread evaluates a `WeightsOnce`.

    Each thread sees the weights of its own innermost solve, then those of the user's `cached()`.
    """

    lock = threading.Lock()
    local = threading.local()
    active = 0
    users: ClassVar[dict[Any, Any]] = {}
    enabled = 0  # how many `cached()` of the user were active

    @classmethod
    def solves(cls) -> list[WeightsOnce]:
        if not hasattr(cls.local, "solves"):
            cls.local.solves, cls.local.modes = [], []
        return cls.local.solves

    @classmethod
    def enter(cls, solve: WeightsOnce) -> None:
        cls.solves().append(solve)
        with cls.lock:
            if not cls.active:
                cls.users, cls.enabled = parametrize._cache, parametrize._cache_enabled
                parametrize._cache = cls()
            cls.active += 1
            parametrize._cache_enabled += 1

    @classmethod
    def leave(cls) -> None:
        cls.solves().pop()
        with cls.lock:
            cls.active -= 1
            parametrize._cache_enabled -= 1
            if not cls.active:
                parametrize._cache = cls.users

    def get(self, key: Any, default: Any = None) -> Any:
        solves = self.solves()
        if not solves:
            return self.users.get(key) if self.enabled else None
        solve = solves[-1]
        found = solve.kept.get(key)
        if found is None and self.enabled:
            found = self.users.get(key)
        if found is None:
            # torch computes the weight next and enters it below: with a graph, if the solve is to be differentiated,
            # and outside of every checkpoint, whose second run will find the weight here
            self.local.modes.append((torch.is_grad_enabled(), _take_hooks()))
            torch.set_grad_enabled(solve.recorded or torch.is_grad_enabled())
        else:
            solve.kept[key] = found
        return found

    def __setitem__(self, key: Any, weight: Tensor) -> None:
        solves = self.solves()
        if solves:
            mode, hooks = self.local.modes.pop()
            torch.set_grad_enabled(mode)
            _put_hooks(hooks)
            if not torch._C._are_functorch_transforms_active():
                solves[-1].kept[key] = weight
        if self.enabled and not torch._C._are_functorch_transforms_active():
            self.users[key] = weight


def _take_hooks() -> list[tuple[Any, Any]]:
    """Switch the hooks on saved tensors off; returns them, innermost first."""
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]: no stub in PyTorch
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    return hooks


def _put_hooks(hooks: list[tuple[Any, Any]]) -> None:
    for pack, unpack in reversed(hooks):
        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)  # pyright: ignore[reportAttributeAccessIssue]
