import pytest
import torch
from torch import nn

from implicit import IFT, Stop, fixed_point
from implicit.diagnostics import jacobian_penalty
from tests.layers import dense_solution, jacobian, layer

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["easy", "adaln"])
def test_the_mean_over_probes_is_the_dense_norm(name):
    f, x = layer(name)
    z = dense_solution(f, x)
    with torch.no_grad():
        found = jacobian_penalty(f, z, x, generator=rng(), probes=2000)
    dense = jacobian(f, z, x).square().sum(dim=(1, 2)) / z[0].numel()
    torch.testing.assert_close(found, dense, rtol=0.05, atol=0)
    assert not found.requires_grad


def test_a_diagonal_map_is_exact_with_one_probe():
    d = torch.tensor([0.5, -2.0, 0.0], dtype=F64, requires_grad=True)
    penalty = jacobian_penalty(lambda z: z * d, torch.ones(2, 3, dtype=F64), generator=rng())
    assert penalty.tolist() == pytest.approx([4.25 / 3] * 2)
    (gradient,) = torch.autograd.grad(penalty.sum(), d)
    torch.testing.assert_close(gradient, 4 * d.detach() / 3)  # sum over two samples of 2 d / 3


def test_the_gradient_is_right_to_second_order():
    """By finite differences in the weights, the input and the point."""
    generator = rng()
    w = (0.4 * torch.randn(4, 4, generator=generator, dtype=F64)).requires_grad_()
    x, z = (torch.randn(2, 4, generator=generator, dtype=F64).requires_grad_() for _ in range(2))

    def penalty(w, x, z):
        return jacobian_penalty(lambda z, x: torch.tanh(z @ w + x), z, x, generator=rng(1), probes=2)

    assert torch.autograd.gradcheck(penalty, (w, x, z))
    assert torch.autograd.gradgradcheck(penalty, (w, x, z))


def test_through_the_equilibrium():
    """d/dw of the penalty at z*(w), against differences of dense solves."""
    generator = rng()
    w = (0.2 * torch.randn(4, 4, generator=generator, dtype=F64)).requires_grad_()
    x = torch.randn(2, 4, generator=generator, dtype=F64)
    tight = Stop(rtol=1e-13, atol=0, max_evals=200)

    def penalty(w):
        def f(z):
            return torch.tanh(z @ w + x)

        z = fixed_point(f, torch.zeros_like(x), grad=IFT(stop=tight, on_failure="ignore"), stop=tight).value
        return jacobian_penalty(f, z, generator=rng(1))

    assert torch.autograd.gradcheck(penalty, (w,))


def test_attention_can_be_trained_with_it():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for i, p in enumerate(attention.parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=rng(i)))

    def f(z):
        q, k, v = (z @ attention.in_proj_weight.T).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    z = torch.randn(2, 5, 8, generator=rng(9))
    penalty = jacobian_penalty(f, z, generator=rng()).mean()
    (gradient,) = torch.autograd.grad(penalty, attention.in_proj_weight)
    assert gradient.isfinite().all() and gradient.norm() > 0


def test_training_on_it_lowers_the_norm():
    f, x = layer("hard")
    optimizer = torch.optim.SGD(f.parameters(), lr=1.0)
    z, generator = dense_solution(f, x), rng()
    before = jacobian(f, z, x).square().sum().item()
    for _ in range(10):
        optimizer.zero_grad()
        jacobian_penalty(f, z, x, generator=generator).mean().backward()
        optimizer.step()
    assert jacobian(f, z, x).square().sum().item() < 0.8 * before


def test_the_generator_alone_decides_and_nothing_else_is_touched():
    f, x = layer("easy")
    z = torch.zeros_like(x)
    state = torch.get_rng_state()
    first, again, other = (jacobian_penalty(f, z, x, generator=rng(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state()) and not z.requires_grad
    assert all(p.grad is None for p in f.parameters())


def test_a_map_that_ignores_z_and_bad_arguments():
    b = torch.ones(2, 3, requires_grad=True)
    assert jacobian_penalty(lambda z: b * 2, torch.zeros(2, 3), generator=rng()).tolist() == [0, 0]
    with pytest.raises(ValueError, match="probes"):
        jacobian_penalty(torch.cos, torch.ones(1, 1), generator=rng(), probes=0)
