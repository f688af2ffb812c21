"""`Multisecant` against closed forms and dense references, and a test for each known cause of failed solves."""

import numpy as np
import pytest
import torch

from benchmarks.problems import acceleration
from implicit import Multisecant, Picard, Result, SolveOptions, Stop, fixed_point, iterate
from implicit.solvers.base import Point
from implicit.staged_safeguard import Stage, StagedSafeguard
from implicit.testing import problem

F64 = torch.float64
MAPS = {p.name: p for p in acceleration()}
TIGHT = Stop(rtol=1e-8, atol=0, max_evals=700)
DEATHS = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=F64)  # Hasselblad 1969, table 1


def solved(f, z0, stop=TIGHT, solver=None):
    """The largest count of evaluations, with the residual checked apart from the solver's claim."""
    calls = 0

    def counted(z):
        nonlocal calls
        calls += 1
        return f(z)

    with torch.no_grad():
        found = iterate(counted, z0, solver or Multisecant(), stop).check()
        fz = f(found.value)
        assert ((fz - found.value).norm(dim=1) <= (stop.atol + stop.rtol * fz.norm(dim=1)) * 1.001).all()
    return calls


def visited(f, z0, solver, evals):
    seen = []
    iterate(lambda z: (seen.append(z), f(z))[1], z0, solver, Stop(rtol=0, atol=0, max_evals=evals))
    return torch.stack(seen)


def test_the_iterates_are_those_of_the_dense_multisecant_method():
    """Fang and Saad (2009), equations (24) and (25), from differences kept apart; the larger residual is not taken."""
    w = 1.5 * torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=F64))[0]
    b = torch.linspace(-1, 1, 7, dtype=F64)[None]

    def f(z):
        return torch.tanh(z @ w + b)

    got = visited(f, torch.zeros(1, 7, dtype=F64), Multisecant(filter=1e-8, safeguard=False), 6)[:, 0]
    zs, types = [torch.zeros(7, dtype=F64)], []
    zs.append(f(zs[0][None])[0])
    for _ in range(4):
        rs = [f(z[None])[0] - z for z in zs]
        dz = torch.stack([a - c for a, c in zip(zs[1:], zs, strict=False)], 1)
        dr = torch.stack([a - c for a, c in zip(rs[1:], rs, strict=False)], 1)
        one, two = torch.linalg.solve(dz.T @ dr, dz.T @ rs[-1]), torch.linalg.lstsq(dr, rs[-1]).solution
        first, second = (rs[-1] - dr @ gamma for gamma in (one, two))
        types.append(1 if rs[-1].norm() <= rs[-2].norm() and first.norm() <= 1.05 * second.norm() else 2)
        zs.append(zs[-1] + rs[-1] - (dz + dr) @ (one if types[-1] == 1 else two))
    torch.testing.assert_close(got, torch.stack(zs), rtol=1e-7, atol=1e-9)
    assert len(set(types)) == 2


def test_a_linear_map_ends_after_as_many_evaluations_as_numbers():
    """Complex pairs near the unit circle, n = 40: a window shorter than N takes ten times as many."""
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=F64))[0]
    turn = torch.block_diag(
        *[
            torch.tensor([[c, -s], [s, c]], dtype=F64)
            for c, s in ((float(torch.cos(t)), float(torch.sin(t))) for t in torch.linspace(0.1, 3, 20))
        ]
    )
    m = 0.99 * q @ turn @ q.T
    assert solved(lambda z: z @ m.T + 1.0, torch.zeros(2, 40, dtype=F64)) <= 44


def hasselblad(z):
    """EM of a mixture of two Poisson distributions."""
    p, a, b = z[:, :1], z[:, 1:2], z[:, 2:]
    i = torch.arange(10, dtype=z.dtype)
    one, two = p * torch.exp(-a) * a.abs() ** i, (1 - p) * torch.exp(-b) * b.abs() ** i
    w = DEATHS * one / (one + two)
    v = DEATHS - w
    s, t = w.sum(1, keepdim=True), v.sum(1, keepdim=True)
    return torch.cat((s / DEATHS.sum(), (w @ i)[:, None] / s, (v @ i)[:, None] / t), dim=1)


