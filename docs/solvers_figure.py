"""Draws docs/images/solvers.png: work against precision on four of the test problems."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from implicit import Anderson, AndersonGS, Broyden, Picard, Stop, fixed_point, plotting
from implicit.testing import problem

SOLVERS = (Picard(), Anderson(), AndersonGS(), Broyden())


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharey=True, layout="constrained")
    for ax, name in zip(axes.flat, ("adaLN block", "linear 0.99", "non-normal", "repelling"), strict=True):
        p, stop = problem(name), Stop(rtol=1e-10, atol=0, max_evals=150)
        with torch.no_grad():
            solved = {type(s).__name__: fixed_point(p, p.z0, *p.args, solver=s, stop=stop, trace=True) for s in SOLVERS}
        plotting.convergence(solved, ax, relative=True)
        ax.set_title(f"{name} (spectral radius {float(p.radius.max()):.2f})")
        ax.set_ylim(1e-12, 1e3)
        ax.set_ylabel("residual / first residual" if ax in axes[:, 0] else "")
        if ax is not axes[0, 0]:
            ax.get_legend().remove()
    figure.savefig(Path(__file__).parent / "images" / "solvers.png", dpi=100)


if __name__ == "__main__":
    main()
