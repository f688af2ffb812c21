"""Published digits and counts: those of plain iteration exactly, those of our solvers as upper bounds."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness import read_result
from benchmarks.problems import published_maps, systems
from benchmarks.report import published as report
from benchmarks.solvers.published import OURS, RESULT, exact_residuals, problems, run, sirius_residuals
from benchmarks.solvers.published_figures import KINSOL, R_PACKAGE, SIRIUS, SPEED_MAPPING, SYSTEMS

ROOT = Path(__file__).parents[2]
R = problems("R")
SUITE = problems("SpeedMapping")
CODES = problems("KINSOL")
SLOW = {"Consumption smoothing", "Perceptron", "Modified perceptron"}
PLAIN = [name for name, counts in R_PACKAGE.rows.items() if name not in SLOW and counts["Simple"] is not None]
# counts of the default solver: they may fall, not rise
BOUNDS = {
    ("KINSOL", "KINSOL analytic"): 5,
    ("KINSOL", "KINSOL Roberts"): 10,
    ("R", "Babylonian (1)"): 7,
    ("R", "Babylonian (100)"): 18,
    ("R", "cos"): 7,
    ("R", "x^(1/3)"): 9,
    ("R", "95 (18 - x)"): 5,
    ("R", "Simple vector"): 16,
    ("R", "Gas diffusion"): 22,
    ("R", "Equilibrium prices"): 9,
    ("R", "Perpetual put"): 47,
    ("SpeedMapping", "Hasselblad EM"): 41,
    ("SpeedMapping", "Exchange economy"): 7,
    ("SpeedMapping", "Three normals EM"): 34,
    ("SpeedMapping", "Higham correlation"): 27,
    ("SpeedMapping", "Power iteration"): 15,
    ("SpeedMapping", "Linear"): 56,
}
POSED = {"KINSOL": CODES, "R": R, "SpeedMapping": SUITE}


def test_the_residuals_of_sirius_are_ours_and_the_exact_ones():
    ours, exact = sirius_residuals(), [float(x) for x in exact_residuals()]
    assert ours[:4] == pytest.approx(list(SIRIUS[:4]), rel=1e-10)
    assert ours == pytest.approx(exact, rel=1e-9)
    # the last printed number is right to nine digits; ours is not farther from the exact one
    assert abs(ours[4] - exact[4]) <= abs(SIRIUS[4] - exact[4]) < 1e-9 * exact[4]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_iteration_takes_the_count_that_the_r_package_prints(name):
    assert run(R[name], OURS["Picard"], 300)["calls"] == R_PACKAGE.rows[name]["Simple"]


def test_plain_iteration_takes_the_count_that_kinsol_prints():
    assert run(CODES["KINSOL analytic"], OURS["Picard"], 300)["calls"] == 5


def test_plain_iteration_diverges_where_the_r_package_does():
    assert not run(R["95 (18 - x)"], OURS["Picard"], 300)["solved"]
    assert R_PACKAGE.rows["95 (18 - x)"]["Simple"] is None


@pytest.mark.parametrize(("table", "name"), BOUNDS)
def test_the_default_takes_no_more_than_its_count(table, name):
    outcome = run(POSED[table][name], None, 300)
    assert outcome["solved"] and outcome["calls"] + outcome["products"] <= BOUNDS[table, name]


@pytest.mark.parametrize("name", ["Power iteration", "Linear", "Exchange economy"])
def test_anderson_with_thirty_pairs_takes_no_more_than_speed_mapping_does(name):
    assert run(SUITE[name], OURS["Anderson(30)"], 300)["calls"] <= SPEED_MAPPING.rows[name]["AA"]


def test_a_run_counts_products_apart_and_stops_at_the_first_point_that_passes():
    outcome = run(CODES["KINSOL analytic"], OURS["NewtonKrylov"], 300)
    assert outcome["solved"] and 0 < outcome["products"] <= outcome["calls"]
    failed = run(R["95 (18 - x)"], OURS["Picard"], 7)
    assert failed["calls"] <= 8 and failed["result"] in ("MAX_EVALS", "NONFINITE")
    assert failed["residual over tolerance"] > 1


def test_weights_lost_in_rounding_do_not_count_as_a_perceptron():
    problem = R["Perceptron"]
    huge = torch.tensor([[1.7672e17, 1.1367e18, -4.2149e17]], dtype=torch.float64)
    assert problem.accept is not None
    assert float(problem.residual(huge)) <= 1 and not problem.accept(huge)


def test_the_result_file_holds_every_posed_problem_and_every_solver():
    tables = read_result(RESULT)["tables"]
    assert set(tables["Systems"]["rows"]) == {p.name for p in systems()} == set(SYSTEMS.rows)
    for table, posed in POSED.items():
        assert set(tables[table]["rows"]) == set(posed)
        assert all(set(row) == set(OURS) for row in tables[table]["rows"].values())
        assert {"device", "versions", "commit"} <= set(tables[table])
    assert set(KINSOL.rows) == set(CODES) and set(R_PACKAGE.rows) == set(R)
    assert set(SPEED_MAPPING.rows) - set(SUITE) == set(report.MISSING)
    assert {p.name for p in published_maps()} >= {*CODES, *R, *SUITE}


def test_slow_plain_counts_of_the_result_file_are_the_published_ones():
    rows = read_result(RESULT)["tables"]["R"]["rows"]
    for name in ("Consumption smoothing", "Perceptron"):
        assert rows[name]["Picard"]["calls"] == R_PACKAGE.rows[name]["Simple"]
    apart = rows["Modified perceptron"]["Picard"]["calls"] - R_PACKAGE.rows["Modified perceptron"]["Simple"]
    assert abs(apart) <= 10


def test_the_page_is_what_the_result_file_gives():
    assert (ROOT / "docs/published.md").read_text() == report.page(read_result(RESULT))


@pytest.mark.parametrize(
    ("ours", "theirs", "word"),
    [(None, None, "neither"), (None, 3, "behind"), (3, None, "ahead"), (3, 3, "equal"), (4, 3, "behind")],
)
def test_verdicts(ours, theirs, word):
    assert report.verdict(ours, theirs) == word
