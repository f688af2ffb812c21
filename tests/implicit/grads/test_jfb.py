"""JFB against the same steps written by hand."""

import pytest
import torch

from implicit import JFB, Anderson, Stop, fixed_point
from tests.layers import flat, layer


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
@pytest.mark.parametrize("steps", [1, 3])
def test_by_hand(name, steps):
    f, x = layer(name)
    x.requires_grad_()
    stop = Stop(rtol=1e-8, max_evals=100)
    solution = fixed_point(f, torch.zeros_like(x), x, solver=Anderson(), grad=JFB(steps), stop=stop)
    with torch.no_grad():
        found = fixed_point(f, torch.zeros_like(x), x, solver=Anderson(), stop=stop)
    z = found.value
    for _ in range(steps):
        z = f(z, x)
    assert torch.equal(solution.value, found.value)  # of which residual and result are true
    assert torch.equal(solution.evals, found.evals + steps)
    wanted, g = (*f.parameters(), x), torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    assert torch.equal(
        flat(torch.autograd.grad((g * solution.value).sum(), wanted)),
        flat(torch.autograd.grad((g * z).sum(), wanted)),
    )


def test_the_start_gets_no_gradient_and_no_graph_is_made_without_one():
    f, x = layer("easy")
    start = torch.zeros_like(x).requires_grad_()
    z = fixed_point(f, start, x, grad=JFB()).value
    assert torch.autograd.grad(z.sum(), start, allow_unused=True) == (None,)
    with torch.no_grad():
        quiet = fixed_point(f, start, x, grad=JFB())
    assert torch.equal(quiet.value, z) and not quiet.value.requires_grad


def test_second_derivatives_are_those_of_the_last_step():
    f, x = layer("easy")
    x.requires_grad_()
    z = fixed_point(f, torch.zeros_like(x), x, grad=JFB()).value
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(slope.sum(), f.bias)
    with torch.no_grad():
        found = fixed_point(f, torch.zeros_like(x), x).value
    (slope,) = torch.autograd.grad(f(found, x).sum(), x, create_graph=True)
    (true,) = torch.autograd.grad(slope.sum(), f.bias)
    torch.testing.assert_close(got, true)


def test_a_budget_of_no_steps_is_refused():
    with pytest.raises(ValueError, match=r"JFB\.steps"):
        JFB(0)
