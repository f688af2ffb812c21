"""Unrolled, plain and checkpointed, against a loop written by hand."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from implicit import (
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    NewtonKrylov,
    Picard,
    Stop,
    Unrolled,
    fixed_point,
    iterate,
)
from implicit.diagnostics.profiling import Bytes
from tests.helpers import SOLVERS, solve
from tests.layers import F64, flat, layer, off


@pytest.mark.parametrize("checkpoint", [False, True, 1, 3, 50])
def test_by_hand(checkpoint):
    f, x = layer("adaln")
    x.requires_grad_()
    start = torch.zeros_like(x).requires_grad_()
    stop = Stop(rtol=0, atol=0, max_evals=7)
    value = fixed_point(f, start, x, solver=Picard(), grad=Unrolled(checkpoint), stop=stop).value
    z = start
    for _ in range(7):
        z = f(z, x)
    assert torch.equal(value, z)
    wanted = (*f.parameters(), x, start)
    got = flat(torch.autograd.grad(value.square().sum(), wanted))
    assert off(got, flat(torch.autograd.grad(z.square().sum(), wanted))) < 1e-14


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_checkpointing_changes_no_gradient(solver):
    f, x = layer("hard")

    def gradient(checkpoint):
        z = fixed_point(f, torch.zeros_like(x), x, solver=solver, grad=Unrolled(checkpoint)).value
        return flat(torch.autograd.grad(z.square().sum(), tuple(f.parameters())))

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("solver", [Picard(0.3), Anderson(), AndersonGS(), Multisecant(), Broyden(4), BadBroyden(4)])
def test_segments_change_no_gradient(solver):
    """Histories that are written in place, counts of evaluations that the solver looks at, a second backward pass."""
    f, x = layer("hard")
    start = torch.zeros_like(x).requires_grad_()

    def gradients(checkpoint):
        stop = Stop(rtol=0, atol=0, max_evals=11)
        solved = fixed_point(f, start, x, solver=solver, grad=Unrolled(checkpoint), stop=stop)
        loss, wanted = solved.value.square().sum(), (start, *f.parameters())
        first, second = (flat(torch.autograd.grad(loss, wanted, retain_graph=retain)) for retain in (True, False))
        assert torch.equal(first, second)
        return solved.value.detach(), first

    for mine, plain in zip(gradients(4), gradients(False), strict=True):
        assert off(mine, plain) < 1e-12


def test_segments_keep_the_square_root():
    """States that autograd holds between the passes, of 64 evaluations that keep two states each: z and tanh of it."""
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counted = 0

    def f(z, x):
        nonlocal counted
        counted += 1
        return 0.5 * torch.tanh(z * z) + x

    def cost(checkpoint):
        nonlocal counted
        counted, stop = 0, Stop(rtol=0, atol=0, max_evals=65)
        with Bytes() as memory:
            value = fixed_point(f, x, x, solver=Picard(), grad=Unrolled(checkpoint), stop=stop).value
            saved = memory.alive / (4 * x.numel())
            value.sum().backward()
        return saved, memory.peak / (4 * x.numel()), counted

    plain, each, some = cost(False), cost(True), cost(8)
    assert plain[2] == 65 and each[2] in (129, 130) and some[2] == 129  # the first evaluation is in no segment
    assert plain[0] > 2 * 64 and each[0] > 64 and some[0] < 3 * 64 / 8 + 8
    assert some[1] < 3 * 64 / 8 + 4 * 8 + 12 < min(plain[1], each[1])


def test_segments_need_a_fixed_number_of_evaluations():
    f, x = layer("easy")
    with pytest.raises(ValueError, match="max_evals"):
        fixed_point(f, torch.zeros_like(x), x, grad=Unrolled(4))
    with pytest.raises(ValueError, match=r"Unrolled\.checkpoint"):
        Unrolled(0)


def test_the_random_numbers_of_a_checkpointed_map_are_drawn_twice_alike():
    layer: Any = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).to(F64)
    stop = Stop(rtol=0, atol=0, max_evals=4)
    start = torch.ones(2, 6, dtype=F64)

    def gradient(checkpoint):
        state = torch.get_rng_state()
        z = fixed_point(lambda z: 0.5 * layer(z), start, solver=Picard(), grad=Unrolled(checkpoint), stop=stop).value
        (got,) = torch.autograd.grad(z.sum(), layer[0].weight)
        torch.set_rng_state(state)
        return got

    assert torch.equal(gradient(True), gradient(False))


def test_a_solve_that_starts_at_its_answer_still_depends_on_the_parameters():
    f, x = layer("easy")
    with torch.no_grad():
        start = fixed_point(f, torch.zeros_like(x), x, stop=Stop(rtol=1e-12)).value
    z = fixed_point(f, start, x, grad=Unrolled(), stop=Stop(rtol=1e-3)).value
    assert torch.autograd.grad(z.sum(), f.bias)[0].norm() > 0


@pytest.mark.parametrize("solver", [BadBroyden(), AndersonGS(), Broyden(), Anderson(), Anderson(3)], ids=repr)
@pytest.mark.parametrize("evals", [3, 5, 30])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_solve_that_goes_on_after_it_has_arrived_keeps_its_gradient(solver, evals, dtype):
    """Differences of exactly zero must not be divided by, nor by a stand-in for zero, in the backward pass."""
    c = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = c.clone().requires_grad_()
    stop = Stop(rtol=0, atol=0, max_evals=evals)
    value = fixed_point(
        lambda z, x: 0.5 * z + x, torch.zeros_like(c), x, solver=solver, grad=Unrolled(), stop=stop
    ).value
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    torch.testing.assert_close(g.detach(), torch.full_like(g, 2.0), rtol=0, atol=1e-6 if dtype == F64 else 1e-3)


@pytest.mark.parametrize("solver", [BadBroyden(), AndersonGS(), Broyden(), Anderson(), Anderson(3)], ids=repr)
def test_second_derivatives_of_a_solve_that_goes_on_after_it_has_arrived(solver):
    w = 0.2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    w, x = w.requires_grad_(), torch.arange(6, dtype=F64).view(2, 3) / 6

    def derivatives(solver, evals):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        z = fixed_point(lambda z: 0.3 * torch.tanh(z @ w) + x, 0 * x, solver=solver, grad=Unrolled(), stop=stop).value
        (g,) = torch.autograd.grad(z.square().sum(), w, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)[0]

    torch.testing.assert_close(derivatives(solver, 16), derivatives(Picard(), 60), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpoint", [True, 3])
@pytest.mark.parametrize("change", ["loop variable", "buffer"])
@pytest.mark.parametrize("last", [torch.tanh, lambda z: torch.nn.functional.layer_norm(z, z.shape[1:])])
def test_checkpoints_refuse_a_map_that_has_changed(checkpoint, change, last):
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 5
    weight.requires_grad_()
    contexts = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stop, buffer, total = Stop(rtol=0, atol=0, max_evals=10), contexts[0].clone(), 0.0
    for context in contexts:
        buffer.copy_(context)
        f = lambda z: last(z @ weight + (buffer if change == "buffer" else context))  # noqa: B023, E731
        z = fixed_point(f, torch.zeros(3, 5, dtype=torch.float64), grad=Unrolled(checkpoint=checkpoint), stop=stop)
        total = total + z.value.pow(3).sum()
    with pytest.raises(RuntimeError, match="args"):
        total.backward()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("budget", range(2, 14))
def test_claims_of_coupled_rows_hold_for_the_value(checkpoint, budget):
    weight = torch.tensor(0.5, requires_grad=True)
    source = torch.zeros(12, 2)
    source[0] = 1
    f = lambda z: weight * torch.cat([torch.zeros(1, 2), z[:-1]]) + source  # noqa: E731
    stop = Stop(rtol=1e-6, max_evals=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # f couples the rows
        solution = fixed_point(f, torch.zeros(12, 2), grad=Unrolled(checkpoint=checkpoint), stop=stop)
    with torch.no_grad():
        image = f(solution.value)
    residual = (image - solution.value).norm(dim=1)
    torch.testing.assert_close(solution.residual, residual)
    assert (residual <= 1e-6 * image.norm(dim=1) + 1e-12)[solution.result == 0].all()


@pytest.mark.parametrize(("seed", "evals"), [(1, 15), (4, 15), (5, 8)])
def test_steps_with_a_ridge_against_central_differences(seed, evals):
    """The model of the multisecant method fails on the way, and the ridge scales with the differences."""
    rng = torch.Generator().manual_seed(seed)
    w, x = torch.randn(6, 6, generator=rng, dtype=F64), torch.randn(1, 6, generator=rng, dtype=F64)

    def value(p):
        def f(z):
            return torch.tanh(2 * z @ w * p[0]) * p[1] + x * p[2]

        stop = Stop(rtol=0, atol=0, max_evals=evals)
        return fixed_point(f, torch.zeros_like(x), solver=Multisecant(), grad=Unrolled(), stop=stop).value.sum()

    p = torch.ones(3, dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(value(p), p)
    h = 1e-6 * torch.eye(3, dtype=F64)
    with torch.no_grad():
        want = torch.stack([(value(1 + d) - value(1 - d)) / 2e-6 for d in h])
    assert off(got, want) < 1e-3


@pytest.mark.parametrize("rows", [1, 3])
def test_a_singular_small_system_has_a_finite_gradient(rows):
    """dZ^T dR = 0 on a rotation by 90 degrees: type I has no step, and the step of type II is taken."""
    w, turn = torch.ones((), dtype=F64, requires_grad=True), torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)

    def value(w):
        return fixed_point(
            lambda z: z + w * (z @ turn) + torch.tensor([1.0, 2.0], dtype=F64),
            torch.zeros(rows, 2, dtype=F64),
            solver=Multisecant(),
            grad=Unrolled(),
            stop=Stop(rtol=0, atol=0, max_evals=4),
        ).value.sum()

    (got,) = torch.autograd.grad(value(w), w)
    with torch.no_grad():
        want = (value(w + 1e-6) - value(w - 1e-6)) / 2e-6
    assert off(got[None], want[None]) < 1e-6


def test_the_value_of_a_hard_map_is_one_with_and_without_a_graph():
    """Powell's badly scaled system, which the default solves by Newton-Krylov steps: none of them is recorded."""
    w, z0 = torch.ones((), dtype=F64, requires_grad=True), torch.tensor([[0.0, 1.0]], dtype=F64)

    def f(z):
        x, y = z[:, :1], z[:, 1:]
        return z - w * torch.cat((1e4 * x * y - 1, torch.exp(-x) + torch.exp(-y) - 1.0001), 1)

    stop = Stop(rtol=0, atol=1e-8, max_evals=150)
    graph = fixed_point(f, z0, grad=Unrolled(), stop=stop)
    with torch.no_grad():
        plain = fixed_point(f, z0, grad=Unrolled(), stop=stop)
        assert iterate(f, z0, Multisecant(), stop).converged.all()
    assert torch.equal(graph.value, plain.value) and torch.equal(graph.result, plain.result)


