"""Cost of a gradient: evaluations of f, vector-Jacobian products, bytes held, bytes at the peak, time.

The bytes are measured by a dispatch mode, which works for the gradients of any library.
"""

import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.pytree import Map, State, leaves, rebuild
from implicit.torch_internals import TorchDispatchMode, memory, tree_leaves


@dataclass
class Counter:
    """Counts evaluations of a map and vector-Jacobian products with it."""

    evals: int = 0
    products: int = 0

    def count(self, evals: int = 0, products: int = 0) -> None:
        """Count evaluations of f and vector-Jacobian products."""
        self.evals, self.products = self.evals + evals, self.products + products

    def watch(self, f: Map) -> Map:
        """f with its evaluations, and the vector-Jacobian products with it, counted."""

        def watched(z: State, *args: Any) -> State:
            self.count(evals=1)
            out = f(z, *args)
            return rebuild(out, iter(_Tap.apply(self, *leaves(out))))

        return watched


class _Tap(torch.autograd.Function):
    """Identity whose backward pass is counted."""

    @staticmethod
    def forward(ctx: Any, counter: Counter, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.counter = counter
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.counter.count(products=1)
        return (None, *grads)


class Bytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make while the mode is on, without workspaces inside operators.

    Attributes:
        alive: bytes made since the mode was switched on that are still in use.
        peak: the largest value of `alive` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}  # storage -> its bytes; 0 for a storage that is older than the mode
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            self._know(t, made=False)
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            self._know(t, made=True)
        self.peak = max(self.peak, self.alive)
        return out

    def _know(self, t: Any, made: bool) -> None:
        if not isinstance(t, Tensor):
            return
        store, key = t.untyped_storage(), memory(t)
        if key not in self._sizes:
            self._sizes[key] = store.nbytes() if made else 0
            self.alive += self._sizes[key]
            weakref.finalize(store, self._freed, key)

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


@dataclass(frozen=True, eq=False)
class Measured:
    """A gradient and its cost.

    Attributes:
        gradient: all gradients as one float64 vector on the host; None if there is none.
        evals: evaluations of f, forward and backward.
        products: vector-Jacobian products with f.
        saved: bytes held between the forward and the backward pass: the value counts, parameters and inputs do not.
        peak: largest number of such bytes in use at once in either pass.
        note: warnings, or the reason if there is no gradient.
    """

    gradient: Float[Tensor, " n"] | None = field(repr=False)
    evals: int
    products: int
    saved: int
    peak: int
    note: str


def measure(
    forward: Callable[[Map], Tensor], f: Map, params: Sequence[Tensor], counter: Counter | None = None
) -> Measured:
    """Run ``forward(f)``, a scalar loss, and its backward pass once, and measure both. A failure is a `note`.

    Args:
        forward: function of a map like f that returns the loss.
        f: the map.
        params: tensors to differentiate for.
        counter: counter of evaluations and products, which goes on from its present counts and may raise to end the
            run; None: a new one.
    """
    counter, memory, saved = Counter() if counter is None else counter, Bytes(), 0
    evals, products = counter.evals, counter.products
    gradient, notes = None, []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with memory:
                loss = forward(counter.watch(f))
                saved = memory.alive
                grads = torch.autograd.grad(loss, params, allow_unused=True)
            gradient = flat(grads, params)
        except Exception as error:  # any failure is the result of this row
            notes.append(f"{type(error).__name__}: {error}")
    notes += [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    if gradient is not None and not gradient.isfinite().all():
        notes.append("The gradient is not finite.")
    return Measured(
        gradient, counter.evals - evals, counter.products - products, saved, memory.peak, " ".join(dict.fromkeys(notes))
    )


def flat(grads: Iterable[Tensor | None], params: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """Gradients as one float64 vector on the host, with real and imaginary parts as two numbers and 0 for None."""
    whole = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in whole]
    return torch.cat([g.detach().flatten().cpu().double() for g in real])


def paced(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each run; all runs take turns, after one round of warm-up.

    On the CPU this is the CPU time of the process, which other processes do not lengthen; on other devices clock time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = _now(device)
            run()
            if turn:
                times[name].append(_now(device) - start)
    return {name: statistics.median(taken) for name, taken in times.items() if taken}


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
