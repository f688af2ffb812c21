"""Solver protocol: a rule that proposes the next iterate from the points evaluated so far.

The loop (`implicit.iterate`), which is one for all solvers, evaluates f and the stopping criterion, counts evaluations
and freezes finished samples; a solver does none of this. All vectors are (B, N): row b belongs to sample b, and no
operation of a solver may mix rows.
"""

import abc
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from implicit.pytree import Flat, PerSample, norm, to_device, to_host
from implicit.torch_internals import host_readable

S = TypeVar("S")


class Point:
    """An evaluated iterate: z, f(z), the residual r = f(z) - z (computed on first access), and J v if requested.

    Attributes:
        z: (B, N) the iterate.
        fz: (B, N) f(z).
        product: (B, N) J v at z, J = df/dz, for the tangent v of the last step; None if that step had no tangent.
        remaining: evaluations left in the budget after this one.
    """

    __slots__ = ("_fz_size", "_r", "_r_size", "fz", "product", "remaining", "z")

    def __init__(self, z: Flat, fz: Flat, product: Flat | None = None, remaining: int = 2**31) -> None:
        self.z, self.fz, self.product, self.remaining = z, fz, product, remaining
        self._r: Flat | None = None
        self._r_size: PerSample | None = None
        self._fz_size: PerSample | None = None

    @property
    def r(self) -> Flat:
        """f(z) - z, (B, N)."""
        if self._r is None:
            self._r = self.fz - self.z
        return self._r

    @property
    def r_size(self) -> PerSample:
        """Euclidean norms of r, (B,), without a derivative."""
        if self._r_size is None:
            self._r_size = norm(self.r.detach() if self.r.requires_grad else self.r)
        return self._r_size

    @property
    def fz_size(self) -> PerSample:
        """Euclidean norms of f(z), (B,), without a derivative."""
        if self._fz_size is None:
            self._fz_size = norm(self.fz.detach() if self.fz.requires_grad else self.fz)
        return self._fz_size


class AbstractSolver(abc.ABC, Generic[S]):
    """Subclasses are frozen dataclasses whose fields are their configuration.

    `S` is the solver state, carried from step to step: tensors whose first dimension is the batch, in a dataclass,
    tuple, list or dict; or None.
    """

    @abc.abstractmethod
    def init(self, point: Point) -> S:
        """The solver state after the first evaluation."""

    def resume(self, point: Point, state: S) -> S:
        """The solver state after the first evaluation of a solve that continues with the state of an earlier one.

        `state` is a private copy. By default the solve begins with a new state.
        """
        return self.init(point)

    @property
    def patience(self) -> int:
        """Evaluations without progress after which the safeguard (`implicit.staged_safeguard`) acts; 0: never."""
        return 0

    def stall_after(self, numbers: int) -> int:
        """The patience for states of so many numbers per sample: `patience` unless a solver overrides this."""
        return self.patience

    def restart(self, point: Point, state: S, mask: Bool[Tensor, "B 1"]) -> S:
        """The solver state with the history of the samples in `mask` cleared; they continue from `point`.

        Cleared histories must not keep NaN or infinity that a later product would spread.
        """
        return state

    @property
    def differentiable(self) -> bool:
        """Whether autograd can record the steps, as `Unrolled` needs."""
        return True

    def region_state(self, state: S, steps: int) -> S | None:
        """The state for `steps` steps that torch.compile may compile as one region, or None.

        All these steps have the same operators and give no tangent; slots of a history are tensors. Of the fields of
        the state, which is a dataclass, fz and r are those of the last point, a step replaces the other tensors, and
        writes into the dataclasses, its histories (`implicit.loop.step_region`).
        """
        return None

    def after_regions(self, state: S, steps: int) -> S:
        """The state after so many steps from `region_state`, as without regions."""
        return state

    @property
    def has_cautious_stage(self) -> bool:
        """Whether the solver's `retreat` keeps its history and takes more careful steps in the cautious stage."""
        return False

    def retreat(
        self, point: Point, failed: Point, state: S, mask: Bool[Tensor, "B 1"], cautious: Bool[Tensor, "B 1"]
    ) -> S:
        """The solver state after the samples in `mask` were reset from `failed` to `point`, their best iterate.

        `cautious` marks the samples in the safeguard's cautious stage. By default `restart` clears the history.
        """
        return self.restart(point, state, mask)

    @abc.abstractmethod
    def step(self, point: Point, state: S) -> tuple[Flat, Flat | None, S]:
        """(next iterate, tangent, solver state).

        The loop evaluates f at the next iterate. With a tangent v (B, N) that evaluation gives J v too, and
        then costs one evaluation and one Jacobian-vector product; None: f alone. Tensors of `point` may be
        kept but never written to.
        """

    def inverse_transpose(self, state: S, g: Flat) -> Flat | None:
        """H^T g for the approximate inverse H of I - df/dz in the solver state; None if the solver has no such H."""
        return None


