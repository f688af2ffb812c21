"""First guess and preconditioner of the linear solve of `IFT`: the same gradient from fewer products."""

import pytest
import torch
from torch import nn

import implicit
from implicit import GMRES, IFT, JFB, Adjoint, Picard, Solution, Stop, fixed_point
from tests.helpers import F64

TIGHT = Stop(rtol=1e-11, max_evals=200)


def layer(n=10, batch=4):
    rng = torch.Generator().manual_seed(0)
    w = (0.9 * torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]).requires_grad_()
    x = torch.randn(batch, n, generator=rng, dtype=F64)
    return w, x, torch.zeros(batch, n, dtype=F64)


def solve(w, x, z0, adjoint=None, **ift):
    """The gradient for w, the products of each sample, and the solution."""
    reports: list[Solution] = []
    grad = IFT(report=reports.append, **ift)
    solution = fixed_point(lambda z: torch.tanh(z @ w + x), z0, stop=TIGHT, grad=grad, adjoint=adjoint)
    (gradient,) = torch.autograd.grad(solution.value.pow(2).sum(), w)
    return gradient, int(reports[0].evals.max()), solution


@pytest.mark.parametrize("solver", [None, GMRES(memory=5, short=2), Picard()])
def test_the_same_gradient_in_fewer_products(solver):
    w, x, z0 = layer()
    first, cold, solution = solve(w, x, z0, Adjoint(), solver=solver)
    again, warm, _ = solve(w, x, z0, solution.adjoint, solver=solver)
    with torch.no_grad():
        moved = w + 1e-6
    near, nearly, _ = solve(moved.requires_grad_(), x, z0, solution.adjoint, solver=solver)
    exact, _, _ = solve(moved, x, z0, solver=solver)
    torch.testing.assert_close(again, first, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(near, exact, rtol=1e-6, atol=1e-9)
    assert warm <= 3 and warm < nearly <= cold


def test_a_guess_that_is_wrong_changes_no_gradient():
    w, x, z0 = layer()
    exact, cold, _ = solve(w, x, z0)
    for wrong in (torch.full_like(x, 1e9), torch.full_like(x, torch.nan), -torch.ones_like(x)):
        found, products, _ = solve(w, x, z0, Adjoint(wrong))
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
        assert products <= cold + 1


def test_u_satisfies_its_equation_and_scales_with_the_loss():
    w, x, z0 = layer()
    for scale in (1.0, 1e-20):
        adjoint = Adjoint()
        solution = fixed_point(lambda z: torch.tanh(z @ w + x), z0, stop=TIGHT, adjoint=adjoint)
        assert solution.adjoint is not adjoint and solution.adjoint is not None and solution.adjoint.value is None
        (scale * solution.value.pow(2).sum()).backward()
        z, u = solution.value.detach(), solution.adjoint.value
        jacobian = torch.autograd.functional.jacobian(lambda s: torch.tanh(s @ w + x), z)
        expected = 2 * scale * z + torch.einsum("bi,bicj->cj", u, jacobian)
        torch.testing.assert_close(u, expected, rtol=1e-8, atol=0)
        assert adjoint.value is None


def test_samples_take_their_part_of_u_along():
    w, x, z0 = layer()
    _, cold, solution = solve(w, x, z0, Adjoint())
    order = torch.tensor([2, 0])
    _, warm, _ = solve(w, x[order], z0[order], Adjoint(solution.adjoint.value[order]))
    assert warm < cold / 3


def test_a_layer_of_nested_states_keeps_u_in_their_structure_and_nothing_on_the_module():
    w, x, z0 = layer()
    deq = implicit.DEQ(lambda z: {"a": torch.tanh(z["b"] @ w), "b": torch.tanh(z["a"] @ w + x)}, stop=TIGHT)
    before = set(vars(deq))
    solution = deq({"a": z0, "b": z0}, adjoint=Adjoint())
    solution.value["a"].sum().backward()
    assert set(solution.adjoint.value) == {"a", "b"} and set(vars(deq)) == before
    with torch.no_grad():  # an evaluation hands the guess on
        assert deq({"a": z0, "b": z0}, adjoint=solution.adjoint).adjoint.value is solution.adjoint.value


def test_an_exact_preconditioner_leaves_two_products():
    w, x, z0 = layer()
    exact, cold, solution = solve(w, x, z0)
    with torch.no_grad():
        slope = 1 - torch.tanh(solution.value @ w + x).square()
        systems = torch.eye(w.shape[0], dtype=F64) - torch.einsum("ij,bj->bij", w, slope)
    good, products, _ = solve(w, x, z0, preconditioner=lambda g: torch.linalg.solve(systems, g))
    torch.testing.assert_close(good, exact, rtol=1e-6, atol=1e-9)
    assert products <= 2 < cold
    for solver in (None, Picard()):  # one that is no use
        bad, _, _ = solve(w, x, z0, preconditioner=lambda g: 0.9 * g, solver=solver)
        torch.testing.assert_close(bad, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [None, Picard()])
@pytest.mark.parametrize("n", [1, 10])
def test_a_preconditioner_that_is_not_linear_changes_no_gradient_and_is_named(n, solver):
    w, x, z0 = layer(n)
    exact, _, _ = solve(w, x, z0, solver=solver)
    rng = torch.Generator().manual_seed(1)
    for wrong in (
        torch.abs,
        lambda g: g + 0.3 * torch.sin(10 * g),
        lambda g: g + 0.1,
        lambda g: g + 0.1 * torch.randn(g.shape, generator=rng, dtype=F64),
        lambda g: g * torch.nan,
    ):
        with pytest.warns(RuntimeWarning, match="preconditioner"):
            found, _, _ = solve(w, x, z0, preconditioner=wrong, solver=solver)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    found, _, _ = solve(w, x, z0, preconditioner=lambda g: g.mul_(0.9), solver=solver)  # works in place
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    for shape in (lambda g: g[:, :0], lambda g: None, lambda g: {"a": g}):
        with pytest.raises(ValueError, match="preconditioner"):
            solve(w, x, z0, preconditioner=shape)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g: g.sort(dim=1)[0],
        lambda g: g * (g.abs().amax(dim=1) / g.norm(dim=1)).unsqueeze(1),
        lambda g: torch.where(g.abs() >= 0.5 * g.abs().amax(dim=1, keepdim=True), g, 2 * g),
        lambda g: g**3 / g.square().mean(dim=1, keepdim=True),
    ],
    ids=("sort", "norms", "threshold", "cube"),
)
def test_a_homogeneous_preconditioner_is_found_out_with_a_cotangent_of_ones(wrong):
    w, x, z0 = layer()
    grads = []
    for precondition in (None, wrong):
        value = fixed_point(
            lambda z: torch.tanh(z @ w + x), z0, stop=TIGHT, grad=IFT(preconditioner=precondition, on_failure="ignore")
        ).value
        grads.append(torch.autograd.grad(value.sum(), w)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_cotangent_of_one_sample_changes_no_bit_of_the_others_with_a_preconditioner(bad):
    w, x, z0 = layer()
    inputs = []
    for first in (1.0, bad):
        u = x.clone().requires_grad_()
        grad = IFT(preconditioner=lambda g: 1.1 * g, on_failure="ignore")
        value = fixed_point(lambda z, u: torch.tanh(z @ w.detach() + u), z0, u, stop=TIGHT, grad=grad).value
        g = torch.ones_like(value)
        g[0] = first
        inputs.append(torch.autograd.grad(value, u, g)[0][1:])
    assert torch.equal(*inputs)


def test_second_derivatives_are_those_without_hints():
    w, x, z0 = layer(5, 2)

    def second(adjoint, preconditioner):
        grad = IFT(preconditioner=preconditioner)
        z = fixed_point(lambda z: torch.tanh(z @ w + x), z0, stop=TIGHT, grad=grad, adjoint=adjoint).value
        (g,) = torch.autograd.grad(z.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), w)[0]

    hints = second(Adjoint(torch.ones_like(z0)), lambda g: 1.3 * g)
    torch.testing.assert_close(hints, second(None, None), rtol=1e-7, atol=1e-9)


