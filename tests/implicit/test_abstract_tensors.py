"""Solves of tensors without numbers: meta and fake tensors, exported graphs; and the memory of small states."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    Broyden,
    Multisecant,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.diagnostics.profiling import Bytes
from tests.helpers import SOLVERS

COUNT = Stop(rtol=0, max_evals=4)


class Layer(torch.nn.Module):
    def __init__(self, solver, grad=IFT()):
        super().__init__()
        self.linear, self.solver, self.grad = torch.nn.Linear(6, 6), solver, grad

    def forward(self, x):
        def f(z, x):
            return torch.tanh(0.5 * self.linear(z) + x)

        return fixed_point(f, torch.zeros_like(x), x, solver=self.solver, grad=self.grad, stop=COUNT).value


@pytest.mark.parametrize(
    ("solver", "grad"),
    [
        *((solver, IFT()) for solver in SOLVERS[1:]),
        *((AndersonGS(), grad) for grad in (JFB(), Neumann(), Phantom(), StochasticJFB(N=3, M=2))),
        *((solver, Unrolled()) for solver in SOLVERS[1:] if not isinstance(solver, NewtonKrylov)),
        *((solver, SHINE()) for solver in SOLVERS[1:] if not isinstance(solver, (Picard, NewtonKrylov))),
        (Picard(), Reversible()),
    ],
    ids=repr,
)
def test_a_fixed_count_and_its_backward_pass_need_no_numbers(solver, grad):
    layer = Layer(solver, grad).to("meta")
    value = layer(torch.zeros(4, 6, device="meta"))
    value.sum().backward()
    assert value.shape == (4, 6) and layer.linear.weight.grad is not None
    with FakeTensorMode():
        layer = Layer(solver, grad)
        layer(torch.zeros(4, 6)).sum().backward()
        assert layer.linear.weight.grad is not None and layer.linear.weight.grad.shape == (6, 6)


@pytest.mark.parametrize("grad", [IFT(), Reversible()], ids=repr)
def test_a_tolerance_without_numbers_is_refused_by_name(grad):
    with pytest.raises(ValueError, match="max_evals"):
        fixed_point(torch.cos, torch.zeros(2, 3, device="meta"), grad=grad)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), AndersonGS(), Broyden(), Multisecant()], ids=repr)
def test_an_exported_fixed_count_takes_any_batch_size(solver):
    """All but NewtonKrylov: the forward mode of its products fixes the size."""
    layer = Layer(solver)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=512)
        exported = torch.export.export(layer, (torch.randn(4, 6),), dynamic_shapes=({0: batch},), strict=False)
        for rows in (2, 9):
            x = torch.randn(rows, 6)
            torch.testing.assert_close(exported.module()(x), layer(x))


def test_newton_krylov_is_exported_with_one_batch_size_and_refused_with_a_dynamic_one():
    layer, x = Layer(NewtonKrylov()), torch.randn(4, 6)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=False)
        torch.testing.assert_close(exported.module()(2 * x), layer(2 * x))
        with pytest.raises(NotImplementedError, match="NewtonKrylov"):
            torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=False)


@pytest.mark.parametrize("solver", [NewtonKrylov(), AndersonGS()], ids=repr)
def test_memory_of_many_scalars_is_that_of_their_states(solver):
    x = torch.linspace(-1, 1, 30_000).unsqueeze(1)
    with Bytes() as bytes, torch.no_grad():
        fixed_point(lambda z: 0.9 * torch.tanh(2 * z) + x, torch.zeros_like(x), solver=solver, stop=Stop(max_evals=30))
    assert bytes.peak < 100 * 2**20


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("solver", [s for s in SOLVERS if not isinstance(s, NewtonKrylov)], ids=repr)
def test_a_fixed_count_is_traced_by_jit(solver):
    layer, x = Layer(solver, Unrolled()), torch.randn(4, 6)
    traced = torch.jit.trace(layer, torch.zeros(4, 6), check_trace=False)
    torch.testing.assert_close(traced(x), layer(x))
    weight = layer.linear.weight
    found, right = (torch.autograd.grad(f(x).sum(), weight)[0] for f in (traced, layer))
    torch.testing.assert_close(found, right)
    for grad in (IFT(), JFB(), Neumann(), Phantom(), Reversible()):
        layer = Layer(Picard() if isinstance(grad, Reversible) else solver, grad)
        with torch.no_grad():
            traced = torch.jit.trace(layer, torch.zeros(4, 6), check_trace=False)
            torch.testing.assert_close(traced(x), layer(x))
        with pytest.raises(NotImplementedError, match="no_grad"):
            torch.jit.trace(layer, x, check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_refuses_a_tolerance_and_jacobian_vector_products():
    with torch.no_grad():
        for solver in SOLVERS:
            with pytest.raises(NotImplementedError, match="rtol=0"):
                torch.jit.trace(lambda z, s=solver: fixed_point(torch.cos, z, solver=s).value, torch.zeros(2, 3))
        with pytest.raises(NotImplementedError, match="NewtonKrylov"):
            torch.jit.trace(Layer(NewtonKrylov()), torch.zeros(4, 6))
