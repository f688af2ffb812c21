"""Fixed counts that go on after the answer is reached: steps made of rounding errors must not lead away from it."""

import pytest
import torch

from implicit import AndersonGS, Broyden, Stop, fixed_point

F64, F32 = torch.float64, torch.float32


def _map(seed: int, sizes: tuple[int, ...], dtype: torch.dtype):
    draw, n = torch.Generator().manual_seed(seed), sizes[seed % len(sizes)]
    w, b = (torch.randn(rows, n, generator=draw, dtype=F64).to(dtype) for rows in (n, 4))
    return w, b


def _distance(solver, w, b, evals):
    """The largest relative residual after ``evals`` evaluations, in eps of the dtype."""
    stop = Stop(rtol=0, atol=0, max_evals=evals)
    found = fixed_point(lambda z: torch.tanh(z @ w) + b, torch.zeros_like(b), solver=solver, stop=stop)
    return (found.residual / found.value.norm(dim=1)).max() / torch.finfo(b.dtype).eps


@pytest.mark.parametrize("evals", [25, 35])
@pytest.mark.parametrize(
    ("dtype", "seed"), [*((F64, seed) for seed in (3, 22, 31, 47, 67, 79)), *((F32, seed) for seed in (6, 75))]
)
def test_broyden_that_has_arrived_stays(dtype, seed, evals):
    w, b = _map(seed, (1, 2, 3, 8), dtype)
    assert _distance(Broyden(), 0.9 * w / torch.linalg.matrix_norm(w, 2), b, evals) < 100


@pytest.mark.parametrize("evals", [25, 35, 60])
@pytest.mark.parametrize("seed", [4, 14, 19, 39, 49, 69])
def test_anderson_gs_that_has_arrived_stays(seed, evals):
    w, b = _map(seed, (1, 2, 3, 8, 32), F32)
    assert _distance(AndersonGS(), 0.6 * w / len(w) ** 0.5, b, evals) < 100
