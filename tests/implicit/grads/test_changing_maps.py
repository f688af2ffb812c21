"""Maps that change between the solve and the backward pass, or with every evaluation."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    Broyden,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    Stop,
    Unrolled,
    fixed_point,
)
from tests.implicit.grads.tanh_layer import ZERO, Late, X, named, weight


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
    with pytest.raises(RuntimeError, match=r"args|inplace"):
        torch.autograd.grad(value.sum(), f.w, create_graph=twice)


RECORDED = [IFT(), JFB(), JFB(3), Phantom(), Neumann(), SHINE()]  # these record f for the first time at the solution


@pytest.mark.parametrize("grad", RECORDED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["euclidean", "leaf"])
@pytest.mark.parametrize("way", ["gradient mode", "last call"])
def test_a_map_that_is_another_where_autograd_records_it_is_refused(grad, dtype, norm, way):
    calls, most = 0, 10**9
    w, x = torch.full((4,), 0.5).to(dtype).requires_grad_(), torch.linspace(0, 1, 12).reshape(3, 4).to(dtype)

    def f(state, x):
        nonlocal calls
        calls += 1
        z, y = state
        other = calls > most or (way == "gradient mode" and torch.is_grad_enabled())
        return torch.cos(w * z + x) - 0.5 * other, 0.3 * y + w.detach()

    def run():
        stop = Stop(rtol=1e-3 if dtype != torch.bfloat16 else 0.02, norm=norm)
        return fixed_point(f, (torch.zeros_like(x), torch.zeros_like(x)), x, solver=Broyden(), grad=grad, stop=stop)

    if way == "last call":
        assert run().converged.all()
        calls, most = 0, calls - getattr(grad, "steps", 1)
    with pytest.raises(RuntimeError, match="is_grad_enabled"):
        run()


def coupled(z, w):
    return 0.5 * torch.tanh(z * w + z.mean(0)) + 0.1


def attended(z, w):
    return 0.5 * nn.functional.scaled_dot_product_attention(z * w, z, z) + torch.cos(3 * z)


@pytest.mark.parametrize("grad", RECORDED, ids=repr)
@pytest.mark.parametrize(
    "f",
    [
        lambda z, w: nn.functional.dropout(torch.tanh(z * w) + 1, 0.1),  # converges by chance in a small state
        lambda z, w: torch.tanh(z * w) + 1 + 1e-3 * torch.rand_like(z),
        lambda z, w: 1e4 * (z * w).cos() - 1e4 + torch.sin(z),  # large terms cancel; does not converge
        lambda z, w: torch.where(z > 1, torch.nan, z * w + 0.7),
        lambda z, w: z * w,  # the fixed point is zero
        coupled,
        attended,
    ],
    ids=["dropout", "noise", "cancellation", "failed", "zero", "coupled", "attention"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.filterwarnings("ignore:f takes one sample", "ignore:The linear solve")
def test_noise_rounding_and_unconverged_values_are_no_other_map(grad, f, dtype):
    calls, own = 0, torch.float32 if dtype == "autocast" else dtype
    w = torch.full((), 0.6).to(own).requires_grad_()

    def counted(z):
        nonlocal calls
        calls += 1
        return f(z, w).to(z.dtype)

    for shape, rtol in (((1, 1, 1, 1), 1e-3), ((3, 1, 2, 4), 1e-5)):
        for seed in range(12 if shape[0] == 1 else 2):
            torch.manual_seed(seed)
            calls, z0 = 0, torch.linspace(0.1, 0.9, 24)[: torch.Size(shape).numel()].reshape(shape).to(own)
            with torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else nullcontext():
                found = fixed_point(counted, z0, solver=Broyden(), grad=grad, stop=Stop(rtol=rtol, max_evals=30))
            assert int(found.evals.max()) == calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("grad", [IFT(), Unrolled(checkpoint=True), Reversible()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_that_changes_is_noticed_in_half_precision(grad, dtype, sign):
    """None: under autocast to bfloat16. The map itself may be evaluated again."""
    factor = 1
    w = (0.3 * torch.eye(8)).to(dtype or torch.float32).requires_grad_()
    x = torch.linspace(-1, 1, 8)[None].to(w.dtype)

    def f(z):
        return factor * torch.tanh(z @ w + x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
        found = fixed_point(f, torch.zeros_like(x), grad=grad, stop=Stop(rtol=1e-2, max_evals=15))
    loss = found.value.float().sum()
    factor = sign
    if sign > 0:
        assert torch.autograd.grad(loss, w, create_graph=isinstance(grad, IFT))[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="args"):
            torch.autograd.grad(loss, w, create_graph=isinstance(grad, IFT))


@pytest.mark.parametrize("grad", [IFT(), JFB(5), Phantom(), Neumann(), SHINE(), Unrolled()], ids=repr)
def test_a_map_that_changes_does_no_harm_where_it_is_not_evaluated_again(grad):
    solver = Broyden() if isinstance(grad, SHINE) else AndersonGS()

    def slope(change):
        f = Late()
        value = fixed_point(f, ZERO, grad=grad, solver=solver).value
        f.context = f.context + change
        return torch.autograd.grad(value.sum(), f.w)[0]

    assert torch.equal(slope(0.0), slope(1.0))


class Damped(nn.Module):
    """(1 - damping) z + damping tanh(z w + x): one fixed point for every damping, and one value there."""

    def __init__(self):
        super().__init__()
        self.w, self.damping = nn.Parameter(weight().detach().double()), 1.0

    def forward(self, z):
        return (1 - self.damping) * z + self.damping * torch.tanh(z @ self.w.T + X.double())


def test_a_damping_that_changes_before_a_second_derivative_is_refused():
    f = Damped()
    value = fixed_point(f, ZERO.double(), stop=Stop(rtol=1e-13, max_evals=200)).value
    f.damping = 0.5
    with pytest.raises(RuntimeError, match="args"):
        torch.autograd.grad(value.sum(), f.w, create_graph=True)


@pytest.mark.parametrize("grad", [IFT(), Neumann(9), SHINE(refine=3)], ids=repr)
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_a_damping_that_changes_under_hooks_on_saved_tensors_is_refused(grad, damping):
    f = Damped()
    stop = Stop(rtol=1e-13, max_evals=200)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        value = fixed_point(f, ZERO.double(), grad=grad, solver=Broyden(), stop=stop).value
    f.damping = damping
    for inputs in (None, (f.w,)):  # the engine comes to the state in a backward pass to all leaves alone
        with nullcontext() if damping == 1 else pytest.raises(RuntimeError, match="args"):
            value.sum().backward(retain_graph=True, inputs=inputs)


@pytest.mark.parametrize("way", ["create_graph", "hooks", "transform", "Reversible"])
def test_a_change_of_a_small_tensor_is_seen_beside_a_large_one(way):
    share = 0.5
    b = torch.ones(2, 3)

    def loss(b):
        def f(z):
            return {"large": 0.5 * z["large"] + 1e7, "small": share * torch.tanh(z["small"] + b)}

        z0 = {"large": torch.zeros(2, 3), "small": torch.zeros(2, 3)}
        grad = Reversible() if way == "Reversible" else IFT()
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
        with hooks if way == "hooks" else nullcontext():
            return fixed_point(f, z0, grad=grad, stop=Stop(rtol=1e-5, norm="leaf")).value["small"].sum()

    if way == "transform":
        pull = torch.func.vjp(loss, b)[1]
    else:
        pull = partial(torch.autograd.grad, loss(b.requires_grad_()), b, create_graph=way == "create_graph")
    share = 0.25
    with pytest.raises(RuntimeError, match="args"):
        pull(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("way", "grad"),
    [
        *(("hooks", grad) for grad in (IFT(), Neumann(3), SHINE(), Reversible(), JFB(4), Phantom(4, 0.0), Unrolled())),
        *(("transform", grad) for grad in (IFT(), JFB(4), Phantom(4, 0.0), Unrolled())),
    ],
    ids=repr,
)
def test_a_write_that_pytorch_does_not_count_is_as_in_a_plain_loop(way, grad):
    """An estimator that evaluates f again refuses it; another one has the gradient of four plain evaluations."""
    count = Stop(rtol=0, atol=0, max_evals=1 if isinstance(grad, JFB | Phantom) else 4)
    solver = Broyden() if isinstance(grad, SHINE) else Picard()

    def slope(solve):
        w = weight().detach()

        def loss(x):
            return solve(lambda z: torch.tanh(z @ w.T + x))

        if way == "transform":
            pull = torch.func.vjp(loss, X)[1]
        else:
            x = X.clone().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                pull = partial(torch.autograd.grad, loss(x), x)
        w.mul_(0.5)
        return pull(torch.tensor(1.0, dtype=ZERO.dtype))[0]

    def plain(f):
        z = ZERO if count.max_evals == 4 else f(ZERO).detach()
        for _ in range(4):
            z = f(z)
        return z.sum()

    def solved(f):
        return fixed_point(f, ZERO, grad=grad, solver=solver, stop=count).value.sum()

    if isinstance(grad, JFB | Phantom | Unrolled):
        torch.testing.assert_close(slope(solved), slope(plain))
    else:
        with pytest.raises(RuntimeError, match="args"):
            slope(solved)


@pytest.mark.parametrize("large", [1.0, 1e2, 1e8])
def test_a_change_of_small_entries_is_seen_above_rounding_of_the_largest(large):
    share = 0.5
    b = torch.ones(2, 3, requires_grad=True)
    scale = torch.tensor([large, 1.0, 1.0])

    def f(z):
        return torch.cat((0.5 * z[:, :1] + large, share * torch.tanh(z[:, 1:] + b[:, 1:])), dim=1)

    grad = Reversible(on_drift="ignore")
    value = fixed_point(f, torch.zeros(2, 3), grad=grad, stop=Stop(rtol=1e-5)).value / scale
    share = 0.25
    with pytest.raises(RuntimeError, match="args") if large < 1e8 else nullcontext():
        torch.autograd.grad(value.sum(), b)


def test_a_map_that_changes_inside_a_transform_is_refused():
    f = Late()

    def loss(w):
        f.context = X
        value = fixed_point(lambda z: torch.tanh(z @ w.T + f.context), ZERO).value
        f.context = X + 1
        return value.sum()

    with pytest.raises(RuntimeError, match="args"):
        torch.func.grad(loss)(weight().detach())


class Switched(nn.Module):
    """tanh(z w^T + b) with a flag that changes its derivatives, and not its value."""

    def __init__(self, change: str, w: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.w, self.b, self.change, self.flag = w, b, change, False

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        change = self.change if self.flag else ""
        w = self.w.detach() if change == "detached" else self.w
        with torch.set_grad_enabled(torch.is_grad_enabled() and change != "no_grad"):
            b = 1.0 * self.b
        b = 2 * b - b.detach() if change == "scaled" else b
        out = torch.tanh(z @ w.T + b)
        return out + 0.4 * (z - z.detach()) if change == "state" else out


def solve_and_switch(change, w, b, when=True):
    f = Switched(change, w, b)
    value = fixed_point(f, ZERO, stop=Stop(rtol=1e-11, max_evals=200)).value
    f.flag = when
    return value, f


def second_in_time(change, w, b):
    """The map changes between the first derivative and the second."""
    value, f = solve_and_switch(change, w.requires_grad_(), b.requires_grad_(), when=False)
    found = torch.autograd.grad(value.sum(), (w, b), create_graph=True)
    f.flag = True
    torch.autograd.grad(sum(t.square().sum() for t in found), (w, b), create_graph=True)


def penalty(change, w, b):
    """A derivative inside a transform, whose own derivative is taken after the transform has ended."""
    w = w.requires_grad_()
    maps = []

    def loss(b):
        value, f = solve_and_switch(change, w, b, when=False)
        maps.append(f)
        return value.sum()

    found = torch.func.grad(loss)(b)
    maps[0].flag = True
    found.square().sum().backward()


def mapped_backward(change, w, b):
    w, b = w.requires_grad_(), b.requires_grad_()
    torch.func.vmap(lambda b: solve_and_switch(change, w, b)[0])(torch.stack((b, -b))).sum().backward()


def value_of(change):
    return lambda w, b: solve_and_switch(change, w, b)[0]


def total(change):
    return lambda w, b: value_of(change)(w, b).sum()


WAYS = {
    "create_graph": lambda change, w, b: torch.autograd.grad(
        value_of(change)(w.requires_grad_(), b.requires_grad_()).sum(), (w, b), create_graph=True, allow_unused=True
    ),
    "second": second_in_time,
    "penalty": penalty,
    "vmap": mapped_backward,
    "vjp": lambda change, w, b: torch.func.vjp(value_of(change), w, b)[1](ZERO + 1),
    "jacrev": lambda change, w, b: torch.func.jacrev(value_of(change), argnums=(0, 1))(w, b),
    "mapped grad": lambda change, w, b: torch.func.vmap(torch.func.grad(total(change), argnums=(0, 1)))(
        torch.stack((w, -w)), torch.stack((b, b))
    ),
}


# outside of torch.func J is compared, and on which tensors f depends, but no factor of a gradient of theirs
OUTSIDE = ("create_graph", "second")
CHANGES = ["nothing", "detached", "no_grad", "state", "scaled"]


@pytest.mark.parametrize(
    ("way", "change"), [(w, c) for w in WAYS for c in CHANGES if w not in OUTSIDE or c != "scaled"]
)
def test_a_change_of_the_derivatives_alone_is_refused(way, change):
    """A weight is frozen or used under no_grad, a gradient is scaled: the value of f is the same."""
    with nullcontext() if change == "nothing" else pytest.raises(RuntimeError, match="args"):
        WAYS[way](change, weight().detach(), X.clone())


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
