"""Reversible: the same iteration unrolled by hand, sample by sample, and the error of running it backwards."""

from typing import Any

import pytest
import torch

from implicit import IFT, Picard, Result, Reversible, Stop, fixed_point
from tests.layers import F64, dense_gradient, dense_solution, flat, layer, off


def by_hand(f, x, start, beta, steps):
    """f(z_n), a sample b taking steps[b] steps, recorded by autograd."""
    rows = []
    for b, n in enumerate(steps):
        y = z = start[b : b + 1]
        for _ in range(n):
            y = (1 - beta) * y + beta * f(z, x[b : b + 1])
            z = (1 - beta) * z + beta * f(y, x[b : b + 1])
        rows.append(f(z, x[b : b + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
@pytest.mark.parametrize("stop", [Stop(rtol=0, atol=0, max_evals=7), Stop(rtol=0.03)], ids=["fixed", "adaptive"])
def test_against_unrolling_by_hand(name, stop):
    f, x = layer(name)
    x.requires_grad_()
    start = (0.1 * x).detach().requires_grad_()
    solution = fixed_point(f, start, x, grad=Reversible(0.6), stop=stop)
    true = by_hand(f, x, start, 0.6, ((solution.evals - 1) // 2).tolist())
    torch.testing.assert_close(solution.value, true, rtol=1e-12, atol=1e-12)
    wanted = (*f.parameters(), x, start)
    got = flat(torch.autograd.grad(solution.value.square().sum(), wanted))
    assert off(got, flat(torch.autograd.grad(true.square().sum(), wanted))) < 1e-6


@pytest.mark.parametrize(
    ("name", "dtype", "bound"), [("easy", F64, 1e-8), ("adaln", F64, 1e-5), ("easy", torch.float32, 1e-5)]
)
def test_at_convergence_it_is_the_gradient_of_the_fixed_point(name, dtype, bound):
    f, x = layer(name, dtype)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)
    x.requires_grad_()
    stop = Stop(rtol=3e-7 if dtype == torch.float32 else 1e-10, atol=0, max_evals=1001)
    solution = fixed_point(
        f,
        torch.zeros_like(x),
        x,
        grad=Reversible(0.8, on_drift="raise" if name == "easy" else "ignore"),
        stop=stop,
    ).check()
    assert off(solution.value.detach().to(F64), dense_solution(f, x.detach())) < 1e-6
    got = flat(torch.autograd.grad((solution.value * g).sum(), (*f.parameters(), x)))
    assert off(got, dense_gradient(f, x.detach(), g)) < bound


def hard_gradient(grad, x, f):
    stop = Stop(rtol=1e-4, atol=0, max_evals=1001)
    z = fixed_point(f, torch.zeros_like(x), x, grad=grad, stop=stop).value
    return flat(torch.autograd.grad(z.sum(), (*f.parameters(), x)))


def test_a_diverged_backward_run_warns_or_raises():
    """The hard layer takes so many steps that float64 cannot hold the way back; the gradient is wrong, and says so."""
    f, x = layer("hard")
    x.requires_grad_()
    with pytest.warns(RuntimeWarning, match=r"Reversible\.tolerance") as seen:
        got = hard_gradient(Reversible(0.8), x, f)
        hard_gradient(Reversible(0.8), (0.5 * x).detach().requires_grad_(), f)
    assert len(seen) == 2 and len({str(w.message) for w in seen}) == 1  # the default filter shows one text once
    assert off(got, dense_gradient(f, x.detach(), torch.ones_like(x))) > 1e-3
    with pytest.raises(FloatingPointError, match=r"Reversible\.tolerance"):
        hard_gradient(Reversible(0.8, "raise"), x, f)


@pytest.mark.parametrize(("beta", "anchor", "dtype"), [(0.5, 12, torch.float32), (0.8, 5, F64)])
def test_anchors_make_a_long_run_exact(beta, anchor, dtype):
    """Many steps on the hard layer: the gradient of the iteration unrolled, to rounding."""
    f, x = layer("hard", dtype)
    x.requires_grad_()
    stop = Stop(rtol=1e-4, atol=0, max_evals=1001)
    grad = Reversible(beta, "raise", 1e-9, anchor)
    solution = fixed_point(f, torch.zeros_like(x), x, grad=grad, stop=stop)
    steps = (solution.evals - 1) // 2
    assert steps.max() > 70 and len(set(steps.tolist())) == 3
    got = flat(torch.autograd.grad(solution.value.square().sum(), (*f.parameters(), x)))
    f, x = layer("hard")
    x.requires_grad_()
    true = by_hand(f, x, torch.zeros_like(x), beta, steps.tolist())
    assert off(got, flat(torch.autograd.grad(true.square().sum(), (*f.parameters(), x)))) < (
        1e-9 if dtype == F64 else 3e-6
    )


@pytest.mark.parametrize("name", ["easy", "adaln"])
@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_a_right_gradient_raises_no_alarm(name, beta):
    f, x = layer(name)
    x.requires_grad_()
    stop = Stop(rtol=1e-6, atol=0, max_evals=1001)
    solution = fixed_point(f, torch.zeros_like(x), x, grad=Reversible(beta, "raise"), stop=stop)
    got = flat(torch.autograd.grad(solution.value.square().sum(), (*f.parameters(), x)))
    true = by_hand(f, x, torch.zeros_like(x), beta, ((solution.evals - 1) // 2).tolist())
    assert off(got, flat(torch.autograd.grad(true.square().sum(), (*f.parameters(), x)))) < 1e-5


def test_a_bad_sample_is_held_and_the_others_go_on():
    f, x = layer("easy")
    bad = x.clone()
    bad[1] = torch.nan
    solution = fixed_point(f, torch.zeros_like(x), bad, grad=Reversible(0.8), stop=Stop(rtol=1e-8, max_evals=200))
    assert solution.result.tolist() == [Result.CONVERGED, Result.NONFINITE, Result.CONVERGED]
    good = fixed_point(f, torch.zeros_like(x), x, grad=Reversible(0.8), stop=Stop(rtol=1e-8, max_evals=200))
    assert torch.equal(solution.value[[0, 2]], good.value[[0, 2]])


def test_value_budget_and_trace():
    f, x = layer("hard")
    stop = Stop(rtol=0, atol=0, max_evals=8)
    solution = fixed_point(f, torch.zeros_like(x), x, grad=Reversible(), stop=stop, trace=True)
    with torch.no_grad():
        quiet = fixed_point(f, torch.zeros_like(x), x, grad=Reversible(), stop=stop)
    assert torch.equal(solution.value, quiet.value)
    assert solution.evals.tolist() == [7, 7, 7]
    assert solution.trace is not None
    assert solution.trace.shape == (4, 3) and solution.result.tolist() == [Result.MAX_EVALS] * 3


def test_refusals():
    f, x = layer("easy")
    bad: dict[str, Any]
    for bad in ({"beta": 0.0}, {"beta": 1.0}, {"tolerance": 0.0}, {"anchor": 0}):
        with pytest.raises(ValueError, match="Reversible"):
            Reversible(**bad)
    with pytest.raises(ValueError, match="keep_state"):
        fixed_point(f, torch.zeros_like(x), x, grad=Reversible(), keep_state=True)
    z = fixed_point(f, torch.zeros_like(x), x.requires_grad_(), grad=Reversible()).value
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@pytest.mark.parametrize("norm", ["euclidean", "rms", "max"])
@pytest.mark.parametrize("budget", [5, 9, 200])
@pytest.mark.filterwarnings("ignore:f takes one sample")
def test_claims_hold_for_the_value(norm, budget):
    source = torch.zeros(12, 2)
    source[0] = 1
    maps = (
        lambda z: 0.5 * torch.cat([torch.zeros(1, 2), z[:-1]]) + source,  # f takes each row into the next one
        lambda z: torch.cos(2 * z) + torch.arange(12.0).unsqueeze(1),
        lambda z: 1e-24 * torch.ones(12, 2) - z,  # squares underflow
    )
    ord = torch.inf if norm == "max" else 2
    scale = 2**-0.5 if norm == "rms" else 1.0
    for f in maps:
        stop = Stop(rtol=1e-5, max_evals=budget, norm=norm)
        solution = fixed_point(f, torch.zeros(12, 2), grad=Reversible(), stop=stop)
        z, fz = solution.value.double(), f(solution.value).double()
        residual, size = (scale * torch.linalg.vector_norm(x, ord=ord, dim=1) for x in (fz - z, fz))
        torch.testing.assert_close(solution.residual.double(), residual, rtol=1e-3, atol=0)
        first = scale * torch.linalg.vector_norm(f(torch.zeros(12, 2)).double(), ord=ord, dim=1)
        allowed = 1e-5 * torch.maximum(size, torch.finfo(torch.float32).eps ** 0.5 * first)
        assert (residual <= 1.001 * allowed)[solution.result == 0].all()


def test_a_solve_within_f_is_solved_again_from_where_the_run_has_come_back_to():
    """Against the same iteration over a loop in place of the solve."""
    rng = torch.Generator().manual_seed(0)
    w = (0.3 * torch.randn(4, 4, generator=rng, dtype=F64)).requires_grad_()
    b = torch.randn(2, 4, generator=rng, dtype=F64)

    def phi(y, z):
        return torch.tanh(0.2 * y.roll(1, 1) + z @ w + b)

    def solved(z):
        return fixed_point(phi, torch.zeros_like(z), z, solver=Picard(), stop=Stop(rtol=1e-13, max_evals=40)).value

    def looped(z):
        y = torch.zeros_like(z)
        for _ in range(25):
            y = phi(y, z)
        return y

    def gradient(f):
        stop = Stop(rtol=1e-4, max_evals=30)
        value = fixed_point(f, torch.zeros(2, 4, dtype=F64), solver=Picard(), grad=Reversible(), stop=stop).value
        return torch.autograd.grad(value.square().sum(), w)[0]

    torch.testing.assert_close(gradient(solved), gradient(looped), rtol=1e-6, atol=1e-8)


def test_a_map_that_branches_at_its_start_is_repeated_on_the_same_branch():
    w = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def f(z):
        return w.sin() * z.exp().sin() + 1 if (z == 0.3).all() else w * z + 1

    value = fixed_point(
        f, torch.full((2, 1), 0.3, dtype=F64), solver=Picard(), grad=Reversible(), stop=Stop(rtol=1e-9, max_evals=60)
    ).value
    (got,) = torch.autograd.grad(value.sum(), w)
    y = z = torch.full((2, 1), 0.3, dtype=F64)
    for _ in range(29):
        y = 0.5 * y + 0.5 * f(z)
        z = 0.5 * z + 0.5 * f(y)
    (true,) = torch.autograd.grad(f(z).sum(), w)
    torch.testing.assert_close(got, true, rtol=1e-6, atol=0)


def test_an_f_that_takes_derivatives_itself_is_refused_by_name():
    w = torch.tensor(0.5, requires_grad=True)

    def f(z):
        with torch.enable_grad():
            x = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad((w * x.square() / 2).sum(), x, create_graph=True)[0] + 1

    with pytest.raises(NotImplementedError, match="Reversible"):
        fixed_point(f, torch.zeros(1, 2), grad=Reversible())


@pytest.mark.parametrize("anchor", [None, 8])
@pytest.mark.parametrize("reach", ["mean", "chain", "slow sample"])
def test_samples_that_f_couples_are_solved_as_one_system(reach, anchor):
    """Fast samples converge first, and miss the tolerance when slow ones move."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=rng, dtype=F64).requires_grad_()
    rate = torch.linspace(0.1, 0.7, 6, dtype=F64)[:, None]

    def f(z, x):
        others = {"mean": z.mean(0), "chain": z.roll(1, 0), "slow sample": z[-1]}[reach]
        return rate * torch.tanh(z) + 0.2 * others + x

    stop, z0 = Stop(rtol=1e-9, max_evals=400), torch.zeros(6, 4, dtype=F64)
    with pytest.warns(RuntimeWarning, match="batch_dims=0"):
        found = fixed_point(f, z0, x, grad=Reversible(anchor=anchor, on_drift="ignore"), stop=stop)
    whole = fixed_point(f, z0, x, grad=IFT(), stop=stop, batch_dims=0)
    assert found.converged.all()
    torch.testing.assert_close(found.residual, (f(found.value, x) - found.value).norm(dim=1).detach())
    torch.testing.assert_close(found.value, whole.value, rtol=1e-7, atol=1e-7)
    assert found.evals.max() < stop.max_evals
    got, true = (torch.autograd.grad(s.value.square().sum(), x)[0] for s in (found, whole))
    assert off(got, true) < (1e-6 if anchor else 1e-2)


@pytest.mark.parametrize(("dtype", "size"), [(F64, 1e-200), (torch.float32, 1e-30), (torch.bfloat16, 1.0)])
def test_coupling_is_noticed_at_every_size_and_in_narrow_dtypes(dtype, size):
    x = (size * torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 2.0]], dtype=dtype)).requires_grad_()

    def f(z, x):  # the first row has converged at once, until the others reach it
        return 0.5 * torch.roll(z, 1, 0) * torch.tensor([[1.0], [0.0], [1.0]], dtype=dtype) + 0.3 * z + x

    stop = Stop(rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, max_evals=100)
    with pytest.warns(RuntimeWarning, match="batch_dims=0"):
        found = fixed_point(f, torch.zeros_like(x), x, grad=Reversible(), stop=stop).check()
    found.value.sum().backward()


def test_noise_and_samples_of_their_own_are_no_coupling(recwarn):
    f, x = layer("easy")
    stop = Stop(rtol=1e-8, max_evals=200)
    slower = torch.linspace(0, 0.5, len(x), dtype=F64)[:, None]
    found = fixed_point(
        lambda z, x: slower * z + (1 - slower) * f(z, x), torch.zeros_like(x), x, grad=Reversible(), stop=stop
    )
    assert found.converged.all() and len(found.evals.unique()) > 1
    draw = torch.Generator().manual_seed(0)

    def noisy(z, x):
        return slower * z + (1 - slower) * f(z, x) + 1e-4 * torch.randn(z.shape, generator=draw, dtype=F64)

    with torch.no_grad():
        fixed_point(noisy, torch.zeros_like(x), x, grad=Reversible(), stop=Stop(rtol=1e-4, max_evals=60))
    assert not [w for w in recwarn if "batch_dims" in str(w.message)]
