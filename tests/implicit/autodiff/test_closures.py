"""Closure conversion finds every tensor that f uses, or raises; a map that has changed since the solve raises too."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from implicit import IFT, JFB, Phantom, Reversible, StochasticJFB, Stop, Unrolled, fixed_point
from tests.helpers import F64

TIGHT = Stop(rtol=1e-11, max_evals=300)
N, B = 6, 4
RNG = torch.Generator().manual_seed(0)
W = 0.3 * torch.randn(N, N, generator=RNG, dtype=F64)
X = torch.randn(B, N, generator=RNG, dtype=F64)


def value(f, **kwargs):
    return fixed_point(f, torch.zeros(B, N, dtype=F64), stop=kwargs.pop("stop", TIGHT), **kwargs).value


def plain(w):
    return lambda z: torch.tanh(z @ w.T + X)


def mapped(w):
    return lambda z: torch.func.vmap(lambda row, x: torch.tanh(w @ row + x))(z, X)


def mapped_over_weights(w):
    """vmap takes a tensor that f closes over as its argument, one row of the transposed weight a number."""
    return lambda z: torch.tanh(torch.func.vmap(lambda column: z @ column, out_dims=1)(w) + X)


def energy_gradient(w):
    """grad inside f, with the weight as an argument that is not differentiated."""
    slope = torch.func.grad(lambda z, w: torch.log(torch.cosh(z @ w.T + X)).sum())
    return lambda z: torch.tanh(z @ w.T + X) + 0 * slope(z, w)


GRID = torch.linspace(0.0, 1.0, N, dtype=F64)


def slope_of_a_constant(w):
    """grad inside f with respect to a constant that f closes over: d/dx (x^2 / 2) = x."""
    return lambda z: torch.tanh(z @ w.T + X + torch.func.grad(lambda x: 0.5 * x.pow(2).sum())(GRID) - GRID)


def by_index(w):
    """Integers that are made within the transform."""
    turned = torch.arange(N).flip(0)
    return lambda z: torch.tanh(z[:, turned] @ w[:, turned].T + X)


def by_pullback(w):
    """The function that torch.func.vjp returns is called when its transform has ended: z^T d(u w)/du = z w^T."""

    def f(z):
        pull = torch.func.vjp(lambda u: torch.log(torch.exp(u)) @ w, z)[1]  # saves intermediate tensors
        return torch.tanh(pull(z)[0] + X)

    return f


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z, w):
        return z @ w.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        (g,), (z, w) = grads, ctx.saved_tensors
        return g @ w, g.T @ z

    @staticmethod
    def jvp(ctx, *tangents):
        (dz, dw), (z, w) = tangents, ctx.saved_for_forward
        return dz @ w.T + z @ dw.T


def by_custom_function(w):
    return lambda z: torch.tanh(Product.apply(z, w) + X)


compiled_block = torch.compile(lambda z, w: torch.tanh(z @ w.T + X), backend="eager")


def compiled(w):
    return lambda z: compiled_block(z, w)


@torch.jit.script
def script(z: torch.Tensor, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(z @ w.t() + x)


def loss(make, **kwargs):
    return lambda w: value(make(w), **kwargs).pow(3).sum()


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": lambda g: torch.func.jacrev(g),
    "jacfwd": lambda g: torch.func.jacfwd(g),
    "vmap of grad": lambda g: lambda w: torch.func.vmap(torch.func.grad(g))(torch.stack((w, 0.5 * w))),
    "hessian": lambda g: torch.func.jacfwd(torch.func.grad(lambda s: g(s * W))),
}


@pytest.mark.filterwarnings("ignore:.*You are using torch.load|ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", [mapped, slope_of_a_constant, by_index, by_pullback, by_custom_function, compiled])
def test_what_f_uses_out_of_sight_is_found_by_every_transform(make, transform):
    at = torch.tensor(1.0, dtype=F64) if transform == "hessian" else W
    found, expected = (TRANSFORMS[transform](loss(g))(at) for g in (make, plain))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("make", [mapped, mapped_over_weights, energy_gradient, by_custom_function, compiled])
def test_what_f_uses_out_of_sight_has_first_and_second_derivatives(make):
    def both(make):
        w = W.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(make)(w), w, create_graph=True)
        return first.detach(), torch.autograd.grad(first.pow(2).sum(), w)[0]

    torch.testing.assert_close(both(make), both(plain), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("through_args", [True, False])
@pytest.mark.parametrize("estimator", [IFT(), JFB()])
def test_integers_may_be_mapped(estimator, through_args):
    """Per-sample gradients with an index a sample."""
    orders = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(3)])

    def loss(w, order):
        args = (order,) if through_args else ()
        z0 = torch.zeros(B, N, dtype=F64)

        def f(z, i=order):
            return torch.tanh(z[:, i] @ w.T + X)

        return fixed_point(f, z0, *args, stop=TIGHT, grad=estimator).value.pow(3).sum()

    expected = torch.stack([torch.autograd.functional.jacobian(lambda w, i=i: loss(w, i), W) for i in orders])
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(W, orders)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    moved = torch.func.vmap(lambda i: torch.func.jvp(lambda w: loss(w, i), (W,), (W,))[1])(orders)
    torch.testing.assert_close(moved, (expected * W).sum((1, 2)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_statistics_of_an_ensemble_are_mapped_without_a_derivative(transform):
    """The mean of BatchNorm, of which PyTorch has no derivative."""
    weights, means = torch.stack((W, 0.5 * W)), torch.stack((X[0], X[1]))

    def slope(w, mean):
        def normalized(y):
            return torch.nn.functional.batch_norm(y, mean, torch.ones_like(mean))

        scaled = loss(lambda c: lambda z: torch.tanh(normalized(z @ (c * w).T) + X))
        return transform(scaled)(torch.tensor(1.0, dtype=F64))

    expected = torch.stack([slope(w, mean) for w, mean in zip(weights, means, strict=True)])
    torch.testing.assert_close(torch.func.vmap(slope)(weights, means), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("estimator", [IFT(), JFB()])
@pytest.mark.parametrize("make", [mapped_over_weights, energy_gradient])
def test_a_transform_inside_f_of_a_closed_over_tensor_works_through_args(make, estimator):
    def through_args(w):
        z0 = torch.zeros(B, N, dtype=F64)
        return fixed_point(lambda z, w: make(w)(z), z0, w, stop=TIGHT, grad=estimator).value.pow(3).sum()

    with pytest.raises(NotImplementedError, match="args"):
        torch.func.grad(loss(make, grad=estimator))(W)
    expected = torch.func.grad(loss(plain, grad=estimator))(W)
    torch.testing.assert_close(torch.func.grad(through_args)(W), expected, rtol=1e-8, atol=1e-9)


def test_torchscript_is_refused_inside_transforms_where_a_gradient_would_be_lost():
    exact = torch.func.grad(loss(plain))(W)
    with pytest.raises(RuntimeError, match="args"):
        torch.func.grad(loss(lambda w: lambda z: script(z, w, X)))(W)
    with pytest.raises(RuntimeError, match="args"):  # an operator that is seen comes after the one that is not
        torch.func.grad(loss(lambda w: lambda z: script(z, w, X) * 1.0))(W)
    through_args = torch.func.grad(
        lambda w: fixed_point(lambda z, w: script(z, w, X), torch.zeros_like(X), w, stop=TIGHT).value.pow(3).sum()
    )(W)
    torch.testing.assert_close(through_args, exact, rtol=1e-8, atol=0)
    w = W.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(lambda w: lambda z: script(z, w, X))(w), w)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=0)


def test_a_weight_that_is_used_at_the_solution_alone_is_refused_inside_transforms():
    """Its gradient would be lost, since the closure is traced at the start."""
    at_start = torch.zeros(N, dtype=F64)

    def make(w):
        return lambda z: torch.tanh(X + (z @ w.T if bool((z != 0).any()) else at_start))

    with pytest.raises(RuntimeError, match="args"):
        torch.func.grad(loss(make))(W)


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


BY_TRANSFORM = {"IFT": IFT(), "JFB": JFB(2), "Phantom": Phantom(), "Unrolled": Unrolled(), "no free steps": None}


@pytest.mark.parametrize("estimator", BY_TRANSFORM)
@pytest.mark.parametrize("transform", [torch.func.grad, lambda g: lambda w: torch.func.jvp(g, (w,), (w,))])
def test_what_another_thread_makes_is_refused_inside_transforms(transform, estimator):
    """No transform reaches into another thread, so that its derivative would be 0 without a word."""
    makes = (
        lambda w: lambda z: torch.tanh(z @ in_another_thread(lambda: 1.0 * w).T + X),
        lambda w: lambda z: torch.tanh(0.5 * z @ in_another_thread(w.clone).T + 0.5 * z @ w.T + X),
        lambda w: lambda z: in_another_thread(lambda: torch.tanh(z @ w.T + X)),
    )
    grad = BY_TRANSFORM[estimator] or StochasticJFB(N=0, M=2, generator=torch.Generator().manual_seed(0))
    for make in makes:
        with pytest.raises(RuntimeError, match="thread"):
            transform(loss(make, grad=grad, stop=Stop(rtol=0, max_evals=3)))(W)


def test_constants_that_f_makes_out_of_sight_are_no_work_of_another_thread():
    array, other = X.numpy().copy(), torch.jit.script(torch.nn.Tanh())

    def make(w):
        return lambda z: torch.tanh(
            z @ w.T + torch.from_numpy(array.copy()) + 0 * other(z) * torch.nn.Parameter(X, False)
        )

    torch.testing.assert_close(torch.func.grad(loss(make))(W), torch.func.grad(loss(plain))(W), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm", ["euclidean", "rms", "max"])
@pytest.mark.parametrize("stop", [dict(rtol=1e-4), dict(rtol=0, atol=0, max_evals=4)])
def test_every_norm_and_a_fixed_count_have_a_gradient_inside_transforms(norm, stop):
    stop = Stop(norm=norm, **stop)
    w = W.clone().requires_grad_()
    (outside,) = torch.autograd.grad(loss(plain, stop=stop)(w), w)
    torch.testing.assert_close(torch.func.grad(loss(plain, stop=stop))(W), outside, rtol=1e-6, atol=1e-9)


# -- a map that has changed: f(0) = 0 before and after, only the Jacobian tells

CHANGES = ["a buffer", "a weight of the closure", "a tensor of the closure"]
CHECKPOINTS = {
    "Reversible": Reversible(),
    "Unrolled, checkpointed": Unrolled(checkpoint=True),
    "Unrolled, in segments": Unrolled(checkpoint=2),
}


def changed_before_backward(change, estimator, create_graph=False, by_transform=False):
    """The gradient through f(z) = c tanh(z w) from z0 = 0, where f is changed between the solve and its backward."""
    w = torch.full((1, 3), 0.5, dtype=F64)
    box = {"c": torch.full((1, 3), 0.7, dtype=F64)}
    z0 = torch.zeros(2, 3, dtype=F64)

    def total(w, x):
        stop = Stop(rtol=0, max_evals=6) if estimator == Unrolled(checkpoint=2) else TIGHT
        return fixed_point(lambda z: box["c"] * torch.tanh(z * w) + x, z0, grad=estimator, stop=stop).value.sum()

    x = torch.zeros(2, 3, dtype=F64)
    if by_transform:
        pull = torch.func.vjp(total, w, x)[1]
    else:
        x, w = x.requires_grad_(), w.requires_grad_()
        out = total(w, x)
        pull = lambda g: torch.autograd.grad(out, (w, x), g, create_graph=create_graph)  # noqa: E731
    if change == "a buffer":
        box["c"].mul_(0.5)
    else:
        box["c"] = torch.full((1, 3), 0.1, dtype=F64, requires_grad=change == "a weight of the closure")
    return pull(torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize(
    ("case", "change"),
    [(case, change) for case in ("create_graph", "transform") for change in CHANGES]
    + [(case, change) for case in CHECKPOINTS for change in CHANGES],
)
def test_a_map_that_changed_is_refused_even_where_its_value_did_not(case, change):
    estimator = CHECKPOINTS.get(case, IFT())
    with pytest.raises(RuntimeError):
        changed_before_backward(change, estimator, case == "create_graph", case == "transform")


def test_a_map_that_writes_its_own_buffers_or_makes_tensors_out_of_sight_is_no_changed_map():
    import numpy as np

    norm, array = torch.nn.BatchNorm1d(N, dtype=F64), X.numpy()

    def make(w):
        def f(z):
            norm(z.detach() + 1)  # its running statistics are written, at every evaluation
            return torch.tanh(z @ w.T + torch.from_numpy(np.array(array)))

        return f

    w = W.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(make)(w), w, create_graph=True)
    torch.testing.assert_close(first, torch.func.grad(loss(plain))(W), rtol=1e-8, atol=1e-9)
    for estimator in CHECKPOINTS.values():
        torch.autograd.grad(loss(make, grad=estimator, stop=Stop(rtol=0, max_evals=9))(w), w)


# -- compilation


@pytest.mark.parametrize("order", [1, 2])
def test_no_compilation_after_the_first_step(order):
    torch.compiler.reset()
    calls = []

    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    block = torch.compile(torch.nn.Linear(N, N, dtype=F64), backend=backend)
    made = []
    for _ in range(4):
        x = X.clone().requires_grad_()
        z = fixed_point(lambda z: torch.tanh(0.5 * block(z) + x), torch.zeros_like(X), stop=TIGHT).value  # noqa: B023
        (first,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad(first.pow(2).sum(), x)
        made.append(len(calls))
    assert made[0] >= 1 and made[-1] == made[0], made


def test_the_estimator_of_one_step_needs_no_tracing():
    found = torch.func.grad(loss(lambda w: lambda z: script(z, w, X), grad=JFB()))(W)
    torch.testing.assert_close(found, torch.func.grad(loss(plain, grad=JFB()))(W), rtol=1e-8, atol=0)
