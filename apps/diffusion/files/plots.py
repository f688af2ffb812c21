"""Figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def loss_curve(history: Sequence[tuple[int, float]], path: Path, title: str) -> None:
    """Draws the loss over the images seen, as means of 25 steps and as a moving average, on a logarithmic axis.

    Args:
        history: pairs (images seen, mean loss of 25 steps).
        path: path of the PNG file.
        title: title of the figure.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    images, losses = (np.array(column, dtype=float) for column in zip(*history, strict=True))
    axes.plot(images, losses, color="tab:blue", alpha=0.35, linewidth=1, marker=".", label="mean of 25 steps")
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        middle = images[(width - 1) // 2 :][: len(smooth)]
        axes.plot(middle, smooth, color="tab:blue", linewidth=2, label=f"mean of {25 * width}")
    axes.set(xlabel="images seen", ylabel="mean squared error", yscale="log", title=title)
    for side in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        side("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def timestep_curves(timesteps: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draws curves over the timesteps, with the noisiest timestep at the left and a panel for each quantity.

    Args:
        timesteps: timesteps in the order of sampling.
        panels: quantity -> name of a curve -> values at the timesteps, NaN for a missing value.
        path: path of the PNG file.
    """
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (quantity, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in curves.items():
            axes.plot(timesteps, values, marker=".", label=name)
        axes.set(xlabel="timestep", ylabel=quantity)
        axes.invert_xaxis()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