@pytest.mark.parametrize("checkpoint", [False, True, 2])
def test_a_solver_whose_steps_have_no_graph_is_refused_where_a_gradient_would_be_taken(checkpoint):
    f, x = layer("easy")
    stop = Stop(rtol=0, atol=0, max_evals=7)
    with pytest.raises(ValueError, match="NewtonKrylov"):
        fixed_point(f, torch.zeros_like(x), x, solver=NewtonKrylov(), grad=Unrolled(checkpoint), stop=stop)
    with pytest.raises(ValueError, match="NewtonKrylov"):
        torch.func.grad(
            lambda x: fixed_point(f, 0 * x, x, solver=NewtonKrylov(), grad=Unrolled(), stop=stop).value.sum()
        )(x)
    with torch.no_grad():
        fixed_point(f, torch.zeros_like(x), x, solver=NewtonKrylov(), grad=Unrolled(checkpoint), stop=stop)


@pytest.mark.parametrize("name", ["hole", "overflow"])
@pytest.mark.parametrize("reading", [{"check_every": 3}, {"late": True}, {"check_every": 3, "late": True}], ids=str)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.differentiable], ids=repr)
def test_a_value_on_the_way_that_is_not_finite_gives_one_answer_with_and_without_a_graph(solver, reading, name):
    rng = torch.Generator().manual_seed(4)
    w = (torch.randn(4, 4, generator=rng, dtype=F64) * 0.6).requires_grad_()
    x = torch.randn(3, 4, generator=rng, dtype=F64)

    def f(z):
        h = z @ w + x
        return torch.where(h.abs() > 2.2, torch.nan, 1.5 * torch.tanh(h)) if name == "hole" else 0.4 * h**2 + x

    stop = Stop(rtol=1e-6, max_evals=40, **reading)
    recorded = fixed_point(f, torch.zeros(3, 4, dtype=F64), solver=solver, grad=Unrolled(), stop=stop)
    quiet = solve(f, torch.zeros(3, 4, dtype=F64), solver=solver, grad=Unrolled(), stop=stop)
    assert torch.equal(recorded.value, quiet.value) and torch.equal(recorded.result, quiet.result)
    torch.testing.assert_close(recorded.residual, quiet.residual, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.differentiable], ids=repr)
