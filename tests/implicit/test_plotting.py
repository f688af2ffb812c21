from typing import Any

import matplotlib
import matplotlib.pyplot
import pytest
import torch

from implicit import Anderson, Picard, Stop, fixed_point, plotting

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
