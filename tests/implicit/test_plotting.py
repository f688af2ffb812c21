from typing import Any

import matplotlib
import matplotlib.pyplot
import pytest
import torch

from implicit import JFB, Anderson, Picard, Stop, diagnostics, fixed_point, plotting

matplotlib.use("Agg")


def test_the_lines_are_the_traces_worst_samples():
    z0 = torch.tensor([[0.0], [1.0]])
    solved = {
        str(s): fixed_point(torch.cos, z0, solver=s, stop=Stop(rtol=1e-6), trace=True) for s in (Picard(), Anderson())
    }
    ax = plotting.convergence(solved)
    for line, (label, solution) in zip(ax.get_lines(), solved.items(), strict=True):
        x: Any = line.get_xdata()
        y: Any = line.get_ydata()
        assert solution.trace is not None
        assert line.get_label() == label and list(x) == list(range(1, len(solution.trace) + 1))
        assert y[0] == pytest.approx(1.0)  # |cos 0 - 0|
        assert y[-1] == pytest.approx(float(solution.trace[-1].nan_to_num(0).max()))
    matplotlib.pyplot.close("all")


def test_a_solution_without_a_trace_is_refused():
    with pytest.raises(ValueError, match="trace=True"):
        plotting.convergence({"one": fixed_point(torch.cos, torch.ones(1, 1))})
    matplotlib.pyplot.close("all")


def along(line) -> tuple[list[float], list[float]]:
    """The coordinates of a drawn line."""
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def test_the_spectrum_is_drawn_where_it_is():
    d = torch.tensor([[0.9, -0.5, 0.2]], dtype=torch.float64)
    ax = plotting.spectrum({"diagonal": diagnostics.spectrum(lambda z: z * d, torch.ones(2, 3, dtype=torch.float64))})
    dots, circle = ax.get_lines()
    assert sorted(along(dots)[0]) == pytest.approx([-0.5, -0.5, 0.2, 0.2, 0.9, 0.9])
    assert max(map(abs, along(dots)[1])) == pytest.approx(0, abs=1e-12)
    assert max(along(circle)[0]) == pytest.approx(1) and min(along(circle)[1]) == pytest.approx(-1, abs=1e-3)
    matplotlib.pyplot.close("all")


def test_alignment_is_drawn_in_rising_order_and_short_solves_are_marked():
    x = torch.tensor([[1.0, 0.2], [0.1, 0.9], [0.5, 0.5]])
    for budget, crosses in ((500, 0), (3, 3)):
        stop = Stop(max_evals=budget, rtol=1e-5, atol=0)
        found = diagnostics.path_independence(lambda z: 0.5 * z + x, torch.zeros(3, 2), solver=Picard(), stop=stop)
        line, marks = plotting.path_independence({"affine": found}).get_lines()
        assert along(line)[1] == sorted(found.score.tolist()) and len(along(marks)[0]) == crosses
    matplotlib.pyplot.close("all")


def test_the_penalty_is_drawn_as_a_root():
    line = plotting.penalty({"run": [torch.tensor([4.0, 16.0]), torch.tensor([1.0, 1.0])]}).get_lines()[0]
    assert along(line)[1] == [3.0, 1.0]
    matplotlib.pyplot.close("all")


def test_bias_against_cost():
    d = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    table = diagnostics.gradient_bias(
        lambda z: d * z + 1,
        torch.zeros(1, 1, dtype=torch.float64),
        estimators=[JFB(), JFB(3)],
        stop=Stop(rtol=1e-12, atol=0),
        repeats=0,
    )
    ax = plotting.gradient_bias({"affine": table})
    x, y = along(ax.get_lines()[0])
    assert x == [1, 3] and y == pytest.approx([0.5, 0.125])
    assert [text.get_text() for text in ax.texts] == ["JFB", "JFB(steps=3)"]
    matplotlib.pyplot.close("all")


def test_an_evaluation_that_gave_nan_for_every_sample_is_a_gap():
    trace = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [0.5, torch.nan]])
    drawn: Any = plotting.residuals({"one": trace}).get_lines()[0].get_ydata()
    assert list(drawn) == pytest.approx([2.0, torch.nan, 0.5], nan_ok=True)
    matplotlib.pyplot.close("all")
