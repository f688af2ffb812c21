"""Options of a solve: reading seldom or late, compaction, warm starts, callbacks, traces."""

from typing import Any

import pytest
import torch

from implicit import DEQ, IFT, SHINE, Anderson, AndersonGS, Broyden, Picard, Stop, Unrolled, fixed_point
from implicit.testing import problem
from tests.helpers import F64, half, solve
from tests.helpers import each_solver as each

# ---- reading seldom, or late


@each
@pytest.mark.parametrize("options", [{"check_every": 3}, {"late": True}])
def test_reading_seldom_or_late_changes_no_answer(solver, options):
    p = problem("tanh layers")
    tol: dict[str, Any] = dict(rtol=1e-8, atol=0.0, max_evals=80)
    now = solve(p, p.z0, *p.args, solver=solver, stop=Stop(**tol))
    then = solve(p, p.z0, *p.args, solver=solver, stop=Stop(**tol, **options))
    assert then.converged.all() and (p.residual(then.value) <= 1.01e-8).all()
    assert ((then.evals - now.evals) >= 0).all()
    assert int((then.evals - now.evals).max()) <= 2


# ---- compaction


@each
def test_compaction_gives_the_same_answer_and_wastes_nothing(solver):
    p, q = problem("one hard of 16"), problem("one hard of 16")
    stop = Stop(rtol=1e-7, atol=0, max_evals=250)
    whole = solve(p, p.z0, *p.args, solver=solver, stop=stop)
    small = solve(q, q.z0, *q.args, solver=solver, stop=stop, compact=True)
    torch.testing.assert_close(small.value, whole.value, rtol=1e-5, atol=1e-6)
    assert q.samples == int(small.evals.sum()) < p.samples == 16 * p.calls
    assert int((small.evals - whole.evals).abs().max()) <= 3


def test_compaction_cuts_only_the_flagged_args():
    b = torch.tensor([[1.0], [1e6], [1.0]])
    rate = torch.tensor([[0.9], [0.1], [0.0]])
    table = torch.ones(3, 3) * 0.5

    def f(z, rate, b, table):
        assert table.shape == (3, 3) and len(rate) == len(b) == len(z)
        return rate * z + b

    stop = Stop(rtol=1e-6, max_evals=300)
    found = solve(f, torch.zeros(3, 3), rate, b, table, solver=Picard(), stop=stop, compact=(True, True, False))
    torch.testing.assert_close(found.value, (b / (1 - rate)).expand(3, 3), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="compact"):
        solve(f, torch.zeros(3, 3), rate, b, table, compact=(True,))


def test_compaction_is_differentiable():
    p = problem("tanh layers")
    grads = []
    for compact in (False, True):
        x = p.args[0].clone().requires_grad_()
        stop = Stop(rtol=1e-11, atol=0, max_evals=99)
        value = fixed_point(p, p.z0, x, grad=Unrolled(), solver=Picard(), stop=stop, compact=compact).value
        grads.append(torch.autograd.grad(value.sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)


# ---- warm starts, callbacks, traces


@pytest.mark.parametrize("solver", [Anderson(8), AndersonGS(), Broyden(60)], ids=lambda s: type(s).__name__)
def test_a_warm_memory_helps_and_is_not_written_to(solver):
    p = problem("adaLN block")
    stop = Stop(rtol=1e-6, atol=0, max_evals=200)
    first = solve(p, p.z0, *p.args, solver=solver, stop=stop, keep_state=True)
    a, b = p.args[0], (p.args[0] + 0.01, p.args[1])
    before = [t.clone() for t in _tensors(first.state)]
    warm = solve(p, first.value, *b, solver=solver, stop=stop, state=first.state)
    cold = solve(p, first.value, *b, solver=solver, stop=stop)
    assert int(warm.evals.sum()) < int(cold.evals.sum())
    assert all(torch.equal(x, y) for x, y in zip(before, _tensors(first.state), strict=True))
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-2, atol=1e-2)
    assert a is p.args[0] and warm.state is None


def _tensors(thing):
    from implicit.pytree import map_tensors

    found = []
    map_tensors(lambda t: found.append(t) or t, thing)
    return found


def test_a_memory_that_does_not_fit_is_refused():
    kept = solve(half, torch.zeros(2, 3), solver=Broyden(), keep_state=True).state
    for stop in (Stop(rtol=1e-4), Stop(rtol=0, max_evals=3)):
        for graph in (True, False):
            for grad, solver, other in (
                (SHINE(), Broyden(), object()),
                (SHINE(), AndersonGS(), kept),
                (IFT(), AndersonGS(), kept),
                (IFT(), Picard(), kept),
            ):
                with torch.set_grad_enabled(graph), pytest.raises(ValueError, match="state"):
                    fixed_point(half, torch.zeros(2, 3), solver=solver, grad=grad, stop=stop, state=other)
    for z0, solver in (
        (torch.zeros(2, 4), Broyden()),
        (torch.zeros(3, 3), Broyden()),
        (torch.zeros(2, 3), Anderson()),
    ):
        with pytest.raises(ValueError, match="state"):
            solve(half, z0, solver=solver, state=kept)
    with pytest.raises(ValueError, match="5"):
        solve(half, torch.zeros(2, 3), solver=Broyden(5), state=kept)


def test_trace_and_callback_tell_the_same_story():
    p, seen = problem("tanh layers"), []
    found = solve(p, p.z0, *p.args, trace=True, callback=lambda n, r: seen.append((n, r)))
    assert [n for n, _ in seen] == list(range(1, p.calls + 1))
    assert found.trace is not None
    torch.testing.assert_close(torch.stack([r for _, r in seen]), found.trace.to(F64), equal_nan=True)
    last = found.evals - 1
    torch.testing.assert_close(found.trace[last, torch.arange(len(last))], found.residual)


def test_progress_draws_a_bar(capsys):
    solve(half, torch.zeros(2, 3), progress=True)
    assert "eval" in capsys.readouterr().err


def test_a_layer_takes_the_same_options():
    p = problem("one hard of 16")
    seen = []
    layer = DEQ(p, stop=Stop(rtol=1e-6, atol=0, max_evals=99))
    with torch.no_grad():
        found = layer(p.z0, *p.args, compact=True, callback=lambda n, r: seen.append(n), trace=True)
    assert found.converged.all() and len(seen) == len(found.trace)
