"""Cost of sampling: evaluations, residuals, block passes, multiply-accumulates, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        size = torch.linalg.vector_norm(solution.value.float().flatten(1), dim=1)
        relative = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
        evaluations = solution.evals.unflatten(0, (rows, self.batch, len(ks))).sum(0)
        residuals = relative.unflatten(0, (rows, self.batch, len(ks))).amax(0)
        for i, k in enumerate(ks):
            self.evaluations[k] = self.evaluations.get(k, 0) + evaluations[:, i]
            self.residuals[k] = residuals[:, i]
            if solution.trace is not None:
                trace = (solution.trace / size.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num()
                self.traces[k] = trace.unflatten(1, (rows, self.batch, len(ks))).amax(1)[:, :, i]
        self.ran = self.ran + solution.evals.max() * len(solution.evals)
        if keep:
            self.solutions = [*self.solutions[-1:], solution]

    def close(self) -> tuple[Any, ...]:
        """Evaluations, relative residuals, rows, rounds and traces, on the CPU, and the evaluations of all rows."""
        none = torch.zeros(self.batch, dtype=torch.int64), torch.full((self.batch,), float("nan"))
        evaluations = [self.evaluations.get(k, none[0]).cpu() for k in range(self.steps)]
        residuals = [self.residuals.get(k, none[1]).cpu() for k in range(self.steps)]
        counts = torch.full((self.batch,), self.calls), torch.full((self.batch,), self.rounds)
        traces = [self.traces[k].mT.cpu() for k in sorted(self.traces)]
        trace = torch.stack(traces, dim=1) if traces else torch.empty(self.batch, 0, 0)
        return torch.stack(evaluations, dim=1), torch.stack(residuals, dim=1), *counts, trace, int(self.ran)