def test_few_unknowns_keep_their_window():
    """Dropping the oldest dependent pair and not all: published counts are 17 to 23 at 1e-7, ours was 42."""
    z0 = torch.tensor([[0.3, 1.0, 2.5]], dtype=F64)
    assert solved(hasselblad, z0, Stop(rtol=0, atol=1e-7, max_evals=100)) <= 23


def test_an_expanding_map_is_solved_by_the_pair_of_its_blow_up():
    """z = 95 (18 - z): the first plain step is 95 times too long, and its pair gives the answer."""
    z0 = torch.tensor([[1.0, 5.0, 9.0, 14.0, 17.0, 20.0]], dtype=F64)
    assert solved(lambda z: 95 * (18 - z), z0) <= 10


def test_steps_out_of_the_domain_are_shortened():
    """f is finite for |z| < 3 alone and its plain step leaves that; a sample next to it is not touched."""

    def f(z):
        return torch.where(z.abs() < 3, z - 4 * torch.tanh(z - 1), torch.nan)

    z0 = torch.tensor([[-1.5], [0.9]], dtype=F64)
    assert not iterate(f, z0, Picard(), TIGHT).converged[0]
    assert solved(f, z0) <= 40


def test_the_newton_stage_solves_what_quasi_newton_steps_do_not():
    """Powell's badly scaled system as z = z - F(z), with and without a derivative."""

    def f(z):
        x, y = z[:, :1], z[:, 1:]
        return z - torch.cat((1e4 * x * y - 1, torch.exp(-x) + torch.exp(-y) - 1.0001), 1)

    def opaque(z):
        return f(torch.from_numpy(z.detach().numpy().copy()))

    z0, stop = torch.tensor([[0.0, 1.0]], dtype=F64), Stop(rtol=0, atol=1e-8, max_evals=1000)
    assert solved(f, z0, stop) <= 600
    with torch.no_grad():
        found = iterate(opaque, z0, Multisecant(), Stop(rtol=0, atol=1e-8, max_evals=150))
    assert found.result.item() in (Result.CONVERGED, Result.MAX_EVALS, Result.NONFINITE)


def stages(numbers, best, evals=120, begin=0, **gains):
    """The stage at every evaluation of a sample whose smallest residual is multiplied by `gains[stage]` after `begin`
    evaluations.
    """
    guard, seen = StagedSafeguard(1, 10, numbers), []
    for calls in range(1, evals):
        guard.update(np.array([0]), best, best, best, calls, np.array([False]))
        seen.append(Stage(guard.stage[0]))
        best = best * (gains.get(seen[-1].name, 1.0) if calls > begin else 1.0)
        guard.pop_starts()
    return seen


def test_stages_follow_one_another():
    """Each lasts its patience. The second round of a large state begins with plain and accelerated steps in turn, four
    of the first patiences each, and has the first Newton-Krylov steps.
    """
    order = [Stage.CAUTIOUS, Stage.PLAIN, Stage.NEWTON]
    small, large = (stages(n, np.array([1.0]), evals=300) for n in (2, 100))
    assert list(dict.fromkeys(small[9:40])) == order and small.index(Stage.NEWTON) == 27
    turns = [Stage.PLAIN] * 40 + [Stage.ACCELERATED] * 40 + [Stage.PLAIN] * 40
    assert large[19:27] == [Stage.PLAIN] * 8 and large[27:147] == turns and large[147] == Stage.NEWTON


def test_from_a_new_start_plain_and_accelerated_steps_take_turns():
    """Where plain steps alone gain, every other turn is plain. Accelerated steps that gain go on."""
    seen = stages(100, np.array([1.0]), evals=428, PLAIN=0.93)
    assert seen[27:] == ([Stage.PLAIN] * 40 + [Stage.ACCELERATED] * 40) * 5
    seen = stages(100, np.array([1.0]), evals=428, begin=27, ACCELERATED=0.85)
    assert seen[27:] == [Stage.PLAIN] * 40 + [Stage.ACCELERATED] * 360


@pytest.mark.parametrize("stage", [Stage.PLAIN, Stage.NEWTON])
def test_a_stage_lasts_as_long_as_it_gains(stage):
    seen = stages(2, np.array([1.0]), **{stage.name: 0.8})
    assert set(seen[seen.index(stage) :]) == {stage}


