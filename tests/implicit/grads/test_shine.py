"""SHINE: the solver's inverse against a dense matrix, its limits and its fallback."""

import pytest
import torch

from implicit import (
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    Neumann,
    Picard,
    Stop,
    fixed_point,
)
from implicit.evaluation import FlatMap
from implicit.pytree import Layout
from implicit.solvers import Point
from tests.layers import F64, dense_gradient, flat, layer, off

TIGHT = Stop(rtol=1e-12, atol=0, max_evals=300)


def rolled(z, x):
    return 0.9 * z.roll(1, 0) + x


def cotangent(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)


def gradient(f, x, g, grad, solver, stop=TIGHT):
    x = x.detach().requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, grad=grad, stop=stop, solver=solver).value
    return flat(torch.autograd.grad((z * g).sum(), (*f.parameters(), x)))


@pytest.mark.parametrize("solver", [Broyden(40), Anderson(6)], ids=str)
def test_against_a_solver_run_by_hand(solver):
    f, x = layer("hard")
    go = FlatMap(f.requires_grad_(False), (x,), Layout.of(x))
    point = Point(torch.zeros_like(x), go(torch.zeros_like(x)))
    memory = solver.init(point)
    for _ in range(8):
        z, _, memory = solver.step(point, memory)
        point = Point(z, go(z))
    f.requires_grad_(True)
    g = cotangent(x)
    eye = torch.eye(16, dtype=F64)
    transposed = torch.stack([solver.inverse_transpose(memory, e.repeat(3, 1)) for e in eye], dim=2)  # (3, 16, 16)
    y = x.detach().requires_grad_()
    u = (transposed @ g.unsqueeze(2)).squeeze(2)
    true = flat(torch.autograd.grad(f(point.fz, y), (*f.parameters(), y), u))
    stop = Stop(rtol=0, atol=0, max_evals=9)
    assert off(gradient(f, x, g, SHINE(fallback=None), solver, stop), true) < 1e-9


def dense_broyden(f, x, evals, bad):
    """Broyden with its matrix written out, sample by sample: the answer, and H as it proposed the last z.

    The answer of a spent budget is f of the last z, so there is no secant to it.
    """

    def learn(h, s, y):
        row = y if bad else s @ h
        return h - torch.outer(s + h @ y, row) / (row @ y)

    def residual(z, b):
        return f(z, x[b]) - z

    answers, matrices = [], []
    for b in range(len(x)):
        h, z = torch.eye(x.shape[1], dtype=F64), torch.zeros_like(x[b])
        for _ in range(evals - 2):
            new = z + h @ residual(z, b)
            h, z = learn(h, new - z, residual(new, b) - residual(z, b)), new
        answers.append(f(z + h @ residual(z, b), x[b]))
        matrices.append(h)
    return torch.stack(answers), torch.stack(matrices)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("evals", [3, 5, 10])
def test_iterate_by_iterate_against_a_dense_broyden(evals, bad):
    """u = H^T g with H the matrix that the forward solve has built, after every number of evaluations."""
    f, x = layer("hard")
    with torch.no_grad():
        z, h = dense_broyden(f, x, evals, bad)
    g = cotangent(x)
    u = (h.mT @ g.unsqueeze(2)).squeeze(2)
    y = x.detach().requires_grad_()
    true = flat(torch.autograd.grad(f(z, y), (*f.parameters(), y), u))
    stop = Stop(rtol=0, atol=0, max_evals=evals)
    assert off(gradient(f, x, g, SHINE(fallback=None), (BadBroyden if bad else Broyden)(40), stop), true) < 1e-8


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
def test_refining_is_worth_more_than_a_term_of_the_series(name):
    """k products from H^T g against the k + 1 terms of `Neumann`, which take as many."""
    f, x = layer(name)
    g = cotangent(x)
    true = dense_gradient(f, x, g)
    for k in (0, 1, 2):
        shine = off(gradient(f, x, g, SHINE(refine=k), Broyden()), true)
        assert shine < 1.02 * off(gradient(f, x, g, Neumann(k + 1), Broyden()), true)


