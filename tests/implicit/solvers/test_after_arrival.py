"""Fixed counts that go on after the answer is reached: steps made of rounding errors do no harm."""

import pytest
import torch

from implicit import Anderson, AndersonGS, Broyden, Picard, Stop, fixed_point
from tests.helpers import SOLVERS, half, solve

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


ARRIVING = [(lambda z: -z, 0.0), (half, 2.0), (lambda z: 0 * z + 3, 3.0), (lambda z: 2 * z, 0.0)]  # map and answer


@pytest.mark.parametrize("solver", [*SOLVERS, Anderson(2)], ids=repr)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_fixed_count_that_goes_on_after_it_has_arrived_stays_there(solver, dtype):
    """Residuals and differences of exactly zero, or so small that their squares are; one sample starts there."""
    for f, answer in ARRIVING:
        z0 = torch.tensor([[1.0, 1.0, 1.0], [1.6, 1.8, 2.0], 3 * [answer]], dtype=dtype)
        for evals in (8, 30):
            found = solve(f, z0, solver=solver, stop=Stop(rtol=0, atol=0, max_evals=evals))
            assert torch.isfinite(found.value).all() and torch.isfinite(found.residual).all()
            assert torch.equal(found.value[2], z0[2]) and not found.residual[2]
            # what nothing has tested is not claimed: the other rows have moved since
            assert not found.converged.any()
            alone = solve(f, z0[2:], solver=solver, stop=Stop(rtol=0, atol=0, max_evals=evals))
            assert torch.equal(alone.value, z0[2:]) and alone.converged.all()
            if not isinstance(solver, Picard):  # a line through two points finds all these answers
                torch.testing.assert_close(found.value, torch.full_like(z0, answer), rtol=0, atol=1e-5)
