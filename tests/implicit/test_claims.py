"""CONVERGED is true of the value returned, and `residual` is that value's, for every way to run a solve."""

import warnings

import pytest
import torch

from implicit import (
    IFT,
    JFB,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    NewtonKrylov,
    Picard,
    Result,
    Reversible,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.torch_internals import transforms_active
from tests.helpers import F64, each_solver, relative, solve

TIGHT = Stop(rtol=1e-6, max_evals=300)


def graph(nodes=12, width=4, seed=0):
    """Nodes of a graph as rows: a chain along which the first node's input travels."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.diag(torch.ones(nodes - 1, dtype=F64), -1)
    w = 0.8 * torch.linalg.qr(torch.randn(width, width, generator=rng, dtype=F64))[0]
    b = torch.zeros(nodes, width, dtype=F64)
    b[0] = 1
    return lambda z: a @ z @ w + b


@each_solver
def test_rows_that_reach_each_other_are_solved_as_one_system(solver):
    f, z0 = graph(), torch.zeros(12, 4, dtype=F64)
    with pytest.warns(RuntimeWarning, match="batch_dims=0"):
        found = solve(f, z0, solver=solver, stop=TIGHT)
    whole = solve(f, z0, solver=solver, stop=TIGHT, batch_dims=0)
    assert found.converged.all() and (relative(f, found.value) <= 1.01e-6).all()
    torch.testing.assert_close(found.residual, (f(found.value) - found.value).norm(dim=1))
    torch.testing.assert_close(found.value, whole.value, rtol=1e-5, atol=1e-6)
    assert int(found.evals.max()) <= 2 * int(whole.evals) + 20


@each_solver
def test_unrolled_returns_z_where_f_of_its_image_is_not_finite(solver):
    """f(0) = 3, and f is undefined there; the other row converges."""

    def f(z):
        return torch.where(z < 1, 0.5 * z + torch.tensor([[3.0], [0.25]]), torch.nan)

    found = solve(f, torch.zeros(2, 1), solver=solver, grad=Unrolled(), stop=Stop(rtol=1e-4, max_evals=40))
    torch.testing.assert_close(found.residual, (f(found.value) - found.value)[:, 0].abs())
    assert found.converged.tolist() == [False, True]


@pytest.mark.parametrize("estimator", [JFB(), Unrolled()], ids=repr)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_batch_norm_in_training_mode_makes_no_false_claim(estimator):
    for seed in range(3):
        torch.manual_seed(seed)
        lin, bn = torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16, track_running_stats=False)
        x = torch.randn(32, 16) * torch.linspace(0.01, 3, 32)[:, None]

        def f(z, lin=lin, bn=bn, x=x):
            return torch.tanh(bn(0.7 * lin(z) + x)) * 0.9

        found = fixed_point(f, torch.zeros(32, 16), grad=estimator, stop=Stop(rtol=1e-4, max_evals=200))
        with torch.no_grad():
            assert (relative(f, found.value)[found.converged] <= 1.01e-4).all()


@pytest.mark.filterwarnings("ignore:f takes one sample")
@pytest.mark.parametrize("stop", [{}, {"late": True}, {"check_every": 2}], ids=str)
@each_solver
def test_a_claim_beside_a_sample_that_fails_is_one_of_the_values_returned(solver, stop):
    """Row 0 sees row 1 through a tanh that saturates as row 1 overflows; the value of row 1 is its start."""

    def f(z):
        return torch.cat((0.1 * z[:1] + torch.tanh(z[1:] - 3) + 2, z[1:] ** 2 + 1.5))

    found = solve(f, torch.zeros(2, 1, dtype=F64), solver=solver, stop=Stop(rtol=1e-6, max_evals=40, **stop))
    assert (relative(f, found.value)[found.converged] <= 1.01e-6).all()


@each_solver
def test_a_weight_cut_by_compaction_is_no_answer(solver):
    """A bias whose length is the batch size is taken for one row per sample."""
    bias = torch.linspace(1, 2, 6, dtype=F64)
    rate = torch.linspace(0.1, 0.9, 6, dtype=F64).unsqueeze(1)

    def f(z, rate, bias):
        return rate * torch.tanh(z) + (bias if len(bias) == z.shape[1] else bias[:1])

    found = solve(f, torch.zeros(6, 6, dtype=F64), rate, bias, solver=solver, stop=TIGHT, compact=True)
    assert (relative(lambda z: f(z, rate, bias), found.value)[found.converged] <= 1.01e-6).all()
    flagged = solve(f, torch.zeros(6, 6, dtype=F64), rate, bias, solver=solver, stop=TIGHT, compact=(True, False))
    assert flagged.converged.all()
    # NewtonKrylov spends its budget on the systems that the cut made
    assert found.converged.all() or isinstance(solver, NewtonKrylov)
    true = found.converged
    torch.testing.assert_close(found.value[true], flagged.value[true], rtol=1e-4, atol=1e-5)


@each_solver
@pytest.mark.parametrize("stop", [{}, {"late": True}, {"check_every": 3}], ids=str)
def test_residual_is_that_of_the_value_whether_or_not_it_converged(solver, stop):
    rate = torch.tensor([[0.3], [0.9], [0.99], [-3.0]], dtype=F64)

    def f(z):
        return rate * torch.tanh(z + 0.1) + 1

    for evals in (1, 2, 5, 12, 60):
        found = solve(f, torch.zeros(4, 3, dtype=F64), solver=solver, stop=Stop(rtol=1e-8, max_evals=evals, **stop))
        true = (f(found.value) - found.value).norm(dim=1)
        torch.testing.assert_close(found.residual, true, rtol=1e-9, atol=1e-15)
        assert (true[found.converged] <= 1.0001e-8 * f(found.value).norm(dim=1)[found.converged]).all()


def test_unrolled_returns_what_it_claims():
    w = torch.tensor(-3.0, dtype=F64, requires_grad=True)

    def f(z):
        return w * torch.tanh(z) + 1

    found = fixed_point(f, torch.zeros(2, 3, dtype=F64), solver=Picard(0.7), grad=Unrolled())
    with torch.no_grad():
        torch.testing.assert_close(found.residual, (f(found.value) - found.value).norm(dim=1))


@pytest.mark.parametrize("grad", [IFT(), JFB(), Unrolled(), Unrolled(checkpoint=True), Reversible()], ids=repr)
@pytest.mark.parametrize("max_evals", range(1, 7))
def test_a_sample_has_converged_if_and_only_if_its_value_meets_the_tolerance(grad, max_evals):
    rate = torch.linspace(0.01, 0.5, 12)[:, None].requires_grad_()
    stop = Stop(rtol=1e-2, max_evals=max_evals)
    found = fixed_point(lambda z: rate * z + 1, torch.zeros(12, 1), solver=Picard(), grad=grad, stop=stop)
    with torch.no_grad():
        image = rate * found.value + 1
        met = ((image - found.value).abs() <= 1e-2 * image.abs())[:, 0]
    assert torch.equal(found.converged, met)


def test_a_vector_is_refused_by_name():
    with pytest.raises(ValueError, match="batch_dims=0"):
        solve(torch.cos, torch.zeros(5))
    assert solve(torch.cos, torch.zeros(5), batch_dims=0).converged.all()


# ---- tolerance


@pytest.mark.parametrize("grad", [IFT(), JFB(), JFB(2), Unrolled(), Reversible()], ids=repr)
def test_a_fixed_count_claims_nothing_of_rows_beside_others_that_move(grad):
    """Row 0 is fixed as long as row 1 is zero: the last step of row 1 takes it away."""
    a = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    b = torch.tensor([[0.0], [1.0]], dtype=F64, requires_grad=True)

    def f(z):
        return a @ z + b

    for evals in (1, 2, 3, 7):
        z0, stop = torch.zeros(2, 1, dtype=F64), Stop(rtol=0, max_evals=evals)
        found = fixed_point(f, z0, solver=Picard(), grad=grad, stop=stop)
        true = (f(found.value) - found.value).norm(dim=1)
        assert not found.converged[true > 0].any()
        whole = fixed_point(f, z0, solver=Picard(), grad=grad, stop=stop, batch_dims=0)
        assert torch.equal(whole.value, found.value) and (not whole.converged.any() or not true.any())


@each_solver
@pytest.mark.parametrize("grad", [IFT(), JFB(2), Unrolled()], ids=repr)
def test_a_fixed_count_that_is_observed_has_the_same_answer(solver, grad):
    rate, seen = torch.tensor([[0.3], [0.9], [-3.0]], dtype=F64, requires_grad=True), []

    def f(z):
        return rate * torch.tanh(z + 0.1) + 1

    for evals in (1, 4, 11):
        stop, z0 = Stop(rtol=0, max_evals=evals), torch.zeros(3, 2, dtype=F64)
        if isinstance(grad, Unrolled) and not solver.differentiable:
            with pytest.raises(ValueError, match=type(solver).__name__):
                fixed_point(f, z0, solver=solver, grad=grad, stop=stop)
            continue
        plain = fixed_point(f, z0, solver=solver, grad=grad, stop=stop)
        found = fixed_point(
            f, z0, solver=solver, grad=grad, stop=stop, trace=True, callback=lambda k, r: seen.append(k)
        )
        for name in ("value", "residual", "result", "evals"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name
        assert found.trace is not None and found.trace.shape == (evals, 3) and seen[-evals:] == [*range(1, evals + 1)]
        first = (f(z0) - z0).norm(dim=1)
        torch.testing.assert_close(found.trace[0], first.detach())


# ---- NaN on the way, noise


@each_solver
@pytest.mark.parametrize("stop", [{}, {"late": True}, {"check_every": 2}, {"check_every": 3}], ids=str)
def test_one_nan_on_the_way_causes_a_reset_however_residuals_are_read(solver, stop):
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=rng, dtype=F64)
    a = 0.9 * a / torch.linalg.eigvals(a).abs().max()
    b = torch.randn(3, 6, generator=rng, dtype=F64)
    for at in (3, 8) if stop else range(3, 9):  # at a reading of every second or third evaluation, and between two
        calls = 0

        def f(z, at=at):
            nonlocal calls
            calls += 1
            return torch.tanh(z @ a.T) + b + (torch.nan if calls == at else 0.0)

        found = solve(f, torch.zeros(3, 6, dtype=F64), solver=solver, stop=Stop(rtol=1e-8, max_evals=200, **stop))
        if not solver.patience:  # plain iteration has no safeguard
            assert (found.result == Result.NONFINITE).all() or found.converged.all()
        else:
            assert found.converged.all(), (at, found)
        if stop or at != 5:
            continue
        calls, count = 0, Stop(rtol=0, max_evals=200)
        fixed = solve(f, torch.zeros(3, 6, dtype=F64), solver=solver, stop=count)
        assert (fixed.result == Result.NONFINITE).all() == (found.result == Result.NONFINITE).all()
        assert not solver.patience or (relative(f, fixed.value) <= 1e-8).all()


@pytest.mark.filterwarnings("ignore:f takes one sample")
@each_solver
def test_mates_that_move_by_rounding_alone_leave_no_false_claim(solver):
    """A residual just below the tolerance rises above it by less than what two evaluations may differ by."""
    for seed in range(8):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).half()
        f = lambda z, x=x: 0.5 * (z - z.mean(0)) + x  # noqa: E731
        found = solve(f, torch.zeros(3, 4).half(), solver=solver, stop=Stop(rtol=1e-2, max_evals=90))
        again = f(found.value).double()
        off = (again - found.value.double()).norm(dim=1) / again.norm(dim=1)
        assert (off[found.converged] <= 1.02e-2).all(), (seed, off)


def map_with_a_hole(rows, seed):
    """f is NaN where a state is large, which extrapolations meet again and again; and (a, b), its arguments."""
    rng = torch.Generator().manual_seed(seed)

    def f(z, a, b):
        out = a * torch.tanh(1.3 * z + 0.7 * z.roll(1, 1)) - 0.6 * torch.sin(z.roll(-1, 1)) + b
        return torch.where(z.abs().amax(1, keepdim=True) > 3.5, torch.nan, out)

    return f, (2.5 * torch.rand(rows, 1, generator=rng, dtype=F64), torch.randn(rows, 6, generator=rng, dtype=F64))


@each_solver
@pytest.mark.parametrize("seed", [0, 2, 3, 8])
def test_samples_that_meet_nan_on_the_way_converge_however_residuals_are_read(solver, seed):
    f, args = map_with_a_hole(6, seed)
    results = [
        solve(
            f, torch.zeros(6, 6, dtype=F64), *args, solver=solver, stop=Stop(rtol=1e-8, max_evals=70, **reading)
        ).result
        for reading in ({}, {"check_every": 2}, {"check_every": 3}, {"late": True}, {"late": True, "check_every": 3})
    ]
    assert (results[0] == Result.CONVERGED).any()
    for result in results[1:]:
        assert not ((results[0] == Result.CONVERGED) & (result == Result.NONFINITE)).any()


@pytest.mark.parametrize("solver", [AndersonGS(), Anderson()], ids=repr)
@pytest.mark.parametrize("late", [False, True])
def test_the_trace_has_the_residuals_of_a_sample_that_is_reset_after_a_nan(solver, late):
    """It is NaN where f(z) is not finite and after the end of the sample alone."""
    f, args = map_with_a_hole(6, 8)
    broken = []

    def watched(z, *args):
        out = f(z, *args)
        broken.append(~out.isfinite().all(dim=1))
        return out

    stop = Stop(rtol=1e-8, max_evals=70, late=late)
    found = solve(watched, torch.zeros(6, 6, dtype=F64), *args, solver=solver, stop=stop, trace=True)
    assert found.converged.all()
    missing = found.trace.isnan()
    running = torch.flip(torch.flip(~missing, [0]).int().cummax(0).values, [0]).bool()
    expected = torch.stack(broken[: len(missing)])
    assert expected.any() and torch.equal(missing & running, expected & running)
    # the last residual of a sample is that which met the tolerance
    last = running.sum(0) - 1
    assert (found.trace[last, torch.arange(6)] <= 1.01e-8 * found.value.norm(dim=1)).all()


def test_readings_that_are_late_and_seldom_are_no_coupling():
    """The last evaluation is at the best iterate of an older reading: a difference there is no influence of mates."""
    f, args = map_with_a_hole(4, 8)
    found = solve(f, torch.zeros(4, 6, dtype=F64), *args, stop=Stop(rtol=1e-8, max_evals=200, late=True, check_every=2))
    assert not (found.converged & (relative(lambda z: f(z, *args), found.value) > 1e-8)).any()


@pytest.mark.parametrize("solver", [AndersonGS(), Broyden()], ids=repr)
def test_samples_that_finish_while_others_take_newton_steps_are_cut_out(solver):
    f, args = map_with_a_hole(6, 6)
    stop, z0 = Stop(rtol=1e-8, max_evals=120), torch.zeros(6, 6, dtype=F64)
    plain, compact = (solve(f, z0, *args, solver=solver, stop=stop, compact=cut) for cut in (False, True))
    assert torch.equal(plain.result, compact.result)


@pytest.mark.parametrize("stop", [Stop(rtol=1e-6, max_evals=60), Stop(rtol=0, max_evals=30)], ids=["rtol", "count"])
@pytest.mark.parametrize("solver", [AndersonGS(), Anderson(), Broyden()], ids=repr)
def test_a_reset_after_a_nan_leaves_the_gradient_of_shared_parameters_finite(stop, solver):
    rate = torch.tensor(0.5, dtype=F64, requires_grad=True)
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        good = rate * torch.tanh(z) + 1
        return torch.cat((good[:1], (rate * z[1:] - 1e9).sqrt())) if calls == 4 else good

    found = fixed_point(f, torch.zeros(2, 3, dtype=F64), solver=solver, grad=Unrolled(), stop=stop)
    found.value[0].sum().backward()
    assert rate.grad is not None and rate.grad.isfinite() and found.value.isfinite().all()
    assert (found.result != Result.NONFINITE).all()


@each_solver
def test_noise_in_f_is_named(solver):
    torch.manual_seed(0)
    drop, w = torch.nn.Dropout(0.3), 0.5 * torch.linalg.qr(torch.randn(8, 8))[0]
    found = solve(lambda z: torch.tanh(drop(z @ w) + 1), torch.zeros(6, 8), solver=solver)
    assert not found.converged.any() and (found.result == Result.NONDETERMINISTIC).any()


def test_a_map_that_settles_while_it_is_solved_is_no_coupling():
    """spectral_norm in training mode: every call changes the weight a little."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8))
    x = torch.randn(5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve(lambda z: torch.tanh(0.9 * layer(z) + x), torch.zeros(5, 8), stop=Stop(rtol=1e-5, max_evals=200))
    assert found.converged.all()


@each_solver
@pytest.mark.filterwarnings("ignore:f takes one sample")
def test_every_call_of_a_map_that_couples_samples_is_counted(solver):
    x = torch.tensor([[0.1], [-0.7], [0.4]], dtype=F64)
    for budget in (5, 9, 14, 25, 40):
        calls = 0

        def f(z):
            nonlocal calls
            calls += 1
            return 0.8 * z.roll(1, 0) + x

        found = solve(f, torch.zeros_like(x), solver=solver, stop=Stop(rtol=1e-3, max_evals=budget, check_every=2))
        assert int(found.evals.max()) == calls


@pytest.mark.parametrize("seed", [8, 9, 12])
@pytest.mark.filterwarnings("ignore:f takes one sample")
def test_the_residual_is_that_of_the_value_where_late_readings_end_with_the_budget(seed):
    """The last evaluation is at a best iterate that the reading before it replaces."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def f(z):
        return 0.7 * torch.tanh((z - z.mean(0)) / (z.var(0, unbiased=False) + 0.1).sqrt()) + x

    stop = Stop(rtol=0.1, max_evals=9, late=True, check_every=7)
    found = solve(f, torch.zeros(5, 2, dtype=F64), solver=Broyden(5, search=3), stop=stop)
    torch.testing.assert_close(found.residual, (f(found.value) - found.value).norm(dim=1))


@each_solver
def test_no_more_calls_than_the_budget(solver):
    rate = torch.tensor([[0.3], [0.9], [0.99]], dtype=F64)
    for evals in range(1, 25):
        calls = 0

        def f(z):
            nonlocal calls
            calls += 1
            return rate * torch.tanh(z + 0.1) + 1

        found = solve(f, torch.zeros(3, 3, dtype=F64), solver=solver, stop=Stop(rtol=1e-7, max_evals=evals))
        added = int(found.evals.max()) - min(int(found.evals.max()), evals)
        assert calls <= evals + added and added <= 1


@pytest.mark.parametrize("solver", [Multisecant(), Anderson(), AndersonGS(), Broyden(), BadBroyden()], ids=repr)
def test_noise_in_newton_steps_of_the_safeguard_spends_no_more_than_the_budget(solver):
    """Whether a Jacobian-vector product changes the bits of f(z) cannot be found out by repetition beside noise."""
    calls = products = 0

    def f(z):
        nonlocal calls, products
        calls, products = calls + 1, products + transforms_active()
        return torch.nn.functional.dropout(torch.tanh(2.5 * z @ w) + 1, (0.1, 0.5)[seed % 2])

    for seed in range(6):
        calls = 0
        torch.manual_seed(seed)
        w = torch.randn(6, 6) / 6**0.5
        found = solve(f, torch.zeros(3, 6), solver=solver, stop=Stop(rtol=1e-6, max_evals=120))
        assert int(found.evals.max()) == calls <= 120 + 5
    assert products > 9


@each_solver
@pytest.mark.parametrize("stop", [Stop(rtol=1e-5), Stop(rtol=0, max_evals=7)], ids=["rtol", "count"])
def test_hooks_and_statistics_in_f_act_once_an_evaluation(solver, stop):
    torch.manual_seed(0)
    layer, norm, seen = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), []
    layer.register_forward_hook(lambda *a: seen.append("forward"))

    def f(z):
        out = torch.tanh(0.5 * layer(z) + 1)
        norm(z.detach())
        return out

    found = fixed_point(f, torch.zeros(4, 6), solver=solver, grad=JFB(), stop=stop)
    evals = int(found.evals.max())
    assert seen == ["forward"] * evals and int(norm.num_batches_tracked or 0) <= evals
    if not isinstance(solver, NewtonKrylov):  # forward mode, which a layer with statistics refuses, is tried once
        assert int(norm.num_batches_tracked or 0) == evals


@each_solver
@pytest.mark.filterwarnings("ignore:f takes one sample")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_evals", [30, 300])
def test_a_sample_stalled_beside_others_that_move_has_the_residual_of_its_value(solver, max_evals, dtype):
    def f(z):
        return 0.9 * z.roll(1, 0) + x

    for seed in range(8):
        x = torch.randn(9, 1, generator=torch.Generator().manual_seed(seed)).to(dtype)
        found = solve(f, torch.zeros_like(x), solver=solver, stop=Stop(rtol=1e-6, max_evals=max_evals))
        if not (found.result == Result.STALLED).any():
            continue  # where the budget ends before any sample does, residuals are not of the whole batch
        v = found.value.double()
        true = (f(found.value).double() - v)[:, 0].abs()
        torch.testing.assert_close(found.residual.double(), true, rtol=1e-3, atol=1e-7)


@pytest.mark.filterwarnings("ignore:f takes one sample")
@pytest.mark.parametrize("stop", [{}, {"late": True}, {"check_every": 3}], ids=str)
@pytest.mark.parametrize("solver", [AndersonGS(), Broyden()], ids=repr)
def test_residuals_beside_a_converged_sample_are_those_of_the_values_in_half_precision(solver, stop):
    seen = 0
    for seed in range(24):
        x = torch.randn(9, 1, generator=torch.Generator().manual_seed(seed)).bfloat16()

        def f(z, x=x):
            return 0.9 * z[:1] * torch.linspace(0, 1, 9).bfloat16().unsqueeze(1) + 0.1 * z + x

        found = solve(f, torch.zeros_like(x), solver=solver, stop=Stop(rtol=3e-2, max_evals=4 + seed % 6, **stop))
        if found.converged.any():
            seen += 1
            true = (f(found.value).double() - found.value.double()).norm(dim=1)
            torch.testing.assert_close(found.residual.double(), true, rtol=2e-2, atol=1e-3)
    assert seen


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1.0, 1e12, 1e18, 1e20, 1e24])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_a_callback_changes_no_bit_at_any_size_of_the_state(solver, scale):
    def f(z, x):
        return 0.7 * z.roll(1, 1) + x

    for batch in (2, 80):
        x = scale * torch.randn(batch, 3, generator=torch.Generator().manual_seed(0))
        for evals in (3, 7, 40):
            stop = Stop(rtol=1e-5, max_evals=evals)
            plain = solve(f, torch.zeros_like(x), x, solver=solver, stop=stop)
            seen = solve(f, torch.zeros_like(x), x, solver=solver, stop=stop, callback=lambda calls, residuals: None)
            for name in ("value", "residual", "result", "evals"):
                assert torch.equal(getattr(plain, name), getattr(seen, name)), name


@pytest.mark.parametrize("options", [{}, {"norm": "rms"}, {"norm": "leaf"}, {"check_every": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_callback_changes_no_bit_where_f_is_zero_on_the_way(dtype, options):
    """A cycle through z with f(z) = 0 has equal residuals: a last bit would decide which z is returned."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(6, 7, generator=rng).to(dtype)

    def run(callback):
        stop = Stop(**{"rtol": 1e-3, "atol": 0, "max_evals": 12, **options})
        return fixed_point(lambda z: x - z, torch.zeros_like(x) + x, solver=Picard(), stop=stop, callback=callback)

    plain, watched = run(None), run(lambda calls, residual: None)
    assert torch.equal(plain.value, watched.value) and torch.equal(plain.residual, watched.residual)


def test_reversible_claims_no_residual_of_a_value_at_which_f_is_not_finite():
    x = torch.tensor([[1.0], [0.1], [-1.0]])

    def f(z):
        return torch.where(z.abs() > 2.5, torch.nan, 1.4 * z + x)

    for evals in range(3, 12):
        found = solve(f, torch.zeros(3, 1), grad=Reversible(), stop=Stop(rtol=1e-5, max_evals=evals))
        true = (f(found.value) - found.value)[:, 0].abs()
        torch.testing.assert_close(found.residual, true.nan_to_num(torch.inf))
        assert torch.equal(found.result == Result.NONFINITE, true.isnan()) or evals == 3
