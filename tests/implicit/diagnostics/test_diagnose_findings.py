"""`diagnose`: findings do not depend on the unit of the state, its dtype, the pair of samples coupled or the basin."""

import pytest
import torch
from torch import nn

import implicit
from implicit import IFT, AndersonGS, NewtonKrylov, Picard, StochasticJFB, Stop, Unrolled, diagnose
from implicit.diagnostics import Condition
from tests.implicit.diagnostics.known_maps import MAPS, below_rounding, coupled, kinked, noisy

C = Condition
F64 = torch.float64
QUICK = (Picard(), AndersonGS(), NewtonKrylov())


def conditions(f, z0, *args, **options):
    found = diagnose(f, z0, *args, **{"estimators": (), "solvers": QUICK, **options})
    return {finding.condition: finding for finding in found.findings}


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("unit", [1e-8, 1e6])
@pytest.mark.parametrize(
    "make", [make for make in MAPS if make not in (noisy, below_rounding)], ids=lambda m: m.__name__
)
def test_the_unit_of_the_state_changes_no_finding(make, unit, dtype):
    known = make(6, 8, dtype)
    found = conditions(lambda z, *args: unit * known.f(z / unit, *args), unit * known.z0, *known.args)
    assert set(found) == known.conditions


@pytest.mark.parametrize("kink", [False, True])
def test_every_tensor_of_the_state_is_measured_in_its_own_unit(kink):
    x = 2 + normal(3, 20).abs()

    def f(z):
        wide, fine = z["wide"], z["fine"]
        bend = torch.abs if kink else torch.sin
        return {"wide": 1e6 * torch.tanh(0.5e-6 * wide + x), "fine": 1e-4 * (x + bend(0.5 * (1e4 * fine - x)))}

    found = conditions(f, {"wide": torch.zeros(3, 20, dtype=F64), "fine": torch.zeros(3, 20, dtype=F64)})
    assert set(found) == {C.CONTRACTIVE, *([C.KINKED] if kink else [])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [2, 5, 8])
