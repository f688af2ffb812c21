"""How often the host waits for the device during a solve, counted on a CPU.

A call waits, were its tensors on a GPU, if it reads a value (``item``, ``bool``, ``numpy``, ``cpu``), makes a tensor
whose shape depends on values (``nonzero``, a mask as an index), or moves host memory to the device without
``non_blocking``. These calls are counted as Python sees them, with tensors from numpy taken for host memory.
"""

from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from implicit import Picard, Stop, fixed_point
from implicit.testing import problem
from tests.implicit.test_iterate import SOLVERS

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal", "allclose", "argwhere"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"}
VIEWS = {"detach", "view", "reshape", "squeeze", "unsqueeze", "select", "__getitem__", "to"}
each = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
BUDGET = 18
IS_CPU: Any = torch.Tensor.is_cpu  # which says no here: what a device would do is counted


class Waits(TorchFunctionMode):
    """Counts, by evaluation of f, the calls that would wait; `late` holds those for what was made just before."""

    def __init__(self) -> None:
        super().__init__()
        self.evals = 0
        self.counts: Counter[int] = Counter()
        self.fresh = 0  # reads of what the newest evaluation gave
        self.busy = False  # whether the device was given work since it was last waited for

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
            tensors: list[Any] = [t for t in args if isinstance(t, torch.Tensor)]
            marked: Any = out
            if name in ("to", "cpu"):
                marked = out.view_as(out)  # where there is no device to move to, it is the very same tensor
            if name == "cpu":
                marked._host = True
            elif name != "to" and tensors and all(hasattr(t, "_host") for t in tensors):
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
def watching(mode):
    """`mode` switched on, and arrays from numpy, which torch does not tell it about, marked."""
    from_numpy = torch.from_numpy

    def on_the_host(array):
        t: Any = from_numpy(array)
        t._host = True
        return t

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch, "from_numpy", on_the_host)
        yield


def waits(solver, stop, name="one hard of 16"):
    """The count of calls that wait, while the solve runs: those after its last evaluation apart."""
    p, mode = problem(name), Waits()

    def f(z, *args):
        mode.evals += 1
        return p.map(z, *args)

    with torch.no_grad(), watching(mode):
        found = fixed_point(f, p.z0, *p.args, solver=solver, stop=stop)
    last = mode.counts.pop(mode.evals, 0)
    return mode, last, found


@each
def test_a_fixed_count_never_waits(solver):
    mode, last, _ = waits(solver, Stop(rtol=0, atol=0, max_evals=BUDGET))
    assert mode.evals == BUDGET
    assert not mode.counts and last == 0


@each
@pytest.mark.parametrize("name", ["one hard of 16", "non-normal"])
def test_a_tolerance_waits_once_an_evaluation(solver, name):
    """Also where samples finish, are held, or are sent back by the safeguard."""
    mode, last, found = waits(solver, Stop(rtol=1e-3, atol=0, max_evals=40), name)
    assert found.evals.max() > 10 and max(mode.counts.values()) <= 1
    assert last <= 1


@each
def test_reading_seldom_waits_seldom(solver):
    mode, _, found = waits(solver, Stop(rtol=1e-9, atol=0, max_evals=BUDGET, check_every=6))
    assert set(mode.counts) <= set(range(6, BUDGET, 6)) and max(mode.counts.values()) <= 1
    assert (found.evals % 6 == 0).all()


@each
def test_a_late_look_is_at_what_the_device_did_one_evaluation_ago(solver):
    mode, _, found = waits(solver, Stop(rtol=1e-3, atol=0, max_evals=BUDGET, late=True))
    assert found.evals.max() > 10 and mode.fresh <= 1 and max(mode.counts.values()) <= 1


def test_a_look_that_is_not_late_is_seen():
    mode, *_ = waits(Picard(), Stop(rtol=1e-3, atol=0, max_evals=BUDGET))
    assert mode.fresh == BUDGET
