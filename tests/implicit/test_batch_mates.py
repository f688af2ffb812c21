"""At one batch size the answer of a sample has the same bits whatever the other samples are."""

import pytest
import torch

from implicit import Multisecant, Stop, Unrolled, fixed_point
from implicit.torch_internals import transforms_active
from tests.helpers import F64, SOLVERS, each_solver, solve


@each_solver
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_mates_change_no_bit_at_one_batch_size(solver, dtype):
    rng = torch.Generator().manual_seed(1)
    w = 0.9 * torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=F64))[0].to(dtype)
    x = torch.randn(8, 5, generator=rng, dtype=F64).to(dtype)

    def f(z, x):
        return torch.tanh((z.unsqueeze(1) * w).sum(2)) + x  # no matrix product: its rounding may depend on the batch

    stop = Stop(rtol=1e-5, max_evals=100)
    plain = solve(f, torch.zeros_like(x), x, solver=solver, stop=stop)
    for mates in (torch.nan, 0.0, 1e3):
        y = x.clone()
        y[::2] = mates
        found = solve(f, torch.zeros_like(x), y, solver=solver, stop=stop)
        assert torch.equal(found.value[1::2], plain.value[1::2]) and torch.equal(found.evals[1::2], plain.evals[1::2])
        assert torch.equal(found.residual[1::2], plain.residual[1::2])


@each_solver
@pytest.mark.parametrize("reading", [{"check_every": 3}, {"late": True}, {"late": True, "check_every": 2}], ids=str)
def test_mates_whose_f_is_nan_on_the_way_do_not_change_when_a_sample_is_read(solver, reading):
    x = torch.linspace(0.3, 2, 12, dtype=F64).reshape(3, 4)

    def path(mate):
        def f(z):
            return torch.cat((torch.sin(0.9 * z[:3]) + 0.6 * z[:3].roll(1, 1) + x, mate(z[3:])))

        stop = Stop(rtol=1e-9, max_evals=60, **reading)
        return solve(f, torch.zeros(6, 4, dtype=F64), solver=solver, stop=stop)

    calm = path(lambda z: 0.5 * torch.cos(z) + 1)
    for edge in (1.5, 2.5, 4.0):
        nan = path(lambda z, edge=edge: torch.where(z.abs().amax(1, keepdim=True) > edge, torch.nan, 1.3 * z + 0.4))
        assert torch.equal(nan.value[:3], calm.value[:3]) and torch.equal(nan.evals[:3], calm.evals[:3])
        assert torch.equal(nan.residual[:3], calm.residual[:3]) and torch.equal(nan.result[:3], calm.result[:3])


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver.differentiable], ids=repr)
@pytest.mark.parametrize("max_evals", [3, 4, 8])
def test_mates_change_no_bit_of_the_gradient_of_the_iterations(solver, max_evals):
    """Mates that end in the first evaluation, or fail, are left out from then on; those of the other batch run."""
    rng = torch.Generator().manual_seed(7)
    w, x = torch.randn(8, 40, 40, generator=rng) * 0.2, torch.randn(8, 40, generator=rng)
    ended = torch.arange(8)[:, None] % 2 == 1

    def slope(mate):
        b = x.clone().requires_grad_()

        def f(z):
            image = torch.tanh((w * z.unsqueeze(1)).sum(2) + b) + 0.2 * b - 0.1 * z
            return image if mate is None else torch.where(ended, mate, image)

        stop = Stop(rtol=1e-5, max_evals=max_evals)
        value = fixed_point(f, torch.zeros(8, 40), solver=solver, grad=Unrolled(), stop=stop).value
        return torch.autograd.grad(value[::2].square().sum(), b)[0][::2]

    running = slope(None)
    assert torch.equal(slope(0.0), running) and torch.equal(slope(torch.nan), running)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s.differentiable], ids=repr)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_mates_that_are_reset_change_no_bit_of_the_gradient_of_the_iterations(solver, checkpoint):
    """A reset adds nodes to the graphs of all samples; the terms of a gradient must be summed in the same order."""

    def slope(seed, wall):
        rng = torch.Generator().manual_seed(seed)
        w, b = (torch.randn(*size, generator=rng, dtype=F64) for size in ((5, 5), (3, 5)))
        b.requires_grad_()

        def f(z):
            own = torch.sin((0.7 * w * z.unsqueeze(1)).sum(2)) * z.cos() + b
            return torch.cat((own[:2], torch.where(z > wall, 1e9 * z, z + 1)[2:]))

        stop, grad = Stop(rtol=1e-12, max_evals=9), Unrolled(checkpoint=checkpoint)
        value = fixed_point(f, torch.zeros(3, 5, dtype=F64), solver=solver, grad=grad, stop=stop).value
        return torch.autograd.grad(value[:2].square().sum(), b)[0][:2]

    for seed in range(3):
        running = slope(seed, torch.inf)
        assert all(torch.equal(slope(seed, wall), running) for wall in (2, 3, 5))