def test_on_a_linear_map_broyden_learns_some_of_the_inverse():
    """H has seen the space that the solve went through: better than one step."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=rng, dtype=F64) * 0.3
    x = torch.randn(4, 6, generator=rng, dtype=F64).requires_grad_()
    true = torch.linalg.solve(torch.eye(6, dtype=F64) - a.T, torch.ones(6, dtype=F64))

    def error(grad):
        z = fixed_point(lambda z, x: z @ a.T + x, x.detach() * 0, x, grad=grad, solver=Broyden(), stop=TIGHT).value
        (got,) = torch.autograd.grad(z.sum(), x)
        return (got - true).norm(dim=1) / true.norm()

    assert error(SHINE(fallback=None)).mean() < 0.8 * error(JFB()).mean()


def test_a_sample_that_finished_early_keeps_what_it_had_learned():
    f, x = layer("hard")
    x = x * torch.tensor([1e-3, 1.0, 1.0], dtype=F64).view(3, 1)
    g = cotangent(x)
    solver = Broyden(6)
    stop = Stop(rtol=1e-6, atol=1e-4)
    x.requires_grad_()
    both = fixed_point(f, torch.zeros_like(x), x, grad=SHINE(), solver=solver, stop=stop)
    assert both.evals.max() - both.evals.min() > 6  # long enough to overwrite a memory of 6
    alone = torch.cat(
        [fixed_point(f, x[b : b + 1] * 0, x[b : b + 1], grad=SHINE(), solver=solver, stop=stop).value for b in range(3)]
    )
    (got,), (true,) = (torch.autograd.grad((z * g).sum(), x) for z in (both.value, alone))
    torch.testing.assert_close(got, true)


@pytest.mark.parametrize("solver", [Broyden(), Anderson()], ids=str)
def test_refining_converges_to_the_exact_gradient(solver):
    f, x = layer("easy")
    g = cotangent(x)
    true = dense_gradient(f, x, g)
    errors = [off(gradient(f, x, g, SHINE(refine=k), solver), true) for k in (0, 5, 20)]
    assert errors[1] < 0.02 * errors[0] and errors[2] < 1e-9


def test_the_fallback_is_jfb():
    f, x = layer("hard")
    g = cotangent(x)
    jfb = gradient(f, x, g, JFB(), Broyden(), TIGHT)
    assert off(gradient(f, x, g, SHINE(fallback=1e-9), Broyden()), jfb) < 1e-9
    assert off(gradient(f, x, g, SHINE(fallback=None), Broyden()), jfb) > 1e-2


def test_a_solver_without_an_inverse_is_refused():
    f, x = layer("easy")
    with pytest.raises(ValueError, match="solver"):
        fixed_point(f, torch.zeros_like(x), x, solver=Picard(), grad=SHINE())


def test_the_state_is_returned_when_requested():
    f, x = layer("hard")
    first = fixed_point(f, torch.zeros_like(x), x, solver=Broyden(), grad=SHINE(), keep_state=True)
    again = fixed_point(f, first.value.detach(), x, solver=Broyden(), grad=SHINE(), state=first.state)
    assert again.state is None and again.value.requires_grad and bool(again.converged.all())


@pytest.mark.filterwarnings("ignore:f takes one sample")
@pytest.mark.parametrize("solver", [Anderson(), AndersonGS(), BadBroyden(), Broyden(), Multisecant()], ids=repr)
def test_samples_that_run_again_after_they_converged_have_the_value_of_a_solve_without_a_graph(solver):
    for seed in range(12):  # f couples the samples, so a converged sample misses its tolerance when others move
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for every in (1, 3):
            stop = Stop(rtol=1e-6, check_every=every)
            graph = fixed_point(rolled, torch.zeros_like(x), x, solver=solver, grad=SHINE(), stop=stop)
            with torch.no_grad():
                plain = fixed_point(rolled, torch.zeros_like(x), x, solver=solver, grad=SHINE(), stop=stop)
            assert torch.equal(graph.value, plain.value) and torch.equal(graph.result, plain.result)
