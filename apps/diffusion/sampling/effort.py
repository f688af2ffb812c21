"""What sampling costs: evaluations, residuals, block passes, multiply-accumulates, seconds."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What sampling N images over K timesteps cost.

    Counts are per sample, guidance's second row included, unrequested places of a chunk excluded; `computed`
    counts everything.

    Attributes:
        evaluations: (N, K) evaluations of the fixed-point layer; 0 for an explicit network.
        residuals: (N, K) relative residual ||f(z) - z|| / ||f(z)|| that each solve ended with, the worse of
            the two with guidance; NaN for an explicit network.
        block_passes: (N,) transformer blocks applied.
        macs: (N,) multiply-accumulates.
        seconds: wall time of the whole call.
        computed: transformer blocks applied in all, to all rows of all chunks: unrequested places
            and samples that had met their tolerance before their batch-mates are in it.
    """

    evaluations: Int[Tensor, "N K"]
    residuals: Float[Tensor, "N K"]
    block_passes: Int[Tensor, "N"]
    macs: Int[Tensor, "N"]
    seconds: float
    computed: int = 0

    def summary(self) -> dict[str, float]:
        """Means per sample, seconds too (residual: median over samples and timesteps), for a log or JSON.

        An explicit network has no evaluations and no residual to report.
        """
        means = {"block_passes": self.block_passes, "macs": self.macs, "evaluations": self.evaluations.sum(1)}
        summary = {name: float(value.double().mean()) for name, value in means.items() if value.any()}
        if self.evaluations.any():
            summary["residual"] = float(self.residuals.median())
        return {**summary, "seconds": self.seconds / len(self.macs)}