def check_history(state_size: int, size: int) -> None:
    """Raises ValueError if the history of a solver state has another length than `size`."""
    if state_size != size:
        raise ValueError(f"state must come from a solver with memory={size}, got {state_size}.")


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raises ValueError where one of these settings is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{_setting(settings, name)} must be at least {least}, got {getattr(settings, name)}.")


def check_share(settings: Any, name: str) -> None:
    """Raises ValueError where a setting lies outside of [0, 1)."""
    if not 0 <= getattr(settings, name) < 1:
        raise ValueError(f"{_setting(settings, name)} must lie in [0, 1), got {getattr(settings, name)}.")


def check_one_of(settings: Any, name: str, *words: str) -> None:
    """Raises ValueError where a setting is none of these words."""
    if getattr(settings, name) not in words:
        allowed = ", ".join(map(repr, words))
        raise ValueError(f"{_setting(settings, name)} must be one of {allowed}, got {getattr(settings, name)!r}.")


def _setting(settings: Any, name: str) -> str:
    return f"{type(settings).__name__}.{name}"


def on_host(*values: Tensor) -> tuple[Any, ...]:
    """The values as host arrays if the host can read them without waiting for a device, else as they are."""
    return tuple(map(to_host, values)) if host_readable(*values) else values


def may_skip(like: Tensor) -> bool:
    """Whether operators for rare cases may be left out where the host sees that no sample needs them.

    Not while autograd records: a recomputation, as in `torch.utils.checkpoint`, has to find the same operators.
    """
    return host_readable(like) and not torch.is_grad_enabled()


def to_mask(found: Any, like: Tensor) -> Tensor | None:
    """The samples that a formula of `on_host` values found, as a mask; None if there are none and `may_skip` allows."""
    if isinstance(found, Tensor):
        return found
    return to_device(found, like.device) if np.count_nonzero(found) or not may_skip(like) else None


def where(found: Any, a: Any, b: Any) -> Any:
    """`torch.where` for values as `on_host` gives them."""
    return torch.where(found, a, b) if isinstance(found, Tensor) else np.where(found, a, b)


def power_of_two(size: Any, least: float) -> Any:
    """The power of two nearest to 1 / size or 1 / least, the smaller one, for values as `on_host` gives them."""
    if isinstance(size, Tensor):
        return torch.exp2(-torch.log2(size.clamp_min(least)).round())
    with quiet(size):
        return np.exp2(-np.log2(np.maximum(size, least)).round())


def to_tensor(value: Any, like: Tensor) -> Tensor:
    """A value as `on_host` gives it, as a tensor of the dtype and device of `like`."""
    return value if isinstance(value, Tensor) else to_device(value, like.device, like.dtype)


def quiet(value: Any) -> AbstractContextManager[Any]:
    """No warnings from a formula of `on_host` values that are not finite."""
    return np.errstate(all="ignore") if isinstance(value, np.ndarray) else nullcontext()
