"""States held at the peak of a solve, f's own temporaries among them: the plain loop z = f(z) holds four.

Counted from the storages alive, as long as every iterate is the best so far; a best point that is kept apart takes two.
"""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicit import Anderson, AndersonGS, Broyden, Picard, Stop, iterate

BATCH, NUMBERS, WIDTH = 4, 16384, 64
BEYOND = {Anderson: 6, AndersonGS: 12, Broyden: 6}  # states beyond two for every point remembered


class Held(TorchDispatchMode):
    """The largest number of states alive at once, in bytes of all storages made meanwhile, and of z0."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.alive:
                self.alive[key] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out

    @property
    def states(self) -> float:
        return 1 + self.peak / (4 * BATCH * NUMBERS)


def layer():
    w = 0.98 * torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    return lambda z: torch.tanh(z.reshape(-1, WIDTH) @ w + 0.1).view(BATCH, NUMBERS)


def held(solver, evals, **tolerance):
    f, z0 = layer(), torch.zeros(BATCH, NUMBERS)
    with torch.no_grad(), Held() as seen:
        iterate(f, z0, solver, Stop(max_evals=evals, **(tolerance or {"rtol": 1e-30, "atol": 0.0})))
    return seen.states


def test_the_plain_loop_holds_four():
    f, z = layer(), torch.zeros(BATCH, NUMBERS)
    with torch.no_grad(), Held() as seen:
        for _ in range(5):
            z = f(z)
    assert 3.9 < seen.states < 4.1


def test_picard_holds_seven():
    assert held(Picard(), 20) <= 7.1


@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("memory", [1, 6])
@pytest.mark.parametrize("tolerance", [{"rtol": 1e-30, "atol": 0.0}, {"rtol": 0.0, "atol": 0.0}], ids=["tol", "count"])
def test_two_states_a_point_whatever_the_budget(kind, memory, tolerance):
    if kind is Broyden and memory == 1:
        pytest.skip("four more: a step takes as much whatever the memory")
    short, long = (held(kind(memory), evals, **tolerance) for evals in (memory + 4, 30))
    kept = 0 if tolerance["rtol"] else 1  # the point to return to where f is not finite
    assert max(short, long) <= 2 * memory + BEYOND[kind] + kept + 0.2
    assert held(kind(memory), 10**6, rtol=1e-3, atol=0.0) <= 2 * memory + BEYOND[kind] + 2.2  # the best kept apart


@pytest.mark.parametrize("kind", [AndersonGS, Broyden])
def test_a_long_memory_takes_no_room_before_it_is_used(kind):
    assert held(kind(100), 6) <= 30
