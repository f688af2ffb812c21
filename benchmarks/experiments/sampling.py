"""Four studies of sampling with one FPDM and one DiT that are trained for equal time.

budgets      numbers of steps and iterations at 6 to 240 block passes, and at the MACs of as many DiT blocks
reuse        start of each solve: fresh, previous solution, blended, extrapolated; 1 to 10 iterations
allocation   constant, increasing, decreasing and tolerance-driven iterations
solvers      plain iteration, Anderson, Broyden: residual and quality by number of evaluations
"""

from collections.abc import Callable
from typing import Any, Literal

from apps.diffusion.models.dit import DiT
from apps.diffusion.sampling.iteration_budget import spread, within_block_passes, within_macs
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from benchmarks.experiments.common import SCALES, Cell, Way, dit, fpdm
from implicit import Anderson, Broyden, Picard, Stop

DEPTH = 6
BUDGETS = (6, 12, 18, 30, 60, 120, 240)
"""Budgets in block passes: 1, 2, 3, 5, 10, 20 and 40 steps of the DiT. The paper's budgets, 140 to 560, are 5 to 20
steps of its DiT.
"""
SPLITS = (1, 2, 3, 5, 10, 20, 40)
STARTS = {
    "fresh": None,
    "reused": Reuse(),
    "blended": Reuse(share=0.5),
    "extrapolated": Reuse(extrapolation=1.0),
}
SOLVERS = {"Picard": Picard(), "Anderson": Anderson(3), "Broyden": Broyden()}
TOLERANCES = (0.3, 0.1, 0.03)


def cells(scale: str) -> list[Cell]:
    seconds = SCALES[scale]["sampling"]
    ways = (*_budgets(), *_reuse(), *_allocation(), *_solvers())
    return [Cell("FPDM", fpdm(seconds), ways), Cell("DiT", dit(seconds), tuple(_baseline()))]


def _budgets() -> list[Way]:
    """The settings of each budget. An FPDM step of k iterations costs 2 + k block passes; a step of one iteration costs
    the MACs of 3.58 blocks.
    """
    ways = []
    for budget in BUDGETS:
        for steps in (n for n in SPLITS if budget <= 48 * n):
            if budget >= 3 * steps:
                name = f"{budget} block passes, {steps} steps"
                ways.append(
                    Way(name, steps, lambda m, b=budget, s=steps: Solve(iterations=within_block_passes(m, b, s)))
                )
            if budget >= 3.6 * steps:
                name = f"MACs of {budget} blocks, {steps} steps"
                ways.append(Way(name, steps, _in_macs(budget, steps)))
    return ways


def _in_macs(budget: int, steps: int) -> Callable[[Any], Solve]:
    def solve(model: Any) -> Solve:
        plain = DiT(**_shape(model))
        return Solve(iterations=within_macs(model, budget / DEPTH * plain.macs(), steps))

    return solve


def _shape(model: Any) -> dict[str, Any]:
    """The sizes of the DiT with which FPDM is compared, for its MACs."""
    from apps.diffusion.models import build

    described = build.describe(build.network(dit(1).model, model.latent, model.num_classes, 1, 0))
    return described["config"]


def _baseline() -> list[Way]:
    return [Way(f"{budget} block passes, {budget // DEPTH} steps", budget // DEPTH) for budget in BUDGETS]


def _reuse() -> list[Way]:
    return [
        Way(f"{name} start, {k} iterations", 20, lambda m, k=k, r=reuse: Solve(iterations=k, reuse=r))
        for name, reuse in STARTS.items()
        for k in (1, 2, 3, 5, 10)
    ]


def _allocation() -> list[Way]:
    """Allocations of three iterations per timestep on average, and tolerances, whose cost is measured."""
    shapes: tuple[Literal["constant", "increasing", "decreasing"], ...] = ("constant", "increasing", "decreasing")
    ways = [Way(f"{shape}, 60 in all", 20, lambda m, s=shape: Solve(iterations=spread(60, 20, s))) for shape in shapes]
    for rtol in TOLERANCES:
        stop = Stop(rtol=rtol, atol=0, max_evals=10)
        ways.append(Way(f"tolerance {rtol}", 20, lambda m, stop=stop: Solve(stop=stop, reuse=Reuse())))
    return ways


def _solvers() -> list[Way]:
    return [
        Way(f"{name}, {k} evaluations", 20, lambda m, k=k, s=solver: Solve(iterations=k, solver=s))
        for name, solver in SOLVERS.items()
        for k in (2, 4, 8, 16)
    ]
