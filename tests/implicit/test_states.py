"""Forms of the state, the budget, and tensors of the caller, for every solver."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit import (
    DEQ,
    IFT,
    JFB,
    Anderson,
    Broyden,
    NewtonKrylov,
    Picard,
    Reversible,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.evaluation import FlatMap
from implicit.pytree import Layout
from implicit.testing import problem
from tests.helpers import ESTIMATORS, each_estimator, half, solve
from tests.helpers import each_solver as each

F64 = torch.float64


@each
@pytest.mark.parametrize("budget", [1, 2, 3, 20])
def test_every_solver_counts_alike(solver, budget):
    """The budget is the number of calls of f: no hidden first one, no placeholder in the trace."""
    p = problem("linear 0.99")
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-15, atol=0, max_evals=budget), trace=True)
    assert p.calls == budget and (found.evals == budget).all()
    assert found.trace is not None
    torch.testing.assert_close(found.trace[0], (p.map(p.z0, *p.args) - p.z0).norm(dim=1))
    assert found.trace.shape == (budget, 4)
    q = problem("linear 0.99")
    fixed = solve(q, q.z0, *q.args, solver=solver, stop=Stop(rtol=0, atol=0, max_evals=budget))
    assert q.calls == budget and (fixed.evals == budget).all()


@each
def test_dtypes_of_a_mixed_state_are_kept(solver):
    """Concatenation promotes; every leaf must come back as it went in, and f must see it so."""
    z0 = {
        "double": torch.zeros(2, 3, dtype=F64),
        "pair": (torch.zeros(2, 2, 2), torch.zeros(2, 1, dtype=torch.bfloat16)),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
    }
    kinds = (F64, torch.float32, torch.bfloat16, torch.complex64)

    def f(z):
        a, (b, c), d = z["double"], z["pair"], z["complex"]
        assert (a.dtype, b.dtype, c.dtype, d.dtype) == kinds
        return {"complex": 0.5 * d + (1 + 2j), "pair": (0.5 * b + 1, 0.5 * c + 1), "double": 0.5 * a.cos()}

    found = solve(f, z0, solver=solver, stop=Stop(rtol=1e-2, atol=0, max_evals=60)).check()
    a, (b, c), d = found.value["double"], found.value["pair"], found.value["complex"]
    assert (a.dtype, b.dtype, c.dtype, d.dtype) == kinds and list(found.value) == list(z0)
    torch.testing.assert_close(d, torch.full_like(d, 2 + 4j), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(a, torch.full_like(a, 0.4501836), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("grad", [IFT(), JFB(), Unrolled(), Reversible()], ids=lambda g: type(g).__name__)
def test_a_tuple_of_different_dtypes_has_gradients(grad):
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    z0 = (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 2, dtype=torch.float32))

    def f(z, x):
        return 0.3 * z[0] + x, 0.2 * z[1] + x[:, :2].float()

    a, b = fixed_point(f, z0, x, grad=grad, solver=Picard(), stop=Stop(rtol=1e-6, atol=0)).value
    (got,) = torch.autograd.grad(a.sum() + b.sum(), x)
    true = torch.full_like(x, 1 / 0.7)
    true[:, :2] += 1 / 0.8
    exact = not isinstance(grad, JFB)
    torch.testing.assert_close(
        got, true if exact else torch.tensor([[2.0, 2, 1]], dtype=F64).expand(2, 3), rtol=1e-4, atol=0
    )


@each
def test_one_number_a_sample(solver):
    z0 = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    found = solve(torch.cos, z0, solver=solver, stop=Stop(rtol=1e-8, max_evals=99))
    expected = torch.full((3, 1), 0.7390851332151607, dtype=F64)
    torch.testing.assert_close(found.check().value, expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="batch_dims"):  # a vector may be one system or three
        solve(torch.cos, z0[:, 0], solver=solver)


@each
def test_leaves_with_different_batch_sizes_are_one_system_or_an_error(solver):
    z0 = (torch.zeros(2, 3), torch.zeros(5))
    found = solve(lambda z: (0.5 * z[0] + 1, 0.1 * z[1] + 1), z0, solver=solver, batch_dims=0, stop=Stop(max_evals=99))
    assert found.check().value[1].shape == (5,)
    with pytest.raises(ValueError, match="batch_dims"):
        solve(lambda z: z, z0, solver=solver)


@each
def test_a_map_that_writes_in_place_is_refused(solver):
    """z and f(z) would be one tensor and the residual 0."""
    buffer = torch.zeros(2, 3)

    def into_a_buffer(z):
        return torch.mul(z, 0.5, out=buffer).add_(1)

    def into_a_view(z):
        z[:, 0] = 1
        return 0.5 * z

    for f in (into_a_buffer, into_a_view, lambda z: z.add_(1)):
        for stop in (Stop(), Stop(rtol=0, atol=0, max_evals=9)):
            with pytest.raises((ValueError, RuntimeError)) as refused:
                solve(f, torch.zeros(2, 3), solver=solver, stop=stop)
            assert refused.type is RuntimeError or refused.match(r"^f\b")  # torch's own, in a jvp


@each
@pytest.mark.parametrize(("count", "inference"), [(2, False), (3, False), (2, True)])
def test_a_map_that_alternates_between_buffers_is_refused(solver, count, inference):
    """The best iterate of a sample without a fixed point would be overwritten, and its residual be another one's."""
    matrix = torch.tensor([[0.0, -1.2], [1.2, 0.0]])
    for stop in (Stop(max_evals=25), Stop(rtol=0, atol=0, max_evals=25)):
        with torch.inference_mode(inference):
            buffers, calls = [torch.zeros(2, 2) for _ in range(count)], itertools.count()

            def into_the_next_buffer(z, buffers=buffers, calls=calls):
                return buffers[next(calls) % count].copy_(z.cos() @ matrix + 2 * z.abs().sqrt())

            if inference and isinstance(solver, NewtonKrylov):
                found = solve(into_the_next_buffer, torch.ones(2, 2), solver=solver, stop=Stop(max_evals=25))
                z = found.value.clone()  # a jvp writes no inference tensor
                torch.testing.assert_close(found.residual, (into_the_next_buffer(z) - z).norm(dim=1))
                continue
            with pytest.raises((ValueError, RuntimeError)) as refused:
                solve(into_the_next_buffer, torch.ones(2, 2), solver=solver, stop=stop)
            assert refused.type is RuntimeError or refused.match(r"^f\b")  # torch's own, in a jvp


