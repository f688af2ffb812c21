"""A second output of f, a user's stopping test and a fold over evaluations, over all solvers and estimators: honored,
or refused by name.
"""

import pytest
import torch
from torch import nn

from implicit import (
    DEQ,
    NotConverged,
    Picard,
    Result,
    Stop,
    Unrolled,
    fixed_point,
)
from tests.helpers import F64, FREE, each_estimator, each_solver, half, smooth, solve, solver_and

TIGHT = Stop(rtol=1e-10, max_evals=200)


def layer():
    """(f with a second output, z0, w)."""
    w = (
        0.5 * torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    ).requires_grad_()

    def f(z):
        out = torch.tanh(z @ w) + 0.3
        return out, {"energy": (z * out).sum(dim=1) * w.sum()}

    return f, torch.zeros(3, 6, dtype=F64), w


# ---- has_aux


@each_solver
def test_aux_belongs_to_the_value_returned(solver):
    f, z0, _ = layer()
    found = solve(f, z0, solver=solver, has_aux=True, stop=TIGHT)
    plain = solve(lambda z: f(z)[0], z0, solver=solver, stop=TIGHT)
    assert torch.equal(found.value, plain.value)
    assert torch.equal(found.aux["energy"], f(found.value)[1]["energy"])
    assert found.evals.tolist() == (plain.evals + 1).tolist()
    assert plain.aux is None


@each_estimator
def test_aux_has_the_graph_of_the_estimator(estimator):
    f, z0, w = layer()
    found = fixed_point(f, z0, **solver_and(estimator), has_aux=True, stop=TIGHT)
    (through,) = torch.autograd.grad(found.aux["energy"].sum(), w, retain_graph=True)
    assert torch.isfinite(through).all()
    plain = fixed_point(lambda z: f(z)[0], z0, **solver_and(estimator), stop=TIGHT)
    (same,) = torch.autograd.grad(f(plain.value)[1]["energy"].sum(), w)
    torch.testing.assert_close(through, same)


def test_the_gradient_of_aux_is_exact_with_ift():
    f, z0, w = layer()

    def energy(w):
        g = lambda z: torch.tanh(z @ w) + 0.3  # noqa: E731
        z = z0
        for _ in range(200):
            z = g(z)
        return ((z * g(z)).sum(dim=1) * w.sum()).sum()

    (exact,) = torch.autograd.grad(energy(w), w)
    found = fixed_point(f, z0, has_aux=True, stop=Stop(rtol=1e-13, max_evals=200))
    (ours,) = torch.autograd.grad(found.aux["energy"].sum(), w)
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-9)


def test_aux_inside_torch_func():
    z0 = torch.zeros(3, 6, dtype=F64)

    def total(w):
        found = fixed_point(lambda z: (torch.tanh(z @ w) + 0.3, z.sum(dim=1)), z0, has_aux=True, stop=TIGHT)
        return found.aux.sum() + found.value.sum()

    w = layer()[2].detach()
    slope = torch.func.grad(total)(w)
    w.requires_grad_()
    (same,) = torch.autograd.grad(total(w), w)
    torch.testing.assert_close(slope, same)


@pytest.mark.parametrize("bad", [lambda z: 0.5 * z, lambda z: (z, z, z), lambda z: [0.5 * z, 1]])
def test_an_f_without_a_second_output_is_refused(bad):
    with pytest.raises(ValueError, match="has_aux"):
        solve(bad, torch.ones(2, 3), has_aux=True)


def test_a_layer_returns_value_and_aux():
    class Both(nn.Module):
        def forward(self, z):
            return half(z), z.sum(dim=1)

    value, aux = DEQ(Both(), has_aux=True, return_value=True)(torch.zeros(2, 3))
    torch.testing.assert_close(aux, value.sum(dim=1))
    assert DEQ(Both(), has_aux=True)(torch.zeros(2, 3)).aux.shape == (2,)
    assert "has_aux" in repr(DEQ(Both(), has_aux=True))


# ---- Stop(when=...)


