"""What sampling costs: evaluations, residuals, block passes, multiply-accumulates, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What sampling N images over K timesteps cost.

    Counts are per sample, guidance's second row included, places of a chunk that are not requested excluded;
    `computed` counts everything.

    Attributes:
        evaluations: (N, K) evaluations of the fixed-point layer; 0 for an explicit network.
        residuals: (N, K) relative residual ||f(z) - z|| / ||f(z)|| that each solve ended with, the worse of
            the two with guidance; NaN for an explicit network.
        block_passes: (N,) transformer blocks applied.
        macs: (N,) multiply-accumulates.
        seconds: wall time of the whole call.
        computed: transformer blocks applied in all, to all rows of all batches: places that are not requested
            and samples that had converged before others of their batch are in it.
        rounds: (N,) calls of the network one after another: the timesteps, or fewer in parallel sampling.
        traces: (N, K, J) relative residual of each of J iterations, with `Solve.trace`.
    """

    evaluations: Int[Tensor, "N K"]
    residuals: Float[Tensor, "N K"]
    block_passes: Int[Tensor, "N"]
    macs: Int[Tensor, "N"]
    seconds: float
    computed: int = 0
    rounds: Int[Tensor, "N"] | None = None
    traces: Float[Tensor, "N K J"] | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Effort]") -> "Effort":
        """Of several calls over the same timesteps."""
        rows = ("evaluations", "residuals", "block_passes", "macs")
        rounds = [part.rounds for part in parts]
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in rows},
            rounds=None if any(r is None for r in rounds) else torch.cat(rounds),  # pyright: ignore[reportArgumentType]
            seconds=sum(part.seconds for part in parts),
            computed=sum(part.computed for part in parts),
        )

    def summary(self) -> dict[str, float]:
        """Means per sample, seconds too (residual: median over samples and timesteps), for a log or JSON.

        An explicit network has no evaluations and no residual to report.
        """
        means = {"block_passes": self.block_passes, "macs": self.macs, "evaluations": self.evaluations.sum(1)}
        summary = {name: float(value.double().mean()) for name, value in means.items() if value.any()}
        if self.evaluations.any():
            summary["residual"] = float(self.residuals.median())
        if self.rounds is not None:
            summary["rounds"] = float(self.rounds.double().mean())
        return {**summary, "seconds": self.seconds / len(self.macs)}
