"""Plots of solves and of the results of `implicit.diagnostics`. matplotlib is imported when a function is called."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicit.diagnostics.gradient_bias import GradientBias
from implicit.diagnostics.path_independence import PathIndependence
from implicit.diagnostics.spectral_radius import Spectrum
from implicit.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(solutions: Mapping[str, Solution], ax: "Axes | None" = None, *, relative: bool = False) -> "Axes":
    """Residual against evaluations, one line per label: the largest residual of the samples that still run.

    Args:
        solutions: label -> solution of a solve with ``trace=True``.
        ax: axes to draw into; None: a new figure.
        relative: divide by the first residual.

    Raises:
        ValueError: a solution has no trace.
    """
    traces: dict[str, Tensor] = {}
    for label, solution in solutions.items():
        if solution.trace is None:
            raise ValueError(f"The solution {label!r} has no trace: solve with trace=True.")
        traces[label] = solution.trace
    return residuals(traces, ax, relative=relative)


def residuals(traces: Mapping[str, Tensor], ax: "Axes | None" = None, *, relative: bool = False) -> "Axes":
    """Residual against evaluations, one line per label: the largest residual of the samples that still run.

    Args:
        traces: label -> (evaluations, B) residuals, NaN where a sample had finished.
        ax: axes to draw into; None: a new figure.
        relative: divide by the first residual.
    """
    ax = _axes(ax)
    for label, trace in traces.items():
        worst = trace.detach().nan_to_num(nan=-torch.inf).amax(dim=1).cpu()
        worst = worst.masked_fill(worst == -torch.inf, torch.nan)  # a gap where f gave NaN for every sample
        worst = worst / worst[0] if relative else worst
        ax.semilogy(range(1, len(worst) + 1), worst.tolist(), label=label)
    return _labeled(ax, "evaluations of f", "residual ||f(z) - z||" + (" / first" if relative else ""))


def spectrum(found: Mapping[str, Spectrum], ax: "Axes | None" = None) -> "Axes":
    """Ritz values of all samples in the complex plane, with the unit circle: Picard converges if all lie inside.

    Args:
        found: label -> result of `implicit.diagnostics.spectrum`.
        ax: axes to draw into; None: a new figure.
    """
    ax = _axes(ax)
    for label, one in found.items():
        values = one.values.flatten()
        values = values[~values.isnan()].cpu()
        ax.plot(values.real.tolist(), values.imag.tolist(), ".", ms=4, alpha=0.7, label=label)
    turn = [2 * math.pi * i / 200 for i in range(201)]
    ax.plot([math.cos(t) for t in turn], [math.sin(t) for t in turn], "k-", lw=0.8)
    ax.set_aspect("equal")
    return _labeled(ax, "Re, eigenvalues of df/dz", "Im", grid=False)


def path_independence(found: Mapping[str, PathIndependence], ax: "Axes | None" = None) -> "Axes":
    """The scores in rising order, one line per label: the line is flat at 1 if no sample depends on its start.

    Samples that did not converge in both solves are marked with a cross.

    Args:
        found: label -> result of `implicit.diagnostics.path_independence`.
        ax: axes to draw into; None: a new figure.
    """
    ax = _axes(ax)
    for label, one in found.items():
        order = one.score.argsort()
        score, short = one.score[order].tolist(), (~one.converged)[order].tolist()
        share = [(i + 0.5) / len(score) for i in range(len(score))]
        (line,) = ax.plot(share, score, ".-", label=label)
        open_ones = [i for i, is_short in enumerate(short) if is_short]
        ax.plot([share[i] for i in open_ones], [score[i] for i in open_ones], "x", color=line.get_color())
    return _labeled(ax, "share of the samples", "asymptotic alignment (cosine)")


def penalty(history: Mapping[str, Sequence[Tensor]], ax: "Axes | None" = None) -> "Axes":
    """||df/dz||_F / sqrt(N) over training: the mean over the batch, and its smallest and largest sample.

    Args:
        history: label -> one (B,) tensor of `implicit.diagnostics.jacobian_penalty` per training step.
        ax: axes to draw into; None: a new figure.
    """
    ax = _axes(ax)
    for label, steps in history.items():
        size = [step.detach().cpu().double().sqrt() for step in steps]
        at = range(len(size))
        (line,) = ax.plot(at, [float(s.mean()) for s in size], label=label)
        low, high = [float(s.min()) for s in size], [float(s.max()) for s in size]
        ax.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
    return _labeled(ax, "step", "||df/dz||_F / sqrt(N)")


def gradient_bias(tables: Mapping[str, GradientBias], ax: "Axes | None" = None) -> "Axes":
    """Relative error of each estimator against its time: lower is more accurate, further left is cheaper.

    Rows without a gradient are left out. Without times (``repeats=0``) the axis is the number of vector-Jacobian
    products.

    Args:
        tables: label -> result of `implicit.diagnostics.gradient_bias`; each label has a color.
        ax: axes to draw into; None: a new figure.
    """
    from matplotlib.ticker import LogLocator

    ax = _axes(ax)
    kept = {name: [r for r in table.rows if not math.isnan(r.error)] for name, table in tables.items()}
    timed = not any(math.isnan(r.time) for rows in kept.values() for r in rows)
    dots: list[tuple[str, float, float]] = []
    for name, rows in kept.items():
        new = [(r.name, r.time if timed else r.products, max(r.error, 1e-16)) for r in rows]
        ax.plot([x for _, x, _ in new], [y for _, _, y in new], "o", label=name)
        dots += new
    ax.set(xscale="log", yscale="log")
    ax.margins(x=0.2, y=0.1)
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for side in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
        side("{x:g}")
    _name_dots(ax, dots)
    cost = "time of forward and backward / forward" if timed else "vector-Jacobian products"
    return _labeled(ax, cost, "relative error of the gradient", legend=len(tables) > 1)


def _name_dots(ax: "Axes", dots: list[tuple[str, float, float]]) -> None:
    """Write the name of each dot to its right, or to its left near the edge, and lower if names would overlap."""
    per_point = ax.get_figure(root=True).dpi / 72  # pyright: ignore[reportOptionalMemberAccess]: drawn axes have one
    edge = ax.get_window_extent().x1 / per_point
    taken: list[tuple[float, float, float]] = []  # left, right and height of the names so far, in points
    for name, x, y in sorted(dots, key=lambda dot: -dot[2]):
        at, height = ax.transData.transform((x, y)) / per_point
        width = 4.6 * len(name)
        right = at + 5 + width > edge
        left, drop = (at - 5 - width, height) if right else (at + 5, height)
        while any(left < r and left + width > l and abs(drop - h) < 9 for l, r, h in taken):
            drop -= 1
        taken.append((left, left + width, drop))
        shift = (-5 if right else 5, drop - height - 2)
        side = "right" if right else "left"
        ax.annotate(name, (x, y), xytext=shift, textcoords="offset points", fontsize=8, ha=side)


def _labeled(ax: "Axes", x: str, y: str, *, grid: bool = True, legend: bool = True) -> "Axes":
    """The axes with labels, a grid and a legend."""
    ax.set(xlabel=x, ylabel=y)
    if grid:
        ax.grid(True, which="major", alpha=0.3)
    if legend:
        ax.legend()
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    import matplotlib.pyplot as plt

    return ax if ax is not None else plt.subplots(figsize=(6, 4), layout="constrained")[1]