@each_solver
def test_a_users_test_ends_a_sample_and_not_its_mates(solver):
    f, z0 = smooth()
    first = torch.tensor([True, False, False])
    stop = Stop(rtol=1e-10, max_evals=200, when=lambda z, fz: (z - fz).norm(dim=1).lt(1e-2) & first)
    found = solve(f, z0, solver=solver, stop=stop)
    assert found.result.tolist() == [Result.STOPPED, Result.CONVERGED, Result.CONVERGED]
    assert 0 < float(found.residual[0]) < 1e-2
    torch.testing.assert_close((f(found.value) - found.value).norm(dim=1)[0], found.residual[0])
    assert int(found.evals[0]) < int(found.evals[1])
    alone = solve(f, z0, solver=solver, stop=Stop(rtol=1e-10, max_evals=200))
    assert torch.equal(found.value[1:], alone.value[1:])
    assert found.check() is found
    assert found.converged.tolist() == [False, True, True]


@each_estimator
def test_a_users_test_with_every_estimator(estimator):
    f, z0, w = layer()
    stop = Stop(rtol=1e-10, max_evals=200, when=lambda z, fz: (z - fz).norm(dim=1) < 1e-2)
    how = dict(**solver_and(estimator), stop=stop)
    if estimator in ("Reversible", "StochasticJFB"):
        with pytest.raises(ValueError, match="when"):
            fixed_point(lambda z: f(z)[0], z0, **how)
        return
    found = fixed_point(lambda z: f(z)[0], z0, **how)
    assert found.result.tolist() == [Result.STOPPED] * 3
    assert torch.isfinite(torch.autograd.grad(found.value.sum(), w)[0]).all()


def test_a_users_test_alone_without_a_tolerance():
    stop = Stop(**FREE, max_evals=30, when=lambda z, fz: fz[:, 0] > 1.9)
    found = solve(half, torch.zeros(2, 3), solver=Picard(), stop=stop)
    assert found.result.tolist() == [Result.STOPPED] * 2
    assert found.evals.tolist() == [5, 5]
    assert found.value[0, 0] == 1.875


def test_a_residual_within_the_tolerance_is_converged_whatever_the_users_test():
    found = solve(half, torch.full((2, 3), 2.0), stop=Stop(when=lambda z, fz: z[:, 0] > 0))
    assert found.result.tolist() == [Result.CONVERGED] * 2


@pytest.mark.parametrize("stop", [dict(late=True), dict(check_every=3), dict(norm="leaf")])
def test_a_users_test_with_the_other_options(stop):
    calls = []

    def when(z, fz):
        calls.append(z["a"].requires_grad)
        return (z["a"] - fz["a"]).norm(dim=1) < 1e-2

    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 2)}
    f = lambda z: {"a": half(z["a"]), "b": half(z["b"])}  # noqa: E731
    found = solve(f, z0, solver=Picard(), stop=Stop(rtol=1e-6, when=when, **stop))
    assert found.result.tolist() == [Result.STOPPED] * 2
    assert calls and not any(calls)


def test_a_users_test_with_compaction_and_with_coupled_samples():
    z0 = smooth()[1]
    bias = torch.tensor([[0.0], [0.1], [0.2]], dtype=F64)
    stop = Stop(rtol=1e-12, when=lambda z, fz: (z - fz).norm(dim=1) < 1e-3)
    found = solve(lambda z, b: 0.5 * torch.cos(z) + b, z0, bias, compact=True, stop=stop)
    assert found.result.tolist() == [Result.STOPPED] * 3
    stop = Stop(rtol=1e-12, when=lambda z, fz: (z - fz).norm().lt(1e-3).reshape(1))
    whole = solve(lambda z: 0.5 * torch.cos(z) + z.mean() / 9, z0, batch_dims=0, stop=stop)
    assert whole.result.tolist() == [Result.STOPPED]


