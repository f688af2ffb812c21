"""Draws docs/images/solvers.png: work against precision on four published maps; `python -m docs.solvers_figure`."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.problems import acceleration
from implicit import Anderson, AndersonGS, Broyden, Multisecant, Picard, Stop, fixed_point, plotting

SOLVERS = (Picard(), Anderson(), AndersonGS(), Broyden(), Multisecant())
MAPS = ("Three normals EM", "Bratu", "Self-consistent field", "Strongly non-normal")


def main() -> None:
    problems, stop = {p.name: p for p in acceleration()}, Stop(rtol=1e-8, max_evals=400)
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.5), sharey=True, layout="constrained")
    for ax, p in zip(axes.flat, (problems[name] for name in MAPS), strict=True):
        with torch.no_grad():
            found = [fixed_point(p.f, p.z0, *p.args, solver=solver, stop=stop, trace=True) for solver in SOLVERS]
        solved = {type(solver).__name__: solution for solver, solution in zip(SOLVERS, found, strict=True)}
        plotting.convergence(solved, ax, relative=True)
        ax.set(title=p.name, ylim=(1e-9, 1e3), ylabel="residual / first residual" if ax in axes[:, 0] else "")
        if ax is not axes[0, 0]:
            ax.get_legend().remove()
        print(p.name, {name: (int(s.evals.max()), bool(s.converged.all())) for name, s in solved.items()})
    figure.savefig(Path(__file__).parent / "images" / "solvers.png", dpi=100)


if __name__ == "__main__":
    main()
