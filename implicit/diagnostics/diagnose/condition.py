"""Conditions that a fixed-point problem can be in, and the findings of a diagnosis.

Setting: J = df/dz at the fixed point, lambda its eigenvalues. The iteration z' = d z + (1 - d) f(z) multiplies the
error along an eigenvector by d + (1 - d) lambda, which some damping d in [0, 1) brings inside the unit circle exactly
if Re lambda < 1. So there are three kinds of fixed point:

    contractive    |lambda| < 1 for all         plain iteration converges
    oscillating    some |lambda| >= 1, all of them with Re lambda < 1: plain iteration fails, a damped one converges
    expanding      some Re lambda >= 1          no damping helps; solvers that use the Jacobian or differences do
"""

import enum
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


class Condition(enum.Enum):
    """Conditions that a diagnosis can find; the value is the printed name."""

    CONTRACTIVE = "contractive"
    OSCILLATING = "oscillating"
    EXPANDING = "expanding"
    NON_NORMAL = "strongly non-normal"
    KINKED = "kinked"
    NOISY = "noisy f"
    COUPLED = "coupled samples"
    SEVERAL_FIXED_POINTS = "several fixed points"
    STARTS_AT_EQUILIBRIUM = "starts at its equilibrium"
    BELOW_ROUNDING = "tolerance below rounding"
    NONFINITE = "f is not finite"

    @property
    def advice(self) -> str:
        """The consequence of the condition, or what to do about it."""
        return _ADVICE[self]


_ADVICE = {
    Condition.CONTRACTIVE: "Plain iteration converges near the fixed point; accelerated solvers take fewer steps.",
    Condition.OSCILLATING: "Plain iteration overshoots; damping or an accelerated solver converges.",
    Condition.EXPANDING: "No damping makes plain iteration converge; use Multisecant, Broyden or NewtonKrylov.",
    Condition.NON_NORMAL: "Residuals grow for some steps before they shrink; use a window longer than that transient.",
    Condition.KINKED: "f has no derivative at the fixed point; a gradient there is one of several possible ones.",
    Condition.NOISY: "Draw dropout masks and noise once before the solve, and put f into evaluation mode.",
    Condition.COUPLED: "Pass batch_dims=0, which makes the whole state one system.",
    Condition.SEVERAL_FIXED_POINTS: "The answer depends on the start; fix the start, and train and evaluate from it.",
    Condition.STARTS_AT_EQUILIBRIUM: "The solve changes nothing; inject the input into f, or pass another start.",
    Condition.BELOW_ROUNDING: "No solver can meet this tolerance in this dtype; loosen rtol, or use float64.",
    Condition.NONFINITE: "Check f at the start; scale the state or use a wider dtype.",
}


@dataclass(frozen=True)
class Finding:
    """A condition that was found.

    Attributes:
        condition: the condition.
        evidence: the measured numbers that show the condition, as text.
        samples: numbers of the samples that the condition holds for; 0 if the batch is one system.
        certain: False if the numbers are close to the threshold, or were measured at a point that is no fixed point.
    """

    condition: Condition
    evidence: str
    samples: tuple[int, ...]
    certain: bool = True

    @classmethod
    def of(cls, condition: Condition, evidence: str, mask: Bool[Tensor, " B"], certain: bool = True) -> "Finding":
        """The finding of the samples in `mask`."""
        return cls(condition, evidence, tuple(torch.nonzero(mask).flatten().tolist()), certain)
