"""`diagnose` on maps of known conditions, at several sizes: it finds these alone, within its budget."""

import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

import implicit
from implicit import IFT, JFB, Anderson, AndersonGS, NewtonKrylov, Picard, Stop, diagnose
from implicit.diagnostics import Condition
from implicit.diagnostics import diagnose as same
from implicit.diagnostics.diagnose.restore import restored
from tests.implicit.diagnostics.known_maps import EVEN, MAPS, Known, contractive, coupled, several, slow

F64 = torch.float64
QUICK = (Picard(), AndersonGS(), NewtonKrylov())


def report(known: Known, **options):
    options = {"estimators": (), "solvers": QUICK, "stop": known.stop, **options}
    return diagnose(known.f, known.z0, *known.args, **options)


@pytest.mark.parametrize(
    ("n", "batch", "dtype"),
    [(1, 8, F64), (16, 1, F64), (16, 8, torch.float32), (1000, 1, torch.float32), (300, 8, F64)],
    ids=str,
)
@pytest.mark.parametrize("make", MAPS, ids=lambda m: m.__name__)
def test_every_condition_is_found_and_no_other(make, n, batch, dtype):
    if (n == 1 and make in EVEN) or (batch == 1 and make is coupled):
        pytest.skip("no such map")
    torch.manual_seed(0)
    known = make(n, batch, dtype)
    found = report(known)
    assert found.conditions == known.conditions
    assert all(finding.certain for finding in found.findings)


@pytest.mark.parametrize("make", MAPS, ids=lambda m: m.__name__)
def test_the_default_solvers_give_the_same_conditions(make):
    torch.manual_seed(0)
    known = make(16, 8, F64)
    assert report(known, solvers=None).conditions == known.conditions


def test_only_the_samples_that_a_condition_holds_for_are_named():
    slopes = torch.tensor([[0.5], [-1.5], [1.8], [0.3]], dtype=F64)
    found = diagnose(lambda z, a: a * (z - 1) + 1, torch.zeros(4, 3, dtype=F64), slopes, estimators=())
    assert found[Condition.CONTRACTIVE].samples == (0, 3)
    assert found[Condition.OSCILLATING].samples == (1,)
    assert found[Condition.EXPANDING].samples == (2,)
    with pytest.raises(KeyError, match="NOISY"):
        found[Condition.NOISY]


@pytest.mark.parametrize("slope", [0.99, -1.01, 1.01])
def test_close_to_the_border_a_kind_is_uncertain(slope):
    found = diagnose(lambda z: slope * (z - 1) + 1, torch.zeros(1, 4, dtype=F64), estimators=())
    assert not found.findings[0].certain


def test_a_map_without_a_fixed_point_is_not_called_found():
    f = lambda z: torch.where(z > 0, -1.0, 1.0).to(z) + 0.01 * z  # noqa: E731
    found = diagnose(f, torch.ones(2, 3, dtype=F64), estimators=(), solvers=QUICK)
    assert not found.found
    assert not found.findings[0].certain


def test_a_start_where_f_is_not_finite_is_named():
    found = diagnose(torch.log, torch.tensor([[0.0], [2.0]]), estimators=())
    assert found.conditions == {Condition.NONFINITE}
    assert found[Condition.NONFINITE].samples == (0,)
    assert "solver=implicit." in found.recommendation.code


def test_a_jump_counts_as_a_kink_and_a_smooth_extremum_does_not():
    jump = diagnose(lambda z: 0.2 * (z - 1) + 0.3 * (z > 1).to(z) + 1, torch.zeros(1, 4, dtype=F64), estimators=())
    assert Condition.KINKED in jump.conditions
    smooth = diagnose(lambda z: (z - 1) ** 2 + 1, torch.full((1, 4), 0.8, dtype=F64), estimators=())
    assert Condition.KINKED not in smooth.conditions


