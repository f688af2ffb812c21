"""Iterations per timestep that spend a given budget.

A call of a model with `explicit` blocks around its fixed-point layer and k iterations costs explicit + k block passes,
and base + k slope multiply-accumulates (MACs). An iteration takes 1.3 to 1.5 times the MACs of a block. At equal block
passes an FPDM therefore takes more MACs than a DiT; a comparison at equal cost needs equal MACs. The first timestep is
the noisiest.
"""

import math
from typing import Literal

from apps.diffusion.config.checks import check_word
from apps.diffusion.models.fpdm import FPDM

Shape = Literal["constant", "increasing", "decreasing"]


def spread(total: int, steps: int, shape: Shape = "constant") -> tuple[int, ...]:
    """`total` iterations distributed over `steps` timesteps, at least one iteration per timestep.

    The iterations beyond one per timestep are distributed equally ("constant"), or in proportion to k at the k-th
    timestep, k = 1 ... steps ("increasing": most iterations near the image), or in the reverse order ("decreasing").
    The largest-remainder method rounds the shares, so that the sum is `total`.

    Raises:
        ValueError: there are fewer iterations than timesteps, or the shape is unknown.
    """
    check_word("shape", shape, Shape)
    if steps < 1 or total < steps:
        raise ValueError(
            f"{total} iterations are fewer than one for each of {steps} timesteps; raise the budget or use fewer steps."
        )
    weights = [1] * steps if shape == "constant" else list(range(1, steps + 1))
    if shape == "decreasing":
        weights.reverse()
    spare, whole = total - steps, sum(weights)
    shares = [spare * w // whole for w in weights]
    remainders = [spare * w % whole for w in weights]
    by_remainder = sorted(range(steps), key=lambda k: (-remainders[k], -weights[k], k))
    for k in by_remainder[: spare - sum(shares)]:
        shares[k] += 1
    return tuple(1 + share for share in shares)


def within_block_passes(
    model: FPDM, budget: int, steps: int, shape: Shape = "constant", *, guided: bool = False
) -> tuple[int, ...]:
    """Iterations per timestep that spend exactly `budget` block passes per sample.

    With guidance the model is called on two rows per sample, and the block passes of both rows count.

    Raises:
        ValueError: the budget is too small for one iteration at each timestep, or is odd with guidance.
    """
    explicit = model.block_passes(1) - 1
    rows = 2 if guided else 1
    if budget % rows:
        raise ValueError(
            f"A budget of {budget} block passes cannot be spent exactly with guidance, which applies every block to "
            "two rows; make it even."
        )
    total = budget // rows - steps * explicit
    least = rows * steps * (explicit + 1)
    if total < steps:
        raise ValueError(
            f"A budget of {budget} block passes is too small for {steps} timesteps, which cost {least} with one "
            f"iteration each. Raise the budget to at least {least}, or take fewer steps."
        )
    return spread(total, steps, shape)


def within_macs(
    model: FPDM, budget: float, steps: int, shape: Shape = "constant", *, guided: bool = False
) -> tuple[int, ...]:
    """Iterations per timestep that spend at most `budget` MACs per sample. The remainder of the budget is less than one
    iteration (of two rows, with guidance).

    Raises:
        ValueError: the budget is too small for one iteration at each timestep.
    """
    rows = 2 if guided else 1
    if not 0 < budget < math.inf:
        raise ValueError(f"A budget of macs={budget} cannot be spent; give a finite number above 0.")
    slope = model.macs(2) - model.macs(1)
    total = int((budget / rows - steps * (model.macs(1) - slope)) // slope)
    least = rows * steps * model.macs(1)
    if total < steps:
        raise ValueError(
            f"A budget of {budget:.4g} MACs is too small for {steps} timesteps, which cost {least:.4g} with one "
            f"iteration each. Raise the budget to at least {least:.4g}, or take fewer steps."
        )
    return spread(total, steps, shape)
