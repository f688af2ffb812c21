"""Products of the linear solve of `IFT`, compared with TorchDEQ and solvers of fixed points."""

import pytest
import torch

from implicit import IFT, Anderson, AndersonGS, Broyden, Stop, fixed_point
from tests.layers import F64, dense_gradient, dense_solution, flat, layer, off


class Counted(torch.autograd.Function):
    """Identity that counts the products pulled through it."""

    count = 0

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, *grads):
        Counted.count += 1
        return grads[0]


def products(solve, f, x, g, start):
    """Products v^T J of one backward pass, and the gradient."""
    x = x.detach().requires_grad_()
    z = solve(lambda z: Counted.apply(f(z, x)), start)
    Counted.count = 0
    got = flat(torch.autograd.grad((z * g).sum(), (*f.parameters(), x)))
    return Counted.count - 1, got  # the last one goes to the parameters


def torchdeq_ift(b_solver, tolerance):
    torchdeq = pytest.importorskip("torchdeq")
    deq = torchdeq.get_deq(
        ift=True,
        f_solver="fixed_point_iter",
        f_max_iter=2,
        b_solver=b_solver,
        b_max_iter=300,
        b_tol=tolerance,
        b_stop_mode="rel",
    )
    return lambda f, z0: deq(f, z0)[0][-1]


def ours(solver, tolerance):
    grad = IFT(solver=solver, stop=Stop(rtol=tolerance, atol=0, max_evals=300), on_failure="ignore")
    return lambda f, z0: fixed_point(f, z0, grad=grad, stop=Stop(rtol=1e-6)).value


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
def test_no_peer_needs_fewer_products_for_the_same_accuracy(name):
    """The fewest products that give the gradient to 1e-5 in float32, whatever tolerance that takes."""
    f, x = layer(name, torch.float32)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64).float()
    truth, start = dense_gradient(f, x, g), dense_solution(f, x).float()

    def fewest(make, solver):
        runs = [products(make(solver, tol), f, x, g, start) for tol in (3e-5, 1e-5, 3e-6)]
        return min((n for n, got in runs if off(got, truth) <= 1e-5), default=1000)

    best = fewest(ours, None)
    peers = {s: fewest(torchdeq_ift, s) for s in ("anderson", "broyden")}
    own = {s: fewest(ours, s) for s in (Anderson(10), AndersonGS(), Broyden())}
    assert 5 < best <= min([*peers.values(), *own.values()]), (best, peers, own)
    assert min(peers.values()) < 1000
