"""FPDM beside DiTs of 3, 6, 12 and 28 blocks of its width, at equal training time and over sampling budgets.

digits     8 x 8 pixels, hidden size 64, four tokens; each network trains 2 CPU minutes, and 8
mnist      28 x 28 pixels, hidden size 128, sixteen tokens; 10 CPU minutes, and 40

Networks predict the image, as the presets do. FPDM has one block before and one behind the fixed-point layer. Its
settings, S-JFB's N and M and a contractive start of the layer (`--model.recurrent-init`), were studied with the
velocity as target. 28 blocks are the paper's baseline; 140 and 280 block passes are two of its budgets.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from apps.diffusion.config.network import NoiseSchedule
from apps.diffusion.config.training import Config
from apps.diffusion.sampling.iteration_budget import within_block_passes, within_macs
from apps.diffusion.sampling.sampler import Solve
from benchmarks.experiments.common import SCALES, Cell, Way, dit, fixed, fpdm, on_mnist
from implicit import StochasticJFB

DEPTHS = (3, 6, 12, 28)
SETTINGS = {
    "FPDM (6, 3)": (6, 3, 1.0),
    "FPDM (2, 2)": (2, 2, 1.0),
    "FPDM (3, 3)": (3, 3, 1.0),
    "FPDM (2, 2), contractive": (2, 2, 0.0),
    "FPDM (3, 3), contractive": (3, 3, 0.0),
}
"""N, M and the factor on the recurrent weights at the start."""
BEST = "FPDM (2, 2), contractive"
"""The setting of the presets."""
DITS = tuple(f"DiT {depth}" for depth in DEPTHS)
VELOCITY = "digits, velocity"
LENGTHS = {VELOCITY: 1, "digits, short": 1, "digits, long": 4, "mnist": 5, "mnist, long": 20}
"""Training time in multiples of the scale's, by task."""
STEPS = {28: 5, 140: 20, 280: 20}
"""Timesteps of an FPDM by budget, in block passes or in MACs of as many blocks; a DiT's follow from its depth."""


def cells(scale: str) -> list[Cell]:
    return [
        Cell(f"{task}: {name}", _config(name, task, factor * SCALES[scale]["depth"]), _ways(name))
        for task, factor in LENGTHS.items()
        for name in (*DITS, *settings(task))
    ]


def settings(task: str) -> tuple[str, ...]:
    """The settings of FPDM that are trained on a task."""
    return tuple(SETTINGS) if task == VELOCITY else (BEST,)


def _config(name: str, task: str, seconds: float) -> Config:
    if name.startswith("DiT"):
        base = dit(seconds)
        model = replace(base.model, depth=int(name.split()[1]))
    else:
        free, tracked, factor = SETTINGS[name]
        base = fpdm(seconds, StochasticJFB(N=free, M=tracked), recurrent_init=factor)
        model = base.model
    schedule = NoiseSchedule() if task == VELOCITY else NoiseSchedule(prediction="sample")
    config = replace(base, model=model, schedule=schedule)
    return on_mnist(config) if task.startswith("mnist") else config


def _ways(name: str) -> tuple[Way, ...]:
    if name.startswith("DiT"):
        depth = int(name.split()[1])
        budgets = [Way(f"{budget} block passes", max(1, budget // depth)) for budget in STEPS]
        return (Way("5 steps", 5), Way("20 steps", 20), *budgets)
    budgets = [
        Way(f"{budget} {unit}", steps, _within(unit, budget, steps))
        for unit in ("block passes", "blocks' MACs")
        for budget, steps in STEPS.items()
    ]
    return (Way("5 steps", 5, fixed(3)), Way("20 steps", 20, fixed(10)), Way("20 x 1", 20, fixed(1)), *budgets)


def _within(unit: str, budget: int, steps: int) -> Callable[[Any], Solve]:
    """As many iterations as the budget pays for."""

    def solve(model: Any) -> Solve:
        if unit == "block passes":
            return Solve(iterations=within_block_passes(model, budget, steps))
        spent = budget * model.block_macs() + steps * model.outer_macs()  # every step pays for embedding and output
        return Solve(iterations=within_macs(model, spent, steps))

    return solve