def test_plain_steps_without_a_projected_gain_end_after_a_trial():
    """0.99 a step does not reach a tenth in two patiences."""
    seen = stages(2, np.array([1.0]), PLAIN=0.99)
    assert seen.index(Stage.PLAIN) == 19 and seen[19:27] == [Stage.PLAIN] * 8 and seen[27] == Stage.NEWTON


def test_a_second_round_begins_at_the_start_where_the_first_one_gained_nothing():
    """f has no value beside a point of small residual, and a fixed point elsewhere, which plain steps find."""
    p = MAPS["Best response"]
    for z0 in (p.z0, p.z0[1:2]):
        args = tuple(a if len(z0) > 1 else a[1:2] for a in p.args)
        with torch.no_grad():
            found = iterate(p.f, z0, Multisecant(), Stop(rtol=p.rtol, max_evals=200), args=args)
        assert found.converged.all()


def test_a_second_attempt_that_finds_nothing_better_leaves_the_first_one_s_best_iterate():
    seen = []

    def f(z):  # no fixed point: the residual is 1 at 0, and grows with the distance
        seen.append((z + 1 + 0.1 * z**2).sub(z).norm().item())
        return z + 1 + 0.1 * z**2

    with torch.no_grad():
        found = iterate(f, torch.full((1, 1), 3.0, dtype=F64), Multisecant(), Stop(rtol=1e-9, max_evals=300))
    assert not found.converged.any()
    assert found.residual.item() == min(seen) and abs(found.value.item()) < 0.1


def test_a_state_that_ran_away_is_no_solution():
    """||f(z) - z|| falls below rtol ||f(z)|| where z is large enough: 2 at a norm of 1e8, 0.08 at the start."""
    p = MAPS["Douglas-Rachford"]
    with torch.no_grad():
        found = fixed_point(p.f, p.z0, *p.args, solver=Multisecant(), stop=Stop(rtol=p.rtol, max_evals=700)).check()
    assert found.value.norm(dim=1).max() < 10 and found.residual.max() < 1e-7


def test_a_nested_state_that_ran_away_is_no_solution():
    """No fixed point: ||f(z) - z|| is least at 0, and below 1e-4 ||z|| in every leaf wherever z is large enough."""

    def f(z):
        return {key: x + torch.sqrt(1 + x.abs()) for key, x in z.items()}

    z0 = {"a": torch.zeros(1, 2, dtype=F64), "b": torch.zeros(1, 3, dtype=F64)}
    with torch.no_grad():
        found = iterate(f, z0, Multisecant(), Stop(rtol=1e-4, max_evals=100, norm="leaf"))
    assert not found.converged.any()


@pytest.mark.parametrize("n", [1, 5, 100])
def test_newton_s_iteration_is_not_disturbed(n):
    """z <- (z + t / z) / 2 converges faster than any extrapolation of it: never more than 1.1 times plain iteration."""
    t = torch.arange(1.0, n + 1, dtype=F64)

    def f(z):
        return (z + t / z) / 2

    for start in (t[None] + 20, torch.full((1, n), 50.0, dtype=F64)):
        assert solved(f, start) <= 1.1 * solved(f, start, solver=Picard())


def test_plain_steps_go_on_where_each_of_them_settles_a_number():
    """Shortest paths along a line of 40 nodes and a shift: plain iteration is exact after as many steps as numbers.

    The shift goes on so through the safeguard's stages, which begin after 25 steps.
    """
    edge = torch.linspace(0.5, 2, 40, dtype=F64)

    def distances(z):
        return torch.minimum(torch.nn.functional.pad(z[:, :-1], (1, 0)) + edge, torch.full_like(z, 100))

    def shift(z):
        return 0.97 * torch.nn.functional.pad(z[:, :-1], (1, 0)) + torch.eye(1, 80, dtype=F64)

    starts = {distances: torch.full((3, 40), 100.0, dtype=F64), shift: torch.linspace(1, 2, 80, dtype=F64)[None]}
    for f, z0 in starts.items():
        assert solved(f, z0) == solved(f, z0, solver=Picard()) >= 40