def test_coupling_of_any_two_samples_is_found(batch, dtype):
    x = normal(batch, 12, dtype=dtype)
    for one in range(batch):
        for other in {(one + 1) % batch, (one + 2) % batch, batch - 1 - one} - {one}:
            takes = torch.zeros(batch, 1, dtype=dtype)
            takes[one] = 0.3

            def f(z, takes=takes, other=other):
                return 0.5 * z + x + takes * z[other]

            found = conditions(f, torch.zeros_like(x), stop=Stop(rtol=0.02))
            assert found[C.COUPLED].samples == (one,), (one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_noise_and_coupling_are_found_in_every_dtype(dtype):
    torch.manual_seed(0)
    for make, condition in ((noisy, C.NOISY), (coupled, C.COUPLED)):
        known = make(40, 4, dtype)
        assert conditions(known.f, known.z0, *known.args, stop=Stop(rtol=0.02))[condition].certain
    known = kinked(40, 4, dtype)
    found = diagnose(known.f, known.z0, *known.args, stop=Stop(rtol=0.02), estimators=(), solvers=QUICK)
    wide = dtype in (torch.float32, torch.float64)
    assert (C.KINKED in found.conditions) == wide
    assert any("kinks" in missing for missing in found.missing) != wide


def test_small_noise_is_certain():
    found = conditions(lambda z: 0.5 * z + 1 + 1e-3 * torch.rand_like(z), torch.zeros(4, 50))
    assert found[C.NOISY].certain


def odd_maps():
    patterns = normal(3, 60, seed=1).sign()
    yield "memory", lambda z: torch.tanh(2.5 * z @ patterns.T @ patterns / 60), 0.6 * patterns  # starts at a pattern
    leading = normal(60, 60, seed=2)
    leading = leading @ leading.T + 60 * torch.outer(patterns[0], patterns[0])
    yield "power iteration", lambda z: nn.functional.normalize(z @ leading, dim=1), normal(3, 60, seed=3)
    yield "sign", lambda z: 0.5 * z * (3 - z**2), torch.full((3, 60), 0.8, dtype=F64)  # large starts diverge


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("which", range(3))
def test_the_other_answer_of_an_odd_map_is_found_from_within_a_basin(which, dtype):
    _, f, z0 = list(odd_maps())[which]
    found = conditions(lambda z: f(z.double()).to(dtype), z0.to(dtype))
    assert set(found) == {C.CONTRACTIVE, C.SEVERAL_FIXED_POINTS}
    distance = float(found[C.SEVERAL_FIXED_POINTS].evidence.split("up to ")[1].split()[0])
    assert 0.5 < distance <= 2


@pytest.mark.parametrize("n", [2, 30])
def test_a_line_of_fixed_points_is_several(n):
    line = nn.functional.normalize(normal(n, seed=4), dim=0)
    x = normal(3, n, seed=5)

    def f(z):
        along = (z @ line).unsqueeze(1) * line
        return along + 0.5 * (z - along) + x - (x @ line).unsqueeze(1) * line

    found = conditions(f, normal(3, n, seed=6))
    assert set(found) == {C.CONTRACTIVE, C.SEVERAL_FIXED_POINTS}
    assert not found[C.CONTRACTIVE].certain


def test_points_that_repel_and_gates_that_saturate_are_no_other_answers():
    square = conditions(lambda z: 0.3 * z**2 + 0.2, torch.zeros(2, 500, dtype=F64))  # 3.12 repels
    assert set(square) == {C.CONTRACTIVE}
    torch.manual_seed(5)
    cell, x = nn.GRUCell(4, 2).double(), normal(3, 4, seed=1)
    assert set(conditions(lambda z: cell(x, z), torch.zeros(3, 2, dtype=F64))) == {C.CONTRACTIVE}


@pytest.mark.parametrize("n", [30, 60, 120])
def test_a_transient_is_not_taken_for_an_eigenvalue(n):
    """0.3 on the diagonal and 0.9 beside it: Ritz values are near 1.1 long before the basis is complete."""

    def f(z, x):
        return 0.3 * z + 0.9 * nn.functional.pad(z, (1, 0))[:, :-1] + x

    found = conditions(f, torch.zeros(2, n, dtype=F64), normal(2, n), stop=Stop(max_evals=400))
    assert {C.CONTRACTIVE, C.NON_NORMAL} <= set(found) and C.EXPANDING not in found


@pytest.mark.parametrize("unit", [1e-6, 1.0])
def test_an_iteration_that_starts_at_a_repelling_point_does_not_make_it_attract(unit):
    found = conditions(lambda z: unit * torch.sin(2 * z / unit), torch.zeros(2, 5, dtype=F64))
    assert C.EXPANDING in found and found[C.EXPANDING].certain and C.NON_NORMAL not in found


def test_random_layers_are_not_called_non_normal():
    for seed in range(12):
        w, x = 0.8 * normal(10, 10, seed=seed) / 10**0.5, normal(16, 10, seed=seed + 100)
        found = diagnose(lambda z, w=w, x=x: torch.tanh(z @ w) + x, torch.zeros_like(x), estimators=(), solvers=QUICK)
        for sample in found[C.NON_NORMAL].samples if C.NON_NORMAL in found.conditions else ():
            slopes = 1 - torch.tanh(found.value[sample] @ w) ** 2
            jacobian = w * slopes
            rate = torch.linalg.eigvals(jacobian).abs().max()
            powers = [torch.linalg.matrix_norm(torch.linalg.matrix_power(jacobian / rate, k), 2) for k in range(1, 60)]
            assert max(powers) > 9


def test_the_rounding_error_of_f_itself_is_below_rounding():
    w, x = 0.5 * normal(100, 100, seed=1) / 10, normal(2, 100, seed=2)

    def inside(z):
        return torch.tanh((z @ w).float() + x.float()).double()

    found = diagnose(inside, torch.zeros(2, 100, dtype=F64), stop=Stop(rtol=1e-11), estimators=(), solvers=QUICK)
    assert found.conditions == {C.CONTRACTIVE, C.BELOW_ROUNDING}
    assert found[C.CONTRACTIVE].certain
    stop = found.recommendation.stop
    assert 1e-9 < stop.rtol < 1e-5
    how = dict(solver=found.recommendation.solver, stop=stop)
    assert bool(implicit.fixed_point(inside, torch.zeros(2, 100, dtype=F64), **how).converged.all())


@pytest.mark.parametrize(("rows", "n"), [(10, 3), (30, 10), (30, 3), (3, 1000)])
def test_the_rounding_error_of_an_argument_is_below_rounding(rows, n):
    """f takes its argument to float32, and may be equal at all points around an iterate."""
    torch.manual_seed(0)
    w, x = (normal(n, n, seed=1) * 0.5 / n**0.5).float(), normal(rows, n, seed=2).float()
    f, stop = lambda z: torch.tanh(z.float() @ w + x).double(), Stop(rtol=1e-11, max_evals=100)
    found = diagnose(f, torch.zeros(rows, n, dtype=F64), stop=stop, estimators=(), solvers=QUICK)
    short = min(row.samples - row.converged for row in found.solvers)
    assert found.conditions == ({C.CONTRACTIVE, C.BELOW_ROUNDING} if short else {C.CONTRACTIVE})
    if short:
        assert len(found[C.BELOW_ROUNDING].samples) >= 0.7 * short and 1e-9 < found.recommendation.stop.rtol < 1e-5


def test_a_short_solve_of_a_kink_a_curve_or_other_units_is_no_rounding():
    """Slopes far above 1 at the end of solves that the budget cut short."""
    x = normal(6, 10, seed=3)
    wave = [(0.005, 400), (0.002, 2000), (0.008, 300)]
    maps = [lambda z, a=a, k=k: x + a * torch.sin(k * z.roll(1, dims=1)) for a, k in wave]
    maps += [lambda z, c=c: c * torch.relu(z - x) + x for c in (0.9, 0.99)]
    maps += [lambda z: 0.97 * torch.sin(z) + x, lambda z: x - 0.95 * z.abs()]
    for f in maps:
        assert C.BELOW_ROUNDING not in conditions(f, torch.zeros_like(x), stop=Stop(rtol=1e-12), solvers=[Picard()])

    def units(z):
        a, b = z[:, :10], z[:, 10:]
        return torch.cat((1e4 * (0.9 * b + 0.01 * torch.sin(5 * b) + 0.1 * x), a / 1e4), dim=1)

    def kink(z):
        a, b = z[:, :1], z[:, 1:]
        return torch.cat((0.5 * a + 5 * torch.relu(b - 1) + 0.5, 0.95 * b + 0.05), dim=1)

    for f, n in ((units, 20), (kink, 2)):
        z0 = torch.zeros(6, n, dtype=F64)
        assert C.BELOW_ROUNDING not in conditions(f, z0, stop=Stop(rtol=1e-12), solvers=[Picard()])


@pytest.mark.parametrize(("rate", "rtol", "dtype"), [(0.8, 1e-11, F64), (0.75, 1e-13, F64), (0.9, 1e-6, torch.float32)])
def test_a_tolerance_that_a_longer_solve_meets_is_not_below_rounding(rate, rtol, dtype):
    q, x = torch.linalg.qr(normal(8, 8, seed=1))[0].to(dtype), normal(4, 8, seed=2, dtype=dtype)
    stop = Stop(rtol=rtol, max_evals=40)
    found = conditions(lambda z: rate * z @ q + x, torch.zeros_like(x), stop=stop, solvers=[Picard()])
    assert set(found) == {C.CONTRACTIVE}


def test_a_test_that_the_budget_does_not_allow_is_named():
    w, x = 0.5 * normal(8, 8, seed=1) / 3, normal(4, 8, seed=2)

    def f(z):
        return torch.tanh((z @ w).float() + x.float()).double()

    options = dict(stop=Stop(rtol=1e-12, max_evals=100), estimators=(), solvers=[Picard()])
    for budget in range(150, 400, 10):
        found = diagnose(f, torch.zeros_like(x), budget=budget, **options)
        assert found.evals + found.products <= budget
        assert found.found or C.BELOW_ROUNDING in found.conditions or any("budget" in why for why in found.missing)


def test_a_small_step_from_the_start_is_no_equilibrium():
    y = normal(3, 8)
    found = conditions(lambda z: y + 0.005 * (torch.sin(z) - 1), y)
    assert set(found) == {C.CONTRACTIVE}


def test_a_derivative_that_is_nan_is_named_and_iterations_tell_the_kind():
    def f(z):  # the backward pass of the branch not taken gives 0 times NaN
        return torch.where(z > -10, 0.5 * z, (-z - 20).sqrt()) + 1

    found = diagnose(f, torch.zeros(2, 3, dtype=F64), estimators=(), solvers=QUICK)
    assert found.conditions == {C.CONTRACTIVE} and not found[C.CONTRACTIVE].certain
    assert any("derivative" in missing for missing in found.missing)


@pytest.mark.parametrize(
    "options",
    [
        {"stop": Stop(rtol=1e-6, norm="rms")},
        {"stop": Stop(rtol=1e-6, norm="max", check_every=2)},
        {"stop": Stop(rtol=0, atol=1e-6, norm="leaf")},
        {"estimators": (IFT(stop=Stop(rtol=1e-9), solver=AndersonGS(5)),)},
        {"estimators": (StochasticJFB(generator=torch.Generator().manual_seed(0)),), "gradient_error": 10.0},
        {"estimators": (Unrolled(checkpoint=True),), "gradient_error": 10.0},
        {"estimators": (IFT(preconditioner=lambda g: 0.9 * g),)},
        {"stop": Stop(rtol=1e-6, when=lambda z, fz: (fz > 9).any(dim=1))},
    ],
    ids=("rms", "max", "leaf", "IFT", "StochasticJFB", "Unrolled", "preconditioner", "when"),
)
def test_the_recommended_code_runs_whatever_the_settings(options):
    w = (0.2 * normal(8, 8)).requires_grad_()
    f, z0 = lambda z: torch.tanh(z @ w) + 0.5, torch.zeros(3, 8, dtype=F64)
    found = diagnose(f, z0, **{"repeats": 0, **options})
    generator = torch.Generator().manual_seed(0)
    names = {"implicit": implicit, "f": f, "z0": z0, "args": (), "generator": generator}
    names |= {"preconditioner": lambda g: 0.9 * g, "when": lambda z, fz: (fz > 9).any(dim=1)}
    assert eval(found.recommendation.code, names).value.shape == z0.shape
    assert found.floor < 1e-12
    assert dict(found.tolerances)[1e-3] <= dict(found.tolerances)[1e-6]


@pytest.mark.parametrize("norm", ["euclidean", "rms", "max", "leaf"])
def test_relative_residuals_are_those_of_the_norm(norm):
    """f moves one number of a hundred by 1e-3 in every step, so that no solve converges."""
    z0 = torch.ones(1, 100, dtype=F64)
    drift = 1e-3 * torch.eye(100, dtype=F64)[:1]
    found = diagnose(lambda z: z + drift, z0, stop=Stop(rtol=1e-9, norm=norm), estimators=(), solvers=(Picard(),))
    assert found.solvers[0].residual == pytest.approx({"max": 1e-3}.get(norm, 1e-4), rel=0.2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_measured_whatever_mode_the_caller_is_in(mode):
    w = (0.2 * normal(8, 8)).requires_grad_()
    with mode():
        z0, x = torch.zeros(3, 8, dtype=F64), normal(3, 8)
        found = diagnose(lambda z, x: torch.tanh(z @ w) + x, z0, x, estimators=(IFT(),), repeats=0)
        assert not torch.is_grad_enabled()
    assert found.bias["IFT"].error < 1e-2 and not found.missing


def test_losses_and_parameters_that_cannot_be_differentiated_are_refused():
    w = (0.2 * normal(8, 8)).requires_grad_()
    f, z0 = lambda z: torch.tanh(z @ w) + 0.5, torch.zeros(3, 8, dtype=F64)
    for options, error in (
        ({"loss": lambda z: z.sum(dim=1)}, ValueError),
        ({"loss": lambda z: torch.tensor(1.0)}, ValueError),
        ({"params": [torch.ones(3)]}, ValueError),
        ({"params": w}, TypeError),
        ({"params": [None]}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(options))):
            diagnose(f, z0, repeats=0, **options)
