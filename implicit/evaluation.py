"""f on (B, N) matrices: evaluated, checked and counted, with Jacobian-vector products."""

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.autodiff.jvp import double_backward_jvp, forward_jvp
from implicit.pytree import Flat, Layout, Map, State, leaves
from implicit.solvers.base import Point
from implicit.torch_internals import jit_traces, transforms_active, version

_CHECKED = 3  # so many evaluations at the start are checked for writes into f's input and into inference tensors too
_WATCHED = 32  # so many of the latest outputs of f are checked for later writes


@dataclass
class FlatMap:
    """f as a map of (B, N) matrices; every call is counted and checked for in-place writes.

    Solvers and best iterates hold earlier outputs of f. The version counters of the outputs that still exist are
    compared before and after every call, which runs no operator.

    Attributes:
        budget: calls allowed.
        calls: calls made.
        repeats: calls made by `repeat`, outside of the budget.
    """

    f: Map
    args: tuple[Any, ...]
    layout: Layout
    budget: int = 0
    calls: int = 0
    repeats: int = 0
    forward: bool = True  # False once forward mode has failed
    _outputs: deque["weakref.ref[Tensor]"] = field(default_factory=lambda: deque(maxlen=_WATCHED), repr=False)
    _copies: list[tuple[State, Any]] = field(default_factory=list, repr=False)  # of inference tensors: no versions

    @property
    def remaining(self) -> int:
        """Calls left in the budget."""
        return self.budget - self.calls

    def __call__(self, z: Flat) -> Flat:
        """f(z).

        Raises:
            ValueError: f changes structure, shape, dtype or device, or writes in place.
        """
        self.calls += 1
        state = self.layout.unpack(z)
        if torch.compiler.is_compiling():
            return self.layout.pack(self.layout.check(self.f(state, *self.args), state))
        if state is z and z.requires_grad:  # a graph node apart from z, where the gradients of f alone are summed first
            state = z.view_as(z)
        # versions of the input, and of earlier outputs, before and after the call
        first = self.calls <= _CHECKED
        before = _versions(state) if first else None
        held = [(ref, t, version(t)) for ref in self._outputs if (t := ref()) is not None]
        out = self.f(state, *self.args)
        written = any([version(t) != then for _, t, then in held]) or any([_written(x, t) for t, x in self._copies])
        if written or _written(before, state):
            raise ValueError(
                "f modifies its input in place, or writes its result into a tensor that it returned before, so z and "
                "f(z) would be one tensor and every residual 0: use out-of-place operations in f, or clone its result."
            )
        flat = self.layout.pack(self.layout.check(out, state))
        self._outputs = deque([ref for ref, _, _ in held], _WATCHED)
        if not first:
            self._copies = []
        elif flat.is_inference():
            self._copies.append((flat, _versions(flat)))
        # a view shares the version counter of its base, which exists as long as any view
        self._outputs.append(weakref.ref(flat if flat._base is None else flat._base))
        return flat

    def evaluate(self, z: Flat, tangent: Flat | None = None) -> Point:
        """f at z, rounded to what the state's dtype can hold, and J tangent there if a tangent is given."""
        z = self.layout.round(z) if self.layout.lossy else z
        if tangent is None:
            return Point(z, self(z), remaining=self.remaining)
        fz, product = self._jvp(z, tangent)
        return Point(z, fz, product, self.remaining)

    def repeat(self, z: Flat, tangent: Flat | None = None) -> Point:
        """`evaluate` outside of the budget, to replace or to verify an evaluation."""
        point = self.evaluate(z, tangent)
        self.calls, self.repeats = self.calls - 1, self.repeats + 1
        return Point(point.z, point.fz, point.product, self.remaining)

    def _jvp(self, z: Flat, tangent: Flat) -> tuple[Flat, Flat]:
        if jit_traces():
            raise NotImplementedError(
                "torch.jit.trace cannot record Jacobian-vector products (NewtonKrylov): use another solver."
            )
        if torch.compiler.is_exporting() and isinstance(z.shape[0], torch.SymInt):
            raise NotImplementedError(
                "A solver with Jacobian-vector products (NewtonKrylov) cannot be exported with a dynamic batch, since "
                "PyTorch's forward mode fixes its size: export one batch size, or use another solver."
            )
        if self.forward:
            kept = self._outputs
            try:
                return forward_jvp(self, z, tangent)
            except (NotImplementedError, RuntimeError):
                pass  # each operator without a forward mode raises an error of its own
            finally:
                self._outputs = kept  # without f's output in the transform
            self.forward = False
        return double_backward_jvp(self, z, tangent)


@dataclass
class JointMap:
    """A `FlatMap` of B samples as a map of one row of B N numbers: the whole batch is one system."""

    inner: FlatMap
    rows: int

    @property
    def layout(self) -> Layout:
        """The layout of the samples."""
        return self.inner.layout

    @property
    def calls(self) -> int:
        """Calls made."""
        return self.inner.calls

    @property
    def remaining(self) -> int:
        """Calls left in the budget."""
        return self.inner.remaining

    def evaluate(self, z: Flat, tangent: Flat | None = None) -> Point:
        """f at z, and J tangent there."""
        apart = self.inner.evaluate(self._rows(z), None if tangent is None else self._rows(tangent))
        joint = [t if t is None else t.reshape(1, -1) for t in (apart.z, apart.fz, apart.product)]
        assert joint[0] is not None and joint[1] is not None
        return Point(joint[0], joint[1], joint[2], apart.remaining)

    def repeat(self, z: Flat, tangent: Flat | None = None) -> Point:
        """`evaluate` outside of the budget."""
        self.inner.calls, self.inner.repeats = self.inner.calls - 1, self.inner.repeats + 1
        return self.evaluate(z, tangent)

    def _rows(self, flat: Float[Tensor, "1 BN"]) -> Flat:
        return flat.reshape(self.rows, -1)


def _versions(state: State) -> list[int | Tensor | None]:
    """The version counter of every tensor; inference tensors have none and are copied."""
    found: list[int | Tensor | None] = []
    for t in leaves(state):
        if not t.is_inference():
            found.append(version(t))
        else:
            found.append(None if transforms_active() else t.clone())
    return found


def _written(before: list[int | Tensor | None] | None, state: State) -> bool:
    """Whether a tensor of `state` was written to since `_versions`."""
    if before is None:
        return False
    for then, t in zip(before, leaves(state), strict=True):
        if isinstance(then, Tensor) and not torch.allclose(then, t, rtol=0, atol=0, equal_nan=True):
            return True
        if isinstance(then, int) and then != version(t):
            return True
    return False
