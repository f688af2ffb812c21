"""Shared by the tests: every solver, every estimator, counters of host synchronizations and small maps.

A new solver or estimator is entered here once; the tests that hold for all of them go through these lists.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from implicit import (
    IFT,
    JFB,
    SHINE,
    AbstractGrad,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
    iterate,
)

F64 = torch.float64
SOLVERS = [Picard(), Picard(0.3), Anderson(), AndersonGS(), Multisecant(), Broyden(), BadBroyden(), NewtonKrylov()]
ESTIMATORS: dict[str, Callable[[], AbstractGrad]] = {
    "IFT": IFT,
    "JFB": JFB,
    "JFB(3)": lambda: JFB(3),
    "StochasticJFB": lambda: StochasticJFB(N=8, M=4, generator=torch.Generator().manual_seed(3)),
    "Phantom": Phantom,
    "Neumann": Neumann,
    "SHINE": lambda: SHINE(refine=4),
    "Reversible": Reversible,
    "Unrolled": Unrolled,
    "Unrolled, checkpointed": lambda: Unrolled(checkpoint=True),
}
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def solver_and(estimator: str) -> dict[str, Any]:
    """The estimator called `estimator` and a solver that works with it, as keywords of `fixed_point`."""
    grad = Reversible(anchor=12) if estimator == "Reversible" else ESTIMATORS[estimator]()
    return {"solver": Broyden() if estimator == "SHINE" else AndersonGS(), "grad": grad}


def solve(f, z0, *args, **kwargs):
    """`fixed_point` without a graph."""
    with torch.no_grad():
        return fixed_point(f, z0, *args, **kwargs)


def relative(f, z):
    """||f(z) - z|| / ||f(z)|| of every row."""
    fz = f(z)
    return (fz - z).norm(dim=1) / fz.norm(dim=1)


def half(z):
    return 0.5 * z + 1


FREE: dict[str, Any] = dict(rtol=0, atol=0)


def smooth(n=12, batch=3, gain=0.8):
    rng = torch.Generator().manual_seed(0)
    w = gain * torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]
    x = torch.randn(batch, n, generator=rng, dtype=F64)
    return lambda z: torch.tanh(z @ w) + x[: z.shape[0]], torch.zeros(batch, n, dtype=F64)


def visited(f, z0, solver, evals):
    """The list of points z at which a solve of `evals` evaluations evaluates f."""
    seen = []

    def watched(z):
        seen.append(z.clone())
        return f(z)

    with torch.no_grad():
        iterate(watched, z0, solver, Stop(max_evals=evals, **FREE))
    return seen


READS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal", "allclose", "argwhere"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"}
VIEWS = {"detach", "view", "reshape", "squeeze", "unsqueeze", "select", "__getitem__", "to"}
IS_CPU: Any = torch.Tensor.is_cpu  # False under `Waits`, so that the code takes the branches for a device


class Waits(TorchFunctionMode):
    """Counts the calls that would make the host wait for a device, if the tensors on the CPU were on one.

    Attributes:
        evals: evaluations of f so far, which f has to count itself.
        counts: evals -> number of waits after so many evaluations.
        fresh: number of waits for a tensor that was computed since the latest evaluation.
        busy: whether the device was given work since the host last waited for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evals = 0
        self.counts: Counter[int] = Counter()
        self.fresh = 0
        self.busy = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CPU.__get__:
            return False
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        host = first is not None and hasattr(first, "_host")
        indices = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:2]
        if first is not None and not host and name in READS:
            self._wait(getattr(first, "_born", -1))
        elif name in ("__getitem__", "__setitem__") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices
        ):
            self._wait(self.evals)
        elif name == "to" and host and not kwargs.get("non_blocking"):
            self._wait(self.evals)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            tensors: list[Any] = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            marked: Any = out
            if name in ("to", "cpu"):
                marked = out.view_as(out)  # a new object, since without a device these calls return the same tensor
            if name == "cpu":
                marked._host = True
            elif name != "to" and tensors and all(hasattr(t, "_host") for t in tensors):
                marked._host = True
            elif not tensors and kwargs.get("generator") is not None:  # the generators in the tests are on the host
                marked._host = True
            else:
                self.busy = self.busy or name not in VIEWS
            born = [t._born for t in tensors if hasattr(t, "_born")]
            marked._born = max(born) if name in VIEWS and born else self.evals
            return marked
        return out

    def _wait(self, born: int) -> None:
        if not self.busy:
            return
        self.busy = False
        self.counts[self.evals] += 1
        self.fresh += born == self.evals


@contextmanager
def synchronizations(mode: str):
    """PyTorch's check of calls that wait for a CUDA device: "error" makes them raise, "warn" makes them warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def watching(mode):
    """`mode` switched on; tensors from `torch.from_numpy`, which no function mode intercepts, are marked as host's."""
    from_numpy = torch.from_numpy

    def on_the_host(array):
        t: Any = from_numpy(array)
        t._host = True
        return t

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch, "from_numpy", on_the_host)
        yield