MATES = {
    "gain": lambda z: z + torch.exp(-z.clamp(min=-50)),  # in every evaluation, so that residuals are read the quick way
    "stand still": lambda z: z + 1,
    "fail": lambda z: z * torch.nan,
    "end": lambda z: 0.5 * z + 1,
}


@each_solver
@pytest.mark.parametrize("wall", [1e9, torch.nan])
def test_mates_change_no_step_of_a_sample_that_is_reset(solver, wall):
    """Samples run into a wall again and again: when they are reset, and how their steps are shortened, is their own."""
    edges = torch.tensor([[2.0], [3.3], [4.0]], dtype=F64)

    def path(mate):
        def f(z):
            inside = z[:3] + 1 / (1 + z[:3].square())
            return torch.cat((torch.where(z[:3] > edges, wall, inside), MATES[mate](z[3:])))

        z0 = torch.zeros(4, 1, dtype=F64)
        with torch.no_grad():
            return solve(
                f, z0, solver=solver, stop=Stop(rtol=1e-9, max_evals=60), trace=lambda c, z, _: [*(c or []), z]
            )

    found = [path(mate) for mate in MATES]
    for other in found[1:]:
        assert torch.equal(other.value[:3], found[0].value[:3]) and torch.equal(other.result[:3], found[0].result[:3])
        steps = zip(found[0].trace, other.trace, strict=False)
        assert all(torch.equal(a[:3].nan_to_num(), b[:3].nan_to_num()) for a, b in steps)


def test_newton_steps_of_mates_leave_attention_its_kernel():
    """A Jacobian-vector product takes another kernel, which rounds otherwise; one repeat a step replaces its value."""
    products = repeats = 0

    def path(mate):
        beside = False

        def f(z):
            nonlocal beside, products, repeats
            repeats, beside = repeats + beside, transforms_active()
            products += beside
            attended = torch.nn.functional.scaled_dot_product_attention(z, z, z)
            return torch.cat(((torch.sin(3 * z) + attended)[:1], mate(z[1:])))

        with torch.no_grad():
            z0 = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(0))
            stop = Stop(rtol=1e-9, max_evals=40)
            return solve(f, z0, solver=Multisecant(), stop=stop, trace=lambda carry, z, _: [*(carry or []), z])

    failing = path(lambda z: torch.where(z.abs().amax() > 2, 1e9 * z, z + 1 / (1 + z.square())))
    ending = path(lambda z: 0.5 * z + 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(failing.trace, ending.trace, strict=False))
    assert 1 < products == repeats and int(failing.evals.max()) <= 40 + products + 3


def test_a_mate_that_is_reset_leaves_plain_steps_as_they_are():
    """The default solver's first steps are plain as long as they gain more and more, which each sample shows alone."""

    def path(mate):
        def f(z):
            return torch.cat((0.3 * z[:1] + 0.5 * torch.sin(z[:1]) + 1, mate(z[1:])))

        with torch.no_grad():
            z0, stop = torch.linspace(0, 1, 8, dtype=F64).reshape(2, 4), Stop(rtol=1e-10, max_evals=40)
            return solve(f, z0, solver=Multisecant(), stop=stop).value[0]

    plain = path(lambda z: z + 1)
    for reset in range(2, 8):  # the evaluation at which the mate runs into a wall
        assert torch.equal(plain, path(lambda z, edge=reset: torch.where(z > edge, 1e9 * z, z + 1)))
