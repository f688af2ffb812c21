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

    Counts are per sample and include the second row of guidance. They exclude the rows of a chunk that are not
    requested; `computed` includes these rows.

    Attributes:
        evaluations: (N, K) evaluations of the fixed-point layer; 0 for an explicit network.
        residuals: (N, K) relative residual ||f(z) - z|| / ||f(z)|| at the end of each solve, with guidance the larger
            of the two rows' residuals; NaN for an explicit network.
        block_passes: (N,) evaluations of a transformer block.
        macs: (N,) multiply-accumulates.
        seconds: wall time of the complete call.
        computed: evaluations of a transformer block for all rows of all batches, including rows that are not requested
            and samples that converged before others of their batch.
        rounds: (N,) successive calls of the network: the number of timesteps, or fewer in parallel sampling.
        traces: (N, K, J) relative residual of each of J iterations; None without `Solve.trace`.
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
        """The effort of several calls over the same timesteps."""
        rows: dict[str, Any] = {}
        for name in _BY_SAMPLE:
            found = [getattr(part, name) for part in parts]
            rows[name] = None if any(value is None for value in found) else torch.cat(found)
        seconds, computed = sum(part.seconds for part in parts), sum(part.computed for part in parts)
        return cls(**rows, seconds=seconds, computed=computed)

    def of(self, rows: Any) -> "Effort":
        """The effort of the samples `rows`; `seconds` and `computed` stay those of the complete call."""
        values = {name: getattr(self, name) for name in _BY_SAMPLE}
        return replace(self, **{name: None if value is None else value[rows] for name, value in values.items()})

    def summary(self) -> dict[str, float]:
        """Means per sample, for a log or JSON; the residual is the median over samples and timesteps.

        The summary of an explicit network has no evaluations and no residual.
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
    """The residual of a solve divided by the norm of its value, for every sample, in float32."""
    return solution.residual.detach().float() / _size(solution)


def _size(solution: Solution) -> Float[Tensor, " B"]:
    size = torch.linalg.vector_norm(solution.value.detach().float().flatten(1), dim=1)
    return size.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass
class EffortRecord:
    """Cost of the calls of the network for one batch, and the last two solutions, from which later solves may start."""

    batch: int
    steps: int
    solutions: list[Solution] = field(default_factory=list)
    evaluations: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)
    traces: dict[int, Tensor] = field(default_factory=dict)
    calls: int = 0  # rows of all calls of the network, for each sample
    rounds: int = 0  # successive calls of the network
    ran: Tensor | int = 0  # sum over solves of evaluations times rows

    def enter(self, ks: range, solution: Solution | None, *, rows: int, keep: bool = False) -> None:
        """Record one call of the network.

        Args:
            ks: numbers of the timesteps.
            solution: the solve; None for an explicit network.
            rows: rows of the call for each sample, 2 with guidance.
            keep: whether to store the solution, for the start of later solves.
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
        """The effort of all samples of the batch, on the CPU, with 0 seconds."""
        zero = torch.zeros(self.batch, dtype=torch.int64, device="cpu")
        nan = torch.full((self.batch,), torch.nan, device="cpu")
        evaluations = torch.stack([self.evaluations.get(k, zero).cpu() for k in range(self.steps)], dim=1)
        residuals = torch.stack([self.residuals.get(k, nan).cpu() for k in range(self.steps)], dim=1)
        block_passes, macs = cost(model, evaluations, zero + self.calls)
        traces = [self.traces[k].mT.cpu() for k in sorted(self.traces)]
        return Effort(
            evaluations=evaluations,
            residuals=residuals,
            block_passes=block_passes,
            macs=macs,
            seconds=0.0,
            computed=int(self.ran) + self.batch * self.calls * explicit_blocks(model),
            rounds=zero + self.rounds,
            traces=torch.stack(traces, dim=1) if traces else None,
        )