def test_a_users_test_inside_torch_func():
    stop = Stop(rtol=1e-12, max_evals=99, when=lambda z, fz: (z - fz).norm(dim=1) < 1e-6)

    def total(a):
        return fixed_point(lambda z: a * torch.cos(z), torch.ones(2, 3, dtype=F64), stop=stop).value.sum()

    a = torch.tensor(0.5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(
        torch.func.grad(total)(a.detach()), torch.autograd.grad(total(a), a)[0], rtol=1e-4, atol=0
    )
    values = torch.func.vmap(total)(torch.tensor([0.5, 0.6], dtype=F64))
    torch.testing.assert_close(values[0], total(a.detach()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [lambda z, fz: z[:, 0], lambda z, fz: True, lambda z, fz: z > 0])
def test_a_users_test_of_another_form_is_refused(bad):
    with pytest.raises(ValueError, match="when"):
        solve(half, torch.zeros(2, 3), stop=Stop(when=bad))
    with pytest.raises(TypeError, match="when"):
        Stop(when=3)  # pyright: ignore[reportArgumentType]


def test_a_sample_that_fails_beside_a_stopped_one_is_reported():
    def when(z, fz):
        return torch.arange(2) == 0

    found = solve(lambda z: 3 * z + 1, torch.ones(2, 3), solver=Picard(), stop=Stop(max_evals=5, when=when))
    with pytest.raises(NotConverged, match=r"\b1\b.*\b2\b"):
        found.check()


# ---- trace=function


def every_state(states, z, fz):
    return [*(states or []), (z, fz)]


@each_solver
@pytest.mark.parametrize("stop", [Stop(rtol=1e-8, max_evals=100), Stop(**FREE, max_evals=7)], ids=["rtol", "count"])
def test_the_fold_sees_every_evaluation_of_the_solve(solver, stop):
    f, z0 = smooth()
    seen = []

    def watched(z):
        seen.append(z.clone())
        return f(z)

    found = solve(watched, z0, solver=solver, stop=stop, trace=every_state)
    states = found.trace
    assert len(states) == int(found.evals.max())
    for (z, fz), at in zip(states, seen, strict=False):
        assert torch.equal(z, at) and torch.equal(fz, f(z))
    again = solve(f, z0, solver=solver, stop=stop)
    assert torch.equal(found.value, again.value)


def test_a_loss_on_every_iterate_has_the_gradient_of_the_loop():
    f, z0, w = layer()

    def running(total, z, fz):
        return (0 if total is None else total) + fz.square().sum()

    for stop in (Stop(**FREE, max_evals=4), Stop(rtol=1e-30, max_evals=4)):
        found = fixed_point(lambda z: f(z)[0], z0, solver=Picard(), grad=Unrolled(), stop=stop, trace=running)
        (ours,) = torch.autograd.grad(found.trace, w)
        z, loss = z0, 0
        for _ in range(4):
            z = f(z)[0]
            loss = loss + z.square().sum()
        (same,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(ours, same)


@each_estimator
def test_states_of_a_solve_without_a_graph_are_detached(estimator):
    f, z0, _ = layer()
    how = dict(**solver_and(estimator), stop=TIGHT, trace=every_state)
    if estimator == "Reversible":
        with pytest.raises(ValueError, match="trace"):
            fixed_point(lambda z: f(z)[0], z0, **how)
        return
    found = fixed_point(lambda z: f(z)[0], z0, **how)
    if found.trace is None:  # no iteration was drawn
        assert estimator == "StochasticJFB"
        return
    assert all(fz.requires_grad == estimator.startswith("Unrolled") for _, fz in found.trace)


def test_a_fold_is_refused_where_it_cannot_be_right():
    with pytest.raises(ValueError, match="compact"):
        solve(half, torch.zeros(2, 3), trace=every_state, compact=True)
    with pytest.raises(ValueError, match="trace"):
        fixed_point(half, torch.zeros(2, 3), grad=Unrolled(checkpoint=2), stop=Stop(**FREE), trace=every_state)
    with pytest.raises(NotImplementedError, match="trace"):
        torch.func.grad(lambda a: fixed_point(lambda z: a * z, torch.ones(2, 3), trace=every_state).value.sum())(
            torch.tensor(0.5)
        )