def test_many_samples_of_which_some_fail_have_one_answer_with_and_without_a_graph(solver):
    """Values that are not finite end some samples, and others go on from where they were reset to."""
    rng = torch.Generator().manual_seed(10)
    w, x = (torch.randn(*shape, generator=rng, dtype=F64) for shape in ((4, 4), (66, 4)))

    def f(z, x):
        h = 0.4 * (z.unsqueeze(2) * w).sum(1) + x
        return torch.where(h.abs() > 3, torch.nan, 3 * h / (1 + h.abs()))

    z0, stop = torch.randn(66, 4, generator=rng, dtype=F64), Stop(rtol=1e-4, max_evals=40)
    recorded = fixed_point(f, z0, x.clone().requires_grad_(), solver=solver, grad=Unrolled(), stop=stop)
    quiet = solve(f, z0, x, solver=solver, grad=Unrolled(), stop=stop)
    assert torch.equal(recorded.value, quiet.value) and torch.equal(recorded.result, quiet.result)
    torch.testing.assert_close(recorded.residual, quiet.residual, rtol=0, atol=0)


@pytest.mark.parametrize("solver", [Broyden(5, search=3), Broyden(2, search=1)], ids=str)
def test_the_gradient_through_a_line_search_is_that_of_finite_differences(solver):
    generator = torch.Generator().manual_seed(0)
    w, along, x = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    w, count = (0.6 * w).requires_grad_(), Stop(rtol=0, max_evals=9)

    def loss(w):
        f, z0 = (lambda z: 1.3 * torch.sin(z @ w) + x), torch.zeros_like(x)
        return fixed_point(f, z0, solver=solver, grad=Unrolled(), stop=count).value.square().sum()

    (g,) = torch.autograd.grad(loss(w), w)
    with torch.no_grad():
        slope = (loss(w + 1e-6 * along) - loss(w - 1e-6 * along)) / 2e-6
    assert float((g * along).sum() / slope) == pytest.approx(1, abs=1e-5)