def test_the_recommended_call_runs_as_printed_and_converges():
    known = slow(16, 8, F64)
    found = report(known, solvers=None)
    names = {"implicit": implicit, "f": known.f, "z0": known.z0, "args": known.args}
    solution = eval(found.recommendation.code, names)
    assert bool(solution.converged.all())
    best = min(row.most for row in found.solvers if row.converged == 8)
    assert int(solution.evals.max()) <= 1.1 * best + 2


def test_the_recommended_tolerance_can_be_met_where_the_given_one_cannot():
    known = contractive(16, 8, torch.float32)
    found = report(known, stop=Stop(rtol=1e-9, max_evals=200))
    stop = found.recommendation.stop
    assert stop.rtol > 1e-9
    how = dict(solver=found.recommendation.solver, stop=stop)
    assert bool(implicit.fixed_point(known.f, known.z0, *known.args, **how).converged.all())


def test_evaluations_are_those_of_the_map_itself():
    known = slow(16, 8, F64)
    calls = 0

    def counted(z, c):
        nonlocal calls
        calls += 1
        return known.f(z, c)

    found = diagnose(counted, known.z0, *known.args, estimators=())
    assert calls == found.evals
    for row in found.solvers:
        assert row.most <= found.evals
    alone = implicit.fixed_point(
        known.f, known.z0, *known.args, solver=Anderson(), grad=JFB(), stop=Stop(max_evals=100)
    )
    assert found.solvers[4].name == "Anderson"
    assert found.solvers[4].evals.tolist() == (alone.evals - 1).tolist()


@pytest.mark.parametrize("budget", [1, 5, 12, 40, 100, 300, 1000])
@pytest.mark.parametrize("make", [slow, several])
def test_the_budget_is_kept_and_what_it_leaves_out_is_named(make, budget):
    known, calls = make(16, 2, F64), 0
    weight = nn.Parameter(torch.ones(16, dtype=F64))

    def counted(z, *args):
        nonlocal calls
        calls += 1
        return known.f(z, *args) * weight

    found = diagnose(counted, known.z0, *known.args, budget=budget, repeats=1)
    assert found.evals + found.products <= budget
    assert calls <= budget
    assert found.missing or budget == 1000
    assert "implicit.fixed_point(" in str(found)


def test_estimators_are_measured_beside_the_exact_gradient():
    w = torch.tensor([0.5, -0.25], dtype=F64, requires_grad=True)
    found = diagnose(lambda z: w * z + 1, torch.zeros(3, 2, dtype=F64), repeats=1)
    table = found.bias
    assert table["IFT"].error < 1e-3
    assert table["JFB"].error > 0.1
    assert table["IFT"].products > 0 and table["IFT"].peak > 0 and table["IFT"].time > 0
    assert found.recommendation.grad == IFT()
    assert any("IFT" in reason for reason in found.recommendation.reasons)


def test_a_cheaper_estimator_is_recommended_where_it_is_as_good():
    w = torch.full((64, 64), 1e-5, dtype=F64, requires_grad=True)
    x = torch.linspace(0.5, 1, 64, dtype=F64)
    found = diagnose(lambda z: torch.tanh(z @ w) + x, torch.zeros(4, 64, dtype=F64), estimators=(IFT(), JFB()))
    assert found.bias["JFB"].error < 0.01
    faster = found.bias["JFB"].time <= 0.8 * found.bias["IFT"].time
    lighter = found.bias["JFB"].peak <= 1.1 * found.bias["IFT"].peak
    assert found.recommendation.grad == (JFB() if faster and lighter else IFT())


