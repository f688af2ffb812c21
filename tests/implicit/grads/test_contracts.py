"""Contracts that hold for every estimator: one value with and without a graph, no gradient lost, none poisoned."""

import collections
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from implicit import (
    DEQ,
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Result,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.testing import problem

TIGHT = Stop(rtol=1e-11, atol=0, max_evals=400)
SOLVE = Stop(rtol=1e-11, atol=0, max_evals=200)
F64 = torch.float64


def named(*estimators):
    return pytest.mark.parametrize("grad", estimators, ids=lambda g: type(g).__name__)


EXACT = (
    IFT(stop=SOLVE),
    JFB(80),
    Phantom(160),
    Neumann(80),
    SHINE(refine=80),
    Reversible(anchor=8),
    Unrolled(),
    Unrolled(checkpoint=True),
)
exact = named(*EXACT)
SOLVERS = (Picard(), Anderson(), AndersonGS(), Broyden(), BadBroyden(), NewtonKrylov())


def weight(seed: int = 0) -> Tensor:
    w = torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (0.5 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()


X = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(9))
ZERO = torch.zeros_like(X)


def gradient(f: Any, w: Tensor, grad: Any, **options: Any) -> Tensor:
    value = fixed_point(f, ZERO, grad=grad, stop=TIGHT, **options).value
    return torch.autograd.grad(value.pow(2).sum(), w)[0]


def unrolled(f: Any, w: Tensor, steps: int = 120) -> Tensor:
    z = ZERO
    for _ in range(steps):
        z = f(z)
    return torch.autograd.grad(z.pow(2).sum(), w)[0]


class Product(torch.autograd.Function):
    """z W^T with a view inside, which no torch function mode sees."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(z, w)
        return z @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        z, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ z


class ListOf(list):
    """A subclass of list."""


Pair = collections.namedtuple("Pair", "a b")


def maps(w: Tensor) -> dict[str, Any]:
    """Maps that use w where it is hard to find."""
    pair, several = Pair(w, 2 * w), ListOf([w, 2 * w])

    def under_no_grad(z: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 / (1 + w.T.norm())
        return torch.tanh(scale * z @ w.T + X)

    return {
        "custom function": lambda z: torch.tanh(Product.apply(z, w) + X),
        "custom function and openly": lambda z: torch.tanh(0.5 * Product.apply(z, w) + 0.5 * z @ w.T + X),
        "namedtuple": lambda z: torch.tanh(z @ (torch.stack(pair).mean(0) / 1.5).T + X),
        "list subclass": lambda z: torch.tanh(z @ (torch.stack(several).mean(0) / 1.5).T + X),
        "view under no_grad": under_no_grad,
    }


@exact
@pytest.mark.parametrize("kind", list(maps(weight())))
def test_no_gradient_is_lost(grad, kind):
    w = weight()
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    torch.testing.assert_close(
        gradient(maps(w)[kind], w, grad, solver=solver), unrolled(maps(w)[kind], w), rtol=1e-7, atol=1e-9
    )


@named(IFT(stop=SOLVE), Reversible(anchor=8), JFB(80))
def test_a_weight_that_was_computed_in_another_thread(grad):
    w = weight()
    h = w
    for _ in range(50):  # sequence numbers of autograd are counted per thread
        h = h + 0.0

    def f(z):
        return torch.tanh(0.5 * z @ h.T + 0.5 * z @ w.T + X)

    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(gradient(f, w, grad)))
    thread.start()
    thread.join()
    torch.testing.assert_close(found[0], unrolled(f, w), rtol=1e-7, atol=1e-9)


def test_second_derivatives_through_a_namedtuple():
    def twice(value, w):
        (first,) = torch.autograd.grad(value.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(first.sum(), w)[0]

    w = weight()
    f, z = maps(w)["namedtuple"], ZERO
    for _ in range(120):
        z = f(z)
    value = fixed_point(maps(w)["namedtuple"], ZERO, grad=EXACT[0], stop=TIGHT).value
    torch.testing.assert_close(twice(value, w), twice(z, w), rtol=1e-7, atol=1e-9)


@named(IFT(), JFB(5), Phantom(), Neumann(), SHINE(), Reversible(), Unrolled())
@pytest.mark.parametrize("in_args", [True, False])
def test_a_sparse_weight(grad, in_args):
    w = (0.2 * torch.eye(5, dtype=F64)).to_sparse().requires_grad_()

    def f(z, w=w):
        return torch.tanh(torch.sparse.mm(w, z.T).T + X)

    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    args = (w,) if in_args else ()
    (got,) = torch.autograd.grad(fixed_point(f, ZERO, *args, grad=grad, solver=solver).value.sum(), w)
    dense = w.detach().to_dense().requires_grad_()
    z = ZERO
    for _ in range(60):
        z = torch.tanh((dense @ z.T).T + X)
    (true,) = torch.autograd.grad(z.sum(), dense)
    near = 1e-3 if isinstance(grad, IFT | Reversible | Unrolled) else 0.8
    assert (got.to_dense() - true).diagonal().norm() < near * true.diagonal().norm()


@named(
    IFT(), JFB(), JFB(5), Phantom(), Neumann(), Unrolled(), StochasticJFB(generator=torch.Generator().manual_seed(0))
)
def test_a_failed_sample_does_not_reach_the_weights_of_the_others(grad):
    def run(x):
        w = torch.tensor(0.5, requires_grad=True)
        x = torch.tensor(x, requires_grad=True)
        if isinstance(grad, StochasticJFB):
            grad.generator.manual_seed(0)
        solution = fixed_point(
            lambda z, x: torch.where(x > 2, z**4 + x, torch.sin(w * z) + x),
            torch.zeros_like(x),
            x,
            grad=grad,
            solver=Picard(),
            stop=Stop(rtol=1e-5, max_evals=60),
        )
        return torch.autograd.grad(solution.value[0].sum(), (w, x)), solution

    (alone, _), _ = run([[1.0]])
    (w, x), solution = run([[1.0], [3.0]])
    assert solution.result[1] != Result.CONVERGED
    assert torch.equal(w, alone)
    assert x[1].item() == 0 and bool(x.isfinite().all())


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@named(IFT(), JFB(), JFB(5), Phantom(), Neumann(), SHINE())
@pytest.mark.parametrize("name", ["one hard of 16", "non-normal", "linear 0.999"])
def test_one_value_and_result_with_and_without_a_graph(grad, solver, name):
    if isinstance(grad, SHINE) and isinstance(solver, Picard | NewtonKrylov):
        pytest.skip("has no inverse estimate")
    p = problem(name)
    stop = Stop(rtol=1e-8, atol=0, max_evals=150)
    w = torch.ones((), dtype=F64, requires_grad=True)

    def f(z, *args):
        return p.map(z, *args) * w

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorded = fixed_point(f, p.z0, *p.args, solver=solver, grad=grad, stop=stop)
    with torch.no_grad():
        quiet = fixed_point(f, p.z0, *p.args, solver=solver, grad=grad, stop=stop)
    assert torch.equal(recorded.result, quiet.result) and torch.equal(recorded.value, quiet.value)
    assert torch.equal(recorded.residual, quiet.residual)


@named(JFB(5), Phantom(5, 0.0), Phantom())
@pytest.mark.parametrize("solver", [Picard(0.7), Anderson(2, damping=0.5), AndersonGS()], ids=str)
def test_a_claim_is_true_of_the_value_after_tracked_steps(grad, solver):
    """An eigenvalue of -3: each further plain step multiplies the residual by 3."""
    q = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    a = q @ torch.diag(torch.tensor([-3.0, -1.5, 0.5, 0.2], dtype=F64)) @ q.T
    w = torch.ones((), dtype=F64, requires_grad=True)

    def f(z):
        return w * (z @ a + torch.arange(1.0, 5.0, dtype=F64))

    stop = Stop(rtol=1e-6, atol=0, max_evals=400)
    solution = fixed_point(f, torch.zeros(2, 4, dtype=F64), solver=solver, grad=grad, stop=stop).check()
    value = solution.value.detach()
    residual = (f(value) - value).norm(dim=1).detach()
    assert bool((residual <= 1.001e-6 * f(value).norm(dim=1)).all())
    torch.testing.assert_close(solution.residual, residual, rtol=1e-6, atol=1e-12)


@named(IFT(), JFB(), Neumann(), SHINE(), Phantom(), Reversible(), Unrolled())
@pytest.mark.parametrize("recorded", [True, False])
def test_a_value_never_shares_the_memory_of_the_start(grad, recorded):
    w = weight().detach().requires_grad_(recorded)

    def f(z):
        return torch.tanh(z @ w.T + X)

    with torch.no_grad():
        start = fixed_point(f, ZERO, stop=TIGHT).value
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()
    value = fixed_point(f, start, grad=grad, solver=solver).value
    before = value.detach().clone()
    start.zero_()
    assert torch.equal(value.detach(), before)


class Late(nn.Module):
    """A layer that reads its context from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(weight().detach())
        self.context = X

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.context)


