"""f on (B, N) matrices: evaluated, checked and counted, with Jacobian-vector products."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit.pytree import Flat, Layout, Map, State, leaves, map_tensors
from implicit.solvers.base import Point


@dataclass
class FlatMap:
    """f on (B, N) matrices: checked, and every call counted."""

    f: Map
    args: tuple[Any, ...]
    layout: Layout
    budget: int = 0
    calls: int = 0
    aimed: Flat | None = None
    pushed: Flat | None = None
    forward: bool = True  # whether f has a forward mode, as far as is known
    last: tuple[State, Any] = (None, None)  # what f returned last, outside the graph, and its stamp

    @property
    def left(self) -> int:
        return self.budget - self.calls

    def __call__(self, z: Flat) -> Flat:
        self.calls += 1
        state = self.layout.unpack(z)
        if torch.compiler.is_compiling():
            return self.layout.pack(self.layout.check(self.f(state, *self.args), state))
        before = _stamp(state, self.calls == 1)
        out = self.f(state, *self.args)
        if _written(before, state) or _written(self.last[1], self.last[0]):
            raise ValueError(
                "f modifies its input in place, or writes its result into a tensor that it returned before; z and "
                "f(z) would be one tensor and every residual 0: use out-of-place operations in f, or clone."
            )
        out = self.layout.check(out, state)
        last = map_tensors(_detached, out)
        self.last = last, _stamp(last, False)
        return self.layout.pack(out)

    def forget(self) -> None:
        """Let go of what f returned last."""
        self.last = None, None

    def aim(self, v: Flat) -> None:
        """Take J v along with the next evaluation."""
        self.aimed = v

    def at(self, z: Flat) -> Point:
        """Evaluate f at z, rounded to what the state's dtype can hold, and J v there if a solver aimed at it."""
        z = self.layout.round(z) if self.layout.lossy else z
        v, self.aimed, self.pushed = self.aimed, None, None
        if v is None:
            return Point(z, self(z))
        fz, self.pushed = self._push(z, v)
        return Point(z, fz)

    def _push(self, z: Flat, v: Flat) -> tuple[Flat, Flat]:
        """f(z) and J v, by forward mode or, where an operator of f has none, by two vector-Jacobian products."""
        if self.forward:
            try:
                out, pushed = torch.func.jvp(self, (z,), (v,))[:2]
                self.forget()  # it belongs to the transform
                return out, pushed
            except (NotImplementedError, RuntimeError) as error:
                if not any(word in str(error) for word in ("orward", "setup_context")):
                    raise
            self.calls -= 1  # the attempt above is not charged for
            self.forward = False
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            x, w = z.detach().requires_grad_(), torch.zeros_like(v, requires_grad=True)
            out = self(x)
            pulled = (
                torch.autograd.grad(out, x, w, create_graph=True, allow_unused=True)[0] if out.requires_grad else None
            )
            pushed = torch.zeros_like(v) if pulled is None else torch.autograd.grad(pulled, w, v)[0]
        return out if recorded else out.detach(), pushed


def _detached(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


def _stamp(state: State, first: bool) -> Any:
    """What tells later whether tensors were written to; inference tensors have no version and are copied once."""
    if isinstance(state, Tensor):
        return state._version if not state.is_inference() else state.clone() if first else None
    return [_stamp(t, first) for t in leaves(state)]


def _written(before: Any, state: State) -> bool:
    if isinstance(before, int):
        return before != state._version
    if isinstance(before, Tensor):
        return not torch.allclose(before, state, rtol=0, atol=0, equal_nan=True)
    return isinstance(before, list) and any(map(_written, before, leaves(state)))
