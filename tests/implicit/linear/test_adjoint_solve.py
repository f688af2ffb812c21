"""The check of backward solves: coupled samples are detected and solved as one system."""

import warnings

import pytest
import torch
from torch import nn

from implicit import IFT, Anderson, NotConverged, Picard, Solution, Stop, fixed_point
from tests.layers import F64, off

TIGHT = Stop(rtol=1e-14, atol=0, max_evals=200)


def mean_field(seed=0, rows=5, width=6):
    draw = torch.Generator().manual_seed(seed)
    w, b = (torch.randn(n, width, generator=draw, dtype=F64) for n in (width, rows))
    return w / 4, b


def coupled(z, w, b):
    return torch.tanh(z @ w + b + 0.5 * z.mean(0))


def dense(w, b, g):
    """The gradient by w, from the Jacobian of the whole batch."""
    z = torch.zeros_like(b)
    for _ in range(400):
        z = coupled(z, w, b)
    jacobian = torch.func.jacrev(lambda z: coupled(z, w, b).flatten())(z).flatten(1)
    u = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian.mT, g.flatten())
    return torch.func.vjp(lambda w: coupled(z, w, b).flatten(), w)[1](u)[0]


@pytest.mark.parametrize("solver", [None, Anderson(10)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (1e-8, 1, 0, 1e4, 1), (1e-10, 0, 0, 0, 0)], ids=str)
def test_coupled_samples_are_found_and_their_gradient_is_exact(sizes, solver):
    w, b = mean_field()
    g = torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=F64) * torch.tensor(sizes)[:, None]
    heard: list[Solution] = []
    grad = IFT(solver, report=heard.append)
    z = fixed_point(lambda z: coupled(z, w, b), b, solver=Picard(), grad=grad, stop=TIGHT).value  # nothing to learn
    assert not z.requires_grad
    w.requires_grad_()
    z = fixed_point(lambda z: coupled(z, w, b), b, solver=Picard(), grad=grad, stop=TIGHT).value
    with pytest.warns(RuntimeWarning, match="batch_dims"):
        (z * g).sum().backward()
    assert off(w.grad, dense(w.detach(), b, g)) < 1e-8
    assert heard[0].converged.tolist() == [True] * 5 and heard[0].residual.shape == heard[0].evals.shape == (5,)


def test_batch_normalization_in_training_mode_by_second_derivatives_too():
    norm = nn.BatchNorm1d(6).double()
    w, b = mean_field()
    w.requires_grad_()

    def run(batch_dims):
        z = fixed_point(
            lambda z: 0.4 * norm(torch.tanh(z @ w + b)),
            b,
            solver=Picard(),
            grad=IFT(on_failure="ignore"),
            stop=TIGHT,
            batch_dims=batch_dims,
        ).value
        (first,) = torch.autograd.grad(z.square().sum() + z[0].sum(), w, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), w)[0]

    for apart, whole in zip(run(1), run(0), strict=True):
        assert off(apart.detach(), whole.detach()) < 1e-7


def test_the_default_warns_once_and_ignore_does_not():
    w, b = mean_field()
    w.requires_grad_()

    def backward(on_failure):
        grad = IFT(on_failure=on_failure)
        fixed_point(lambda z: coupled(z, w, b), b, solver=Picard(), grad=grad, stop=TIGHT).value.sum().backward()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for on_failure in ("warn", "warn", "ignore"):
            backward(on_failure)
    assert len(said) == 2  # of one text and place, which Python's default filter shows once
    assert len({(str(w.message), w.filename, w.lineno) for w in said}) == 1


@pytest.mark.parametrize(("sizes", "more"), [((1, 1, 1), 1), ((1, 0, 1), 0)])
def test_only_samples_that_converge_all_at_once_cost_another_product(sizes, more):
    w, b = mean_field(rows=1)
    w.requires_grad_()
    count = {}
    for rows in (1, 3):
        heard: list[Solution] = []
        grad = IFT(report=heard.append)
        z = fixed_point(lambda z: torch.tanh(z @ w + b.expand_as(z)), b.repeat(rows, 1), grad=grad, stop=TIGHT).value
        (z.sum(1) * torch.tensor(sizes[:rows])).sum().backward()
        count[rows] = int(heard[0].evals[0])
    assert count[3] == count[1] + more


def test_a_solve_that_failed_and_is_no_coupled_one_fails():
    w, b = mean_field()
    w.requires_grad_()
    grad = IFT(on_failure="raise", stop=Stop(rtol=1e-12, atol=0, max_evals=2))
    z = fixed_point(lambda z: torch.tanh(z @ w + b), b, grad=grad, stop=TIGHT).value
    with pytest.raises(NotConverged):
        z.sum().backward()