@each
def test_tensors_that_a_map_keeps_and_does_not_write_are_no_error(solver):
    c, kept = torch.ones(2, 3), []
    calls = torch.zeros(())

    def f(z):
        calls.add_(1)  # of f's own
        kept.append(half(z))
        return kept[-1]

    assert solve(f, torch.zeros(2, 3), solver=solver).converged.all() and len(kept) == int(calls)
    assert solve(lambda z: c, torch.zeros(2, 3), solver=solver).converged.all()


def test_checks_for_writes_take_no_operator():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    f = FlatMap(lambda z: 0.5 * z + 1, (), Layout.of(torch.ones(2, 3)), budget=9)
    with Count():
        z = torch.ones(2, 3)
        for _ in range(9):
            z = f(z)
    assert Count.calls == 1 + 9 * 2


@each
def test_the_callers_tensors_are_left_as_they_were(solver):
    z0 = torch.full((3, 4), 0.25)
    for keep in (lambda z: z, lambda z: z[:, :], lambda z: z.view(3, 4)):
        found = solve(lambda z, keep=keep: keep(half(z)), z0, solver=solver, stop=Stop(rtol=1e-6))
        assert torch.equal(z0, torch.full((3, 4), 0.25)) and found.value.data_ptr() != z0.data_ptr()


def test_settings_are_frozen_and_misspelt_ones_refused():
    options: list[tuple[Any, dict[str, Any]]] = [
        (Stop, {"rtoll": 1e-3}),
        (Anderson, {"m": 5}),
        (Broyden, {"max_iter": 3}),
        (IFT, {"solvr": Picard()}),
        (lambda **options: fixed_point(half, torch.zeros(1, 2), **options), {"f_toll": 1e-3}),
        (lambda **options: DEQ(half, **options), {"tol": 1e-3}),
        (lambda **options: DEQ(half)(torch.zeros(1, 2), **options), {"tol": 1e-3}),
    ]
    for make, misspelt in options:
        with pytest.raises(TypeError, match=next(iter(misspelt))):
            make(**misspelt)
    for thing, name in ((Stop(), "rtol"), (Anderson(), "memory"), (IFT(), "stop")):
        with pytest.raises(AttributeError):
            setattr(thing, name, None)


@each_estimator
@pytest.mark.parametrize("stop", [Stop(), Stop(rtol=0, max_evals=2)], ids=["rtol", "count"])
def test_the_value_shares_no_memory_with_arguments_that_f_returns(estimator, stop):
    z0, x = torch.ones(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64)
    for f in (lambda z, x: z, lambda z, x: x, lambda z, x: x[:1].expand(2, 3)):
        value = fixed_point(f, z0, x, solver=Broyden(), grad=ESTIMATORS[estimator](), stop=stop).value
        assert value.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in (z0, x)}


@each_estimator
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("turn", [1, -1])
def test_complex_numbers_beside_an_odd_number_of_real_ones(estimator, batch_dims, turn):
    w = torch.ones(3, dtype=F64, requires_grad=True)
    z0 = (torch.zeros(1, 3, dtype=torch.complex128), torch.zeros(1, 1, dtype=F64))[::turn]

    def f(state):
        a, b = state[::turn]
        return (0.3 * a * w + (0.5 + 0.2j), 0.5 * b + a.real.sum(1, keepdim=True))[::turn]

    value = fixed_point(f, z0, solver=Broyden(), grad=ESTIMATORS[estimator](), batch_dims=batch_dims).value[::turn]
    value[1].sum().backward()
    assert w.grad is not None and w.grad.isfinite().all() and value[0].isfinite().all()
