"""FPDM compared with DiTs of 3, 6, 12 and 28 blocks of the same width, at equal training time and several budgets.

digits     8 x 8 pixels, hidden size 64, four tokens; each network is trained for 2 and for 8 CPU minutes
mnist      28 x 28 pixels, hidden size 128, sixteen tokens; 10 and 40 CPU minutes

Networks predict the image, as the presets do. FPDM has one block before and one after the fixed-point layer. The
settings of FPDM, S-JFB's N and M and a contractive start of the layer (`--model.recurrent-init`), are compared with the
velocity as the target. The paper's baseline has 28 blocks; 140 and 280 block passes are two of the paper's budgets.
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
"""Settings of FPDM: N, M and the factor on the initial recurrent weights."""
BEST = "FPDM (2, 2), contractive"
"""The setting of the presets."""
DITS = tuple(f"DiT {depth}" for depth in DEPTHS)
VELOCITY = "digits, velocity"
LENGTHS = {VELOCITY: 1, "digits, short": 1, "digits, long": 4, "mnist": 5, "mnist, long": 20}
"""Training times by task, as multiples of the time of the scale."""
STEPS = {28: 5, 140: 20, 280: 20}
"""Timesteps of an FPDM by budget, in block passes or in the MACs of as many blocks. The depth of a DiT determines its
timesteps.
"""


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
    """The most iterations within the budget."""

    def solve(model: Any) -> Solve:
        if unit == "block passes":
            return Solve(iterations=within_block_passes(model, budget, steps))
        spent = budget * model.block_macs() + steps * model.outer_macs()  # MACs of embeddings and output are added
        return Solve(iterations=within_macs(model, spent, steps))

    return solve