class Layer(nn.Module):
    """Everything that an evaluation may change: statistics, spectral vectors, a generator."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.dropout = nn.Dropout(0.2)
        self.rng = torch.Generator().manual_seed(3)

    def forward(self, z, x):
        noise = torch.rand(z.shape, generator=self.rng)
        return 0.3 * self.dropout(self.linear(self.norm(z))) + x + 0.01 * noise + random.random() + np.random.rand()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", ["module", "closure", "method"])
def test_modules_and_random_state_are_left_as_they_were(training, wrap):
    torch.manual_seed(0)
    layer = Layer().train(training)
    f = {"module": layer, "closure": lambda z, x: layer(z, x), "method": layer.forward}[wrap]
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    versions = {name: t._version for name, t in layer.named_parameters()}
    drawn = layer.rng.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy()
    found = diagnose(f, torch.zeros(4, 8), torch.ones(4, 8), budget=200)
    assert Condition.NOISY in found.conditions
    assert layer.training == training
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert versions == {name: t._version for name, t in layer.named_parameters()}
    assert all(p.grad is None for p in layer.parameters())
    assert torch.equal(layer.rng.get_state(), drawn[0]) and torch.equal(torch.get_rng_state(), drawn[1])
    assert (np.random.get_state()[1] == drawn[2]).all()


def test_random_numbers_of_python_are_put_back():  # diagnose itself is watched by a checker that draws some
    with restored():
        before = random.getstate()
        random.random()
    assert random.getstate() == before


def test_batch_normalization_is_coupled_in_training_and_not_in_evaluation():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()).double()
    x = torch.randn(6, 8, dtype=F64)
    statistics = layer[1].running_mean.clone()
    for training in (True, False):
        layer.train(training)
        found = diagnose(lambda z, x: 0.4 * layer(z) + x, torch.zeros(6, 8, dtype=F64), x, estimators=())
        assert (Condition.COUPLED in found.conditions) == training
        assert found.recommendation.batch_dims == (0 if training else 1)
    assert torch.equal(layer[1].running_mean, statistics)


def test_a_map_without_derivatives_is_diagnosed_as_far_as_it_goes():
    def f(z):
        return torch.from_numpy(np.cos(z.detach().numpy()))

    found = diagnose(f, torch.ones(2, 3, dtype=F64))
    assert found.found
    assert found.spectrum is None
    assert found.conditions == {Condition.CONTRACTIVE} and not found[Condition.CONTRACTIVE].certain
    assert any("derivative" in missing for missing in found.missing)


def test_nested_states_and_whole_state_systems():
    def f(z):
        a, b = z["a"], z["b"]
        return {"a": 0.5 * torch.cos(a) + 0.1 * b, "b": 0.3 * torch.sin(a + b)}

    z0 = {"a": torch.ones(2, 3, dtype=F64), "b": torch.ones(2, 3, dtype=F64)}
    assert diagnose(f, z0, estimators=()).conditions == {Condition.CONTRACTIVE}
    whole = diagnose(lambda z: 0.5 * torch.cos(z), torch.ones(5), batch_dims=0, estimators=())
    assert whole.shape[:2] == (1, 5)
    assert "batch_dims=0" in whole.recommendation.code


def test_the_report_is_frozen_printed_and_drawn():
    known = contractive(16, 2, F64)
    found = report(known)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.budget = 3
    text = str(found)
    assert len(re.findall(r"implicit\.fixed_point\(", text)) == 1
    for row in found.solvers:
        assert f"| {row.name}" in text
    figure = found.plot()
    assert len(figure.axes) == 2
    assert len(figure.axes[0].lines) == len(found.solvers)
    assert same is diagnose


def test_impossible_arguments_are_refused():
    z0 = torch.ones(1, 1)
    with pytest.raises(ValueError, match="stop"):
        diagnose(torch.cos, z0, stop=Stop(rtol=0, atol=0))
    with pytest.raises(ValueError, match="budget"):
        diagnose(torch.cos, z0, budget=0)
    with pytest.raises(ValueError, match="shape"):
        diagnose(lambda z: z[:, :1], torch.ones(2, 2))
    with pytest.raises(TypeError, match="solver"):
        diagnose(torch.cos, z0, solvers=["anderson"])
    with pytest.raises(TypeError, match="grad"):
        diagnose(torch.cos, z0, estimators=[IFT])
    with pytest.raises(TypeError, match="stop"):
        diagnose(torch.cos, z0, stop=1e-4)