def test_after_a_long_plateau_of_plain_iteration_accelerated_steps_begin_where_it_has_come_to():
    """The ancestry EM map: accelerated steps from its start do not end, and the residual of plain steps rises from the
    80th to the 200th. After 100 of them accelerated steps need about 140.
    """
    p = MAPS["Ancestry EM"]
    stop = Stop(rtol=p.rtol, atol=0, max_evals=1000)
    plain = solved(lambda z: p.f(z, *p.args), p.z0, stop, Picard())
    assert 600 < plain and solved(lambda z: p.f(z, *p.args), p.z0, stop) <= 0.6 * plain


def test_numbers_that_settle_at_zero_keep_no_plain_steps():
    """relu(0.99 z Q + b), where a part of the numbers is 0 at the fixed point."""
    rng = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(60, 60, dtype=F64, generator=rng))[0]
    b = torch.randn(2, 60, dtype=F64, generator=rng)

    def f(z):
        return torch.relu(0.99 * z @ q + b)

    assert solved(f, torch.ones_like(b)) <= 0.7 * solved(f, torch.ones_like(b), solver=Picard())


def test_the_value_does_not_depend_on_batch_mates():
    p = problem("one hard of 16")
    with torch.no_grad():
        whole = iterate(p, p.z0, Multisecant(), TIGHT, args=p.args)
        part = iterate(p, p.z0[7:10], Multisecant(), TIGHT, args=tuple(a[7:10] for a in p.args))
    torch.testing.assert_close(part.value, whole.value[7:10], rtol=1e-6, atol=1e-7)


def test_it_resumes_and_differentiates():
    p = problem("adaLN block")
    first = iterate(p, p.z0, Multisecant(), Stop(rtol=1e-6, atol=0), args=p.args, options=SolveOptions(keep_state=True))
    again = SolveOptions(state=first.state)
    warm = iterate(p, first.value, Multisecant(), Stop(rtol=1e-8, atol=0), args=p.args, options=again).check()
    cold = iterate(p, first.value, Multisecant(), Stop(rtol=1e-8, atol=0), args=p.args).check()
    assert int(warm.evals.max()) <= int(cold.evals.max())
    x = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    fixed_point(
        lambda z, x: torch.cos(z) + x, torch.ones(2, 3, dtype=F64), x, solver=Multisecant(), stop=TIGHT
    ).value.sum().backward()
    z = torch.tensor(0.7390851332151607, dtype=F64)
    torch.testing.assert_close(x.grad, torch.full_like(x, float(1 / (1 + torch.sin(z)))))


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 100), (torch.float32, -100), (F64, 900), (F64, -900)])
def test_steps_do_not_depend_on_the_unit_of_the_state(dtype, exponent):
    w = torch.randn(6, 6, dtype=dtype, generator=torch.Generator().manual_seed(3)) / 3

    def ended(unit):
        def f(z):
            return unit * torch.tanh(z / unit @ w + 1)

        return fixed_point(f, torch.zeros(2, 6, dtype=dtype), solver=Multisecant(), stop=Stop(rtol=1e-5)).check()

    found, usual = ended(2.0**exponent), ended(1.0)
    assert torch.equal(found.value, usual.value * 2.0**exponent) and torch.equal(found.evals, usual.evals)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_pairs_are_stored_without_a_rounding_error(dtype):
    """z = 95 (18 - z) in one sample: the numbers of a pair are large beside the step that they give."""
    z0 = torch.tensor([[0.3, 0.4, 0.5, 0.6, 0.7, 0.8]], dtype=dtype)
    assert solved(lambda z: 95 * (18 - z), z0, Stop(rtol=10 * torch.finfo(dtype).eps, atol=0, max_evals=100)) <= 5
    with torch.no_grad():
        f, (first, second) = (lambda z: 95 * (18 - z)), (z0, 95 * (18 - z0))
        start = Point(first, f(first))
        state = Multisecant().step(start, Multisecant().init(start))[2]
        state = Multisecant().step(Point(second, f(second)), state)[2]
    row = state.window.rows.part(2 * state.window.newest, 2 * state.window.newest + 1)[:, 0]
    scale = (row / (f(second) - f(first))).unique()
    assert scale.numel() == 1 and torch.frexp(scale).mantissa.item() == 0.5