@pytest.mark.parametrize(
    ("grad", "twice"),
    [(IFT(), True), (Unrolled(checkpoint=True), False), (Reversible(), False)],
    ids=lambda g: type(g).__name__,
)
@pytest.mark.parametrize("change", ["attribute", "buffer", "weight"])
def test_a_map_that_changes_before_the_backward_pass_is_refused(grad, twice, change):
    f = Late()
    f.context = X.clone()
    value = fixed_point(f, ZERO, grad=grad).value
    with torch.no_grad():
        if change == "attribute":
            f.context = X + 1
        elif change == "buffer":
            f.context.add_(1)
        else:
            f.w.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"args|modified by an inplace"):
        torch.autograd.grad(value.sum(), f.w, create_graph=twice)


@pytest.mark.parametrize("grad", [IFT(), JFB(5), Phantom(), Neumann(), SHINE(), Unrolled()], ids=repr)
def test_a_map_that_changes_does_no_harm_where_it_is_not_evaluated_again(grad):
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def slope(change):
        f = Late()
        value = fixed_point(f, ZERO, grad=grad, solver=solver).value
        f.context = f.context + change
        return torch.autograd.grad(value.sum(), f.w)[0]

    assert torch.equal(slope(0.0), slope(1.0))


def test_a_map_that_changes_inside_a_transform_is_refused():
    f = Late()

    def loss(w):
        f.context = X
        value = fixed_point(lambda z: torch.tanh(z @ w.T + f.context), ZERO).value
        f.context = X + 1
        return value.sum()

    with pytest.raises(RuntimeError, match="args"):
        torch.func.grad(loss)(weight().detach())


