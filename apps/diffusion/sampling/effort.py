"""Cost of sampling: evaluations, residuals, block passes, multiply-accumulates, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.models.cost import cost, explicit_blocks
from implicit import Solution


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Cost of sampling N images over K timesteps.

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
        rows: dict[str, Any] = {}
        for name in _BY_SAMPLE:
            found = [getattr(part, name) for part in parts]
            rows[name] = None if any(value is None for value in found) else torch.cat(found)
        seconds, computed = sum(part.seconds for part in parts), sum(part.computed for part in parts)
        return cls(**rows, seconds=seconds, computed=computed)

    def of(self, rows: Any) -> "Effort":
        """Of these of the samples; `seconds` and `computed` stay those of the whole call."""
        values = {name: getattr(self, name) for name in _BY_SAMPLE}
        return replace(self, **{name: None if value is None else value[rows] for name, value in values.items()})

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


_BY_SAMPLE = ("evaluations", "residuals", "block_passes", "macs", "rounds", "traces")


def relative_residual(solution: Solution) -> Float[Tensor, " B"]:
    """||f(z) - z|| / ||z|| of every sample, in float32."""
    return solution.residual.detach().float() / _size(solution)


def _size(solution: Solution) -> Float[Tensor, " B"]:
    size = torch.linalg.vector_norm(solution.value.detach().float().flatten(1), dim=1)
    return size.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass
class EffortRecord:
    """Cost of the solves of one batch and, for reuse, the last two solutions."""

    batch: int
    steps: int
    solutions: list[Solution] = field(default_factory=list)
    evaluations: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)
    traces: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0  # rows of the network for each sample
    rounds: int = 0  # calls of the network one after another
    ran: Tensor | int = 0  # evaluations, times the rows that go through each

    def enter(self, ks: range, solution: Solution | None, *, rows: int, keep: bool = False) -> None:
        """Record one call of the network at timesteps number `ks`, on `rows` rows for each sample; an explicit network
        has no solution.
        """
        self.calls += rows * len(ks)
        self.rounds += 1
        if solution is None:
            return
        evaluations = solution.evals.unflatten(0, (rows, self.batch, len(ks))).sum(0)
        residuals = relative_residual(solution).unflatten(0, (rows, self.batch, len(ks))).amax(0)
        for i, k in enumerate(ks):
            self.evaluations[k] = self.evaluations.get(k, 0) + evaluations[:, i]
            self.residuals[k] = residuals[:, i]
            if solution.trace is not None:
                trace = (solution.trace / _size(solution)).nan_to_num()
                self.traces[k] = trace.unflatten(1, (rows, self.batch, len(ks))).amax(1)[:, :, i]
        self.ran = self.ran + solution.evals.max() * len(solution.evals)
        if keep:
            self.solutions = [*self.solutions[-1:], solution]

    def close(self, model: Any) -> Effort:
        """The effort of all rows of the batch, on the CPU, without the time."""
        none = torch.zeros(self.batch, dtype=torch.int64), torch.full((self.batch,), float("nan"))
        evaluations = torch.stack([self.evaluations.get(k, none[0]).cpu() for k in range(self.steps)], dim=1)
        residuals = torch.stack([self.residuals.get(k, none[1]).cpu() for k in range(self.steps)], dim=1)
        block_passes, macs = cost(model, evaluations, torch.full((self.batch,), self.calls))
        traces = [self.traces[k].mT.cpu() for k in sorted(self.traces)]
        return Effort(
            evaluations=evaluations,
            residuals=residuals,
            block_passes=block_passes,
            macs=macs,
            seconds=0.0,
            computed=int(self.ran) + self.batch * self.calls * explicit_blocks(model),
            rounds=torch.full((self.batch,), self.rounds),
            traces=torch.stack(traces, dim=1) if traces else None,
        )
