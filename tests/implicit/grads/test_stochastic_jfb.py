"""Stochastic JFB: Algorithm 1 of arXiv 2401.08741 written out by hand, its draws, and what it stores."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from implicit import Anderson, Picard, StochasticJFB, Stop, fixed_point
from tests.layers import flat, layer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(6))
def test_algorithm_one_by_hand(seed):
    f, x = layer("adaln")
    x.requires_grad_()
    rng = seeded(seed)
    n = int(torch.randint(0, 5, (), generator=rng))
    m = int(torch.randint(1, 4, (), generator=rng))
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(n):
            z = f(z, x)
    for _ in range(m):
        z = f(z, x)
    solution = fixed_point(
        f,
        torch.zeros_like(x),
        x,
        solver=Picard(),
        grad=StochasticJFB(4, 3, seeded(seed)),
        stop=Stop(max_evals=1),
    )
    assert torch.equal(solution.value, z) and solution.evals.tolist() == [n + m] * 3
    wanted = (*f.parameters(), x)
    got = torch.autograd.grad(solution.value.square().sum(), wanted)
    assert torch.equal(flat(got), flat(torch.autograd.grad(z.square().sum(), wanted)))


def test_the_start_gets_a_gradient_exactly_when_n_is_zero():
    f, x = layer("easy")
    start = torch.zeros_like(x).requires_grad_()
    z = fixed_point(f, start, x, grad=StochasticJFB(0, 2, seeded())).value
    assert torch.autograd.grad(z.sum(), start)[0].norm() > 0
    grad = StochasticJFB(1000, 1, seeded())
    z = fixed_point(f, start, x, grad=grad).value
    assert torch.autograd.grad(z.sum(), start, allow_unused=True) == (None,)


def test_draws_are_uniform_and_within_bounds():
    grad = StochasticJFB(3, 2, seeded())
    draws = [grad.draw() for _ in range(6000)]
    for n in range(4):
        for m in (1, 2):
            assert abs(draws.count((n, m)) - 750) < 130  # five standard deviations
    assert {n for n, _ in draws} == {0, 1, 2, 3} and {m for _, m in draws} == {1, 2}


def test_the_generator_is_all_the_state_there_is():
    """Same seed, same draws, on any rank; saved and restored, the draws go on where they were."""
    one, two = StochasticJFB(generator=seeded(7)), StochasticJFB(generator=seeded(7))
    assert [one.draw() for _ in range(20)] == [two.draw() for _ in range(20)]
    saved = one.generator.get_state()
    ahead = [one.draw() for _ in range(20)]
    resumed = StochasticJFB(generator=torch.Generator())
    resumed.generator.set_state(saved)
    assert [resumed.draw() for _ in range(20)] == ahead
    state = torch.get_rng_state()
    one.draw()
    assert torch.equal(state, torch.get_rng_state())


def test_free_steps_go_by_the_solver():
    f, x = layer("hard")
    seed, n = next((s, n) for s in range(50) if (n := StochasticJFB(12, 1, seeded(s)).draw()[0]) > 3)
    grad = StochasticJFB(12, 1, seeded(seed))
    got = fixed_point(f, torch.zeros_like(x), x, solver=Anderson(), grad=grad).value
    with torch.no_grad():
        stop = Stop(rtol=0, atol=0, max_evals=n)
        z = fixed_point(f, torch.zeros_like(x), x, solver=Anderson(), stop=stop).value
        assert torch.equal(got, f(z, x))


@pytest.mark.parametrize(("N", "M", "name"), [(-1, 1, "N"), (1, 0, "M")])
def test_impossible_budgets(N, M, name):
    with pytest.raises(ValueError, match=rf"StochasticJFB\.{name}"):
        StochasticJFB(N, M)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_would_draw_again(reentrant):
    f, x = layer("easy")
    x = x.clone().requires_grad_()

    def forward(grad):
        def solve(x):
            return fixed_point(f, torch.zeros_like(x), x, grad=grad).value

        return checkpoint(solve, x, use_reentrant=reentrant).sum()

    with pytest.raises(RuntimeError, match="generator"):
        forward(StochasticJFB(3, 3, seeded(0))).backward()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (got,) = torch.autograd.grad(fixed_point(f, torch.zeros_like(x), x, grad=StochasticJFB()).value.sum(), x)
        torch.manual_seed(0)
        forward(StochasticJFB()).backward()  # checkpoint restores the global generator
    assert torch.equal(x.grad, got)