@named(IFT(), Neumann(60), SHINE(refine=3), JFB(5))
def test_a_checkpoint_around_a_solve_repeats_it_once(grad):
    calls = [0]
    w = weight()
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def solve(x):
        def f(z):
            calls[0] += 1
            return torch.tanh(z @ w.T + x)

        return fixed_point(f, ZERO, grad=grad, solver=solver).value

    x = X.clone().requires_grad_()
    plain = torch.autograd.grad(solve(x).sum(), (x, w))
    calls[0] = 0
    value = checkpoint(solve, x, use_reentrant=False)
    forward, calls[0] = calls[0], 0
    packed = torch.autograd.grad(value.sum(), (x, w))
    assert calls[0] <= forward + 1
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b)


@named(IFT(), Neumann(60), JFB(60), SHINE(refine=60), Unrolled())
def test_jacobian_of_many_cotangents_at_once(grad):
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def solve(x):
        return fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, x, grad=grad, solver=solver).value

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(solve, X, vectorize=True), jacobian(solve, X))


def test_reversible_refuses_many_cotangents_at_once():
    value = fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, X.clone().requires_grad_(), grad=Reversible()).value
    with pytest.raises(NotImplementedError, match="vectorize"):
        torch.autograd.functional.jacobian(
            lambda x: fixed_point(lambda z, x: torch.tanh(0.5 * z + x), ZERO, x, grad=Reversible()).value,
            X,
            vectorize=True,
        )
    assert value.requires_grad


@named(IFT(), JFB(), Neumann(), Phantom(), SHINE())
def test_a_learned_start_without_a_gradient_warns(grad):
    w, start = weight(), nn.Parameter(torch.zeros(1, 5, dtype=F64))
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def f(z):
        return torch.tanh(z @ w.T + X)

    with pytest.warns(RuntimeWarning, match="z0"):
        fixed_point(f, start.expand(3, 5), grad=grad, solver=solver)
    fixed_point(f, start.detach().expand(3, 5), grad=grad, solver=solver)  # no warning


@named(Unrolled(), Reversible())
def test_a_learned_start_with_a_gradient(grad):
    start = nn.Parameter(torch.zeros(3, 5, dtype=F64))
    w = weight()
    stop = Stop(rtol=0, atol=0, max_evals=5)
    fixed_point(lambda z: torch.tanh(z @ w.T + X), start, grad=grad, stop=stop).value.sum().backward()
    assert start.grad is not None and start.grad.norm() > 0


def test_a_random_budget_gives_way_in_evaluation_mode():
    deq = DEQ(Late(), grad=StochasticJFB()).eval()
    with torch.no_grad():
        first, second = deq(ZERO).check(), deq(ZERO).check()
    assert torch.equal(first.value, second.value)


@named(IFT(), JFB(), Neumann(), Phantom(), SHINE(), Reversible(), Unrolled(), Unrolled(checkpoint=True))
def test_spectral_norm_in_training_mode_is_one_map_a_solve(grad):
    """The layer of the README: one step of the power iteration a solve, and claims that hold for the frozen weight."""
    solver = Broyden() if isinstance(grad, SHINE) else Anderson()
    for seed in range(3):
        torch.manual_seed(seed)
        layer = spectral_norm(nn.Linear(16, 16))
        x = torch.randn(8, 16)
        parametrization: Any = layer.parametrizations
        solution = fixed_point(
            lambda z, x, layer=layer: torch.tanh(layer(z)) * 0.9 + x,
            torch.zeros(8, 16),
            x,
            grad=grad,
            solver=solver,
            stop=Stop(rtol=1e-5, max_evals=200),
        ).check()
        solution.value.sum().backward()
        assert parametrization.weight.original.grad.norm() > 0
        layer.eval()  # the weight as it was after that one step
        with torch.no_grad():
            residual = (torch.tanh(layer(solution.value)) * 0.9 + x - solution.value).norm(dim=1)
        assert bool((residual <= 1.1 * (1e-6 + 1e-5 * solution.value.norm(dim=1))).all())
