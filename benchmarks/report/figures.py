"""The figures of the report."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Seeds = Sequence[float]
Curves = dict[str, dict[float, list[float]]]
"""Name of a network -> training time -> a number for each seed."""
FRECHET = "Fréchet distance (lower is better)"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _octaves(ax: Any, ticks: Sequence[int]) -> None:
    """A logarithmic x axis with these ticks."""
    if ticks:
        ax.set_xscale("log")
        ax.set_xlim(ticks[0] * 0.9, ticks[-1] * 1.1)
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()


def _line(ax: Any, points: Mapping[float, Seeds], label: str, **style: Any) -> None:
    """A line through the means over seeds, with error bars for the range over seeds."""
    known = {x: v for x, v in points.items() if v}
    if not known:
        ax.plot([], [], label=f"{label} (not measured)", **style)
        return
    xs = sorted(known)
    means = [statistics.fmean(known[x]) for x in xs]
    low = [m - min(known[x]) for m, x in zip(means, xs, strict=True)]
    high = [max(known[x]) - m for m, x in zip(means, xs, strict=True)]
    ax.errorbar(xs, means, yerr=(low, high), label=label, marker="o", capsize=3, **style)


def estimators(distances: Mapping[str, Seeds], path: Path) -> None:
    """One row of points per estimator."""
    figure, ax = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for row, values in enumerate(distances.values()):
        if values:
            ax.plot(values, [row] * len(values), "o", alpha=0.6, color="tab:blue")
            ax.plot(statistics.fmean(values), row, "|", markersize=22, color="black")
        else:
            ax.text(0.02, row, "not measured", transform=ax.get_yaxis_transform(), va="center")
    ax.set_yticks(range(len(distances)), list(distances))
    ax.invert_yaxis()
    ax.set_xlabel(f"{FRECHET}: seeds, and their mean")
    ax.set_title("Gradient estimators at equal training time")
    ax.grid(axis="x", alpha=0.3)
    _save(figure, path)


def budgets(found: Mapping[str, Mapping[str, Sequence[tuple[int, Seeds]]]], path: Path) -> None:
    """Fréchet distance by budget, in block passes (left) and in MACs (right), with the DiT first."""
    figure, axes = plt.subplots(2, 1, figsize=(7.5, 7.5), layout="constrained", sharex=True, sharey=True)
    labels = ("block passes per sample", "MACs per sample, counted in blocks of the DiT")
    shades = {name: shade for shade, name in enumerate(sorted({c for k in found.values() for c in k}, key=_number))}
    for ax, curves, label in zip(axes, found.values(), labels, strict=True):
        for name, points in curves.items():
            plain = name.startswith("DiT")
            style = {"color": "black", "linewidth": 2.5} if plain else {"color": f"C{shades[name] - 1}", "alpha": 0.85}
            _line(ax, {float(x): v for x, v in points}, name, **style)
        _octaves(ax, sorted({b for points in curves.values() for b, _ in points}))
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel(label)
        ax.set_ylabel(FRECHET)
        if any(v for points in curves.values() for _, v in points):
            _decimals(ax)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    figure.suptitle("Equal training time, equal sampling budget")
    _save(figure, path)


def _number(name: str) -> int:
    """The number of steps in the name of a split, by which curves are sorted; 0 for the DiT, which comes first."""
    return 0 if name.startswith("DiT") else int(name.split()[1])


def _decimals(ax: Any) -> None:
    """A logarithmic y axis with plain numbers."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [v for v in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50) if low <= v <= high]
    ax.set_yticks(ticks, [f"{v:g}" for v in ticks])
    ax.minorticks_off()


def reuse(found: Mapping[str, Mapping[int, Seeds]], path: Path) -> None:
    """Fréchet distance by iterations per step, with a line for each start."""
    figure, ax = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for name, points in found.items():
        _line(ax, {float(k): v for k, v in points.items()}, name)
    _octaves(ax, sorted({k for points in found.values() for k in points}))
    if any(v for points in found.values() for v in points.values()):
        _decimals(ax)
    ax.set_xlabel("iterations at each of 20 timesteps")
    ax.set_ylabel(FRECHET)
    ax.set_title("Where a timestep's solve starts")
    ax.legend(title="start")
    ax.grid(alpha=0.3)
    _save(figure, path)


def solvers(found: Mapping[str, Mapping[int, Sequence[Seeds]]], path: Path) -> None:
    """Residual and Fréchet distance by number of evaluations, with a line for each solver."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    for name, points in found.items():
        for ax, which in zip(axes, (0, 1), strict=True):
            _line(ax, {float(k): v[which] for k, v in points.items()}, name)
    for ax, label in zip(axes, ("median relative residual", FRECHET), strict=True):
        _octaves(ax, [2, 4, 8, 16])
        ax.set_xlabel("evaluations at each of 20 timesteps")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    if any(v[0] for points in found.values() for v in points.values()):
        axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle("Solvers in sampling")
    _save(figure, path)


def depth(found: Mapping[str, Curves], path: Path) -> None:
    """Fréchet distance by training time, with a panel for each data set and a line for each network (DiTs dashed)."""
    figure, axes = plt.subplots(1, len(found), figsize=(9.6, 4.2), layout="constrained")
    for ax, (task, curves) in zip(axes, found.items(), strict=True):
        for place, (name, points) in enumerate(curves.items()):
            style: dict[str, Any] = {}
            if name.startswith("DiT"):
                shade = {"3": 1.0, "6": 0.75, "12": 0.5}.get(name.split()[1], 0.3)
                style = {"linestyle": "--", "color": "black", "alpha": shade}
            shift = 1.04 ** (place - len(curves) // 2)  # side by side, since error bars overlap
            _line(ax, {x * shift: values for x, values in points.items()}, name, **style)
        minutes = sorted({int(x) for points in curves.values() for x in points})
        _octaves(ax, minutes)
        ax.set_xlim(minutes[0] * 0.85, minutes[-1] * 1.2)
        if any(v for points in curves.values() for v in points.values()):
            _decimals(ax)
        ax.set_xlabel("CPU minutes of training, one thread")
        ax.set_title(f"{task}, 20 steps")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(FRECHET)
    axes[0].legend(fontsize=8)
    _save(figure, path)
