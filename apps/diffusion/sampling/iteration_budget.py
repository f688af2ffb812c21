"""Iterations per timestep, so that a budget is spent exactly.

A call of a model with `explicit` blocks around its fixed point and k iterations inside costs explicit + k
block passes, and base + k slope multiply-accumulates. An iteration costs 1.3 to 1.5 times what a block does,
so a budget in block passes flatters the fixed point, and one in MACs is fair. Timesteps are counted from the
noisiest on.
"""

import math
from typing import Literal

from apps.diffusion.config.checks import check_word
from apps.diffusion.models.fpdm import FPDM

Shape = Literal["constant", "increasing", "decreasing"]


def spread(total: int, steps: int, shape: Shape = "constant") -> tuple[int, ...]:
    """`total` iterations shared out over `steps` timesteps, at least one each.

    "increasing" gives the k-th timestep (k = 1 ... steps) a share proportional to k, so that most is spent
    near the image; "decreasing" the mirror image. Shares are rounded by largest remainder: the sum is
    `total`.

    Raises:
        ValueError: fewer iterations than timesteps, or an unknown shape.
    """
    check_word("shape", shape, Shape)
    if steps < 1 or total < steps:
        raise ValueError(
            f"{total} iterations cannot give each of {steps} timesteps one; raise the budget or take fewer steps."
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
    """Iterations per timestep that spend `budget` block passes a sample exactly.

    Guidance calls the model on two rows a sample, and both count.

    Raises:
        ValueError: the budget does not pay for one iteration at each timestep, or is odd with guidance.
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
            f"A budget of {budget} block passes is too small for {steps} timesteps: with one iteration each "
            f"they cost {least}. Raise it to {least} at least, or take fewer steps."
        )
    return spread(total, steps, shape)


def within_macs(
    model: FPDM, budget: float, steps: int, shape: Shape = "constant", *, guided: bool = False
) -> tuple[int, ...]:
    """Iterations per timestep that spend as much of `budget` MACs a sample as whole iterations can.

    What is left over is less than one iteration (of two rows, with guidance).

    Raises:
        ValueError: the budget does not pay for one iteration at each timestep.
    """
    rows = 2 if guided else 1
    if not 0 < budget < math.inf:
        raise ValueError(f"A budget of macs={budget} cannot be spent; give a finite number above 0.")
    slope = model.macs(2) - model.macs(1)
    total = int((budget / rows - steps * (model.macs(1) - slope)) // slope)
    least = rows * steps * model.macs(1)
    if total < steps:
        raise ValueError(
            f"A budget of {budget:.4g} MACs is too small for {steps} timesteps: with one iteration each they "
            f"cost {least:.4g}. Raise it to that at least, or take fewer steps."
        )
    return spread(total, steps, shape)