def test_coupled_samples_are_solved_as_one_with_a_guess_too():
    w, x, z0 = layer()
    f = lambda z: torch.tanh(z @ w + x + 0.1 * z.mean(dim=0))  # noqa: E731
    found = []
    for adjoint in (None, Adjoint(torch.ones_like(z0))):
        with pytest.warns(RuntimeWarning, match="batch_dims"):
            z = fixed_point(f, z0, stop=TIGHT, adjoint=adjoint).value
            found.append(torch.autograd.grad(z.sum(), w)[0])
    torch.testing.assert_close(*found, rtol=1e-7, atol=0)


def test_refusals_name_what_is_wrong():
    w, x, z0 = layer()
    f = lambda z: torch.tanh(z @ w + x)  # noqa: E731
    with pytest.raises(ValueError, match="adjoint"):
        fixed_point(f, z0, grad=JFB(), adjoint=Adjoint())
    with pytest.raises(ValueError, match="adjoint"):
        fixed_point(f, z0, adjoint=Adjoint(z0[:2]))
    with pytest.raises(NotImplementedError, match="adjoint"):
        torch.func.grad(lambda x: fixed_point(lambda z: torch.tanh(z + x), z0, adjoint=Adjoint()).value.sum())(x)


def test_training_with_the_guess_takes_fewer_products_and_the_same_steps():
    def train(warm):
        torch.manual_seed(0)
        counts: list[Solution] = []
        inner, x, y = nn.Linear(16, 16), torch.randn(32, 16), torch.randn(32, 16)
        deq = implicit.DEQ(lambda z, x: torch.tanh(0.5 * inner(z) + x), grad=IFT(report=counts.append))
        optimizer = torch.optim.Adam(inner.parameters(), lr=1e-3)
        adjoint, loss = Adjoint() if warm else None, torch.tensor(0.0)
        for _ in range(20):
            solution = deq(torch.zeros(32, 16), x, adjoint=adjoint)
            loss = (solution.value - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adjoint = solution.adjoint
        return sum(int(s.evals.max()) for s in counts), loss.item()

    spent, losses = zip(train(False), train(True), strict=True)
    assert spent[1] < 0.9 * spent[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
