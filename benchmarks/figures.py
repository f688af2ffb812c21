"""The figures of the report."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Seeds = Sequence[float]
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
    """Means with the range over seeds."""
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
    figure, ax = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
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


def budgets(curves: Mapping[tuple[str, int | str], Sequence[tuple[int, Seeds]]], path: Path) -> None:
    """Distance against the budget; left in block passes, right in MACs."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.3), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("block passes", "MACs"), strict=True):
        for (which, steps), points in sorted(curves.items(), key=lambda item: str(item[0][1]).zfill(3)):
            if which == kind and steps == "DiT":
                _line(ax, dict(points), "DiT, 6 blocks a step", color="black", linewidth=2.5)
            elif which == kind:
                _line(ax, dict(points), f"FPDM, {steps} steps", alpha=0.85)
        _octaves(ax, sorted({b for (which, _), points in curves.items() if which == kind for b, _ in points}))
        ax.set_xlabel("block passes per sample" if kind == "block passes" else "MACs per sample, in DiT blocks")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(FRECHET)
    axes[1].legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes[0].set_ylim(bottom=0)
    figure.suptitle("Equal training time, equal sampling budget")
    _save(figure, path)


def reuse(found: Mapping[str, Mapping[int, Seeds]], path: Path) -> None:
    """Distance against iterations per step, a line per start."""
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, points in found.items():
        _line(ax, {float(k): v for k, v in points.items()}, name)
    _octaves(ax, sorted({k for points in found.values() for k in points}))
    if any(v for points in found.values() for v in points.values()):
        ax.set_yscale("log")
    ax.set_xlabel("iterations at each of 20 timesteps")
    ax.set_ylabel(FRECHET)
    ax.set_title("Where a timestep's solve starts")
    ax.legend(title="start")
    ax.grid(alpha=0.3)
    _save(figure, path)


def solvers(found: Mapping[str, Mapping[int, Sequence[Seeds]]], path: Path) -> None:
    """Residual, and distance, against evaluations."""
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
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
