"""The sampling loop: model x scheduler x guidance x iterations x reuse; it reports its effort.

Sample i is a function of (seed, i, its label) alone. Its noise, the first and the ancestral, comes from a
generator of its own, hashed from (seed, i). Arithmetic depends on the batch: a matrix product of 16 rows may round
otherwise than one of 3. Hence two modes:

    reproducible      the network is called on chunks of one fixed size, and sample i has place i mod size of its chunk;
                      places that are not requested are computed and dropped. Images are the same to the last bit
                      for every set and order of requested samples and every number of processes, on one kind of device
                      with one chunk size. A single image costs as much as a chunk; whole chunks, [0, size),
                      [size, 2 size), ..., cost nothing extra.
    otherwise         requested samples alone, in batches of at most the chunk size; images agree to rounding.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.models.cost import cost, explicit_blocks
from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.effort import Effort as Effort
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.reverse_step import Reverse, fresh_noise
from implicit import AbstractSolver, Solution, Stop

CHUNK = 16
Precision = Literal["no", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """N samples, on the CPU, in the order of the requested indices.

    Attributes:
        samples: (N, C, H, W) latents (or pixels) as the model generates them, not clipped.
        indices: numbers of the samples.
        labels: (N,) their classes; None for an unconditional model.
        effort: what they cost.
    """

    samples: Float[Tensor, "N C H W"]
    indices: tuple[int, ...]
    labels: Int[Tensor, "N"] | None
    effort: Effort

    @classmethod
    def joined(cls, parts: "Sequence[SampleResult]") -> "SampleResult":
        """Several results as one."""
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            samples=torch.cat([part.samples for part in parts]),
            indices=tuple(i for part in parts for i in part.indices),
            labels=torch.cat(labels) if labels else None,
            effort=Effort.joined([part.effort for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How an FPDM solves at each of K timesteps. A DiT ignores it.

    Args:
        iterations: evaluations at every timestep, or one number for each (see iteration_budget.py). None: the
            model's own.
        stop: a stopping criterion instead, for all or for each timestep; every sample stops on its own.
        solver: None: Picard, the plain iteration.
        reuse: start from earlier solutions; None: without them.

    Raises:
        ValueError: `iterations` together with `stop`.
    """

    iterations: int | Sequence[int] | None = None
    stop: Stop | Sequence[Stop] | None = None
    solver: AbstractSolver[Any] | None = None
    reuse: Reuse | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.stop is not None:
            raise ValueError("Solve.iterations and Solve.stop were both given; give one of them.")

    def at(self, k: int) -> dict[str, Any]:
        """The options of the model's call at the k-th timestep."""
        chosen = {"iterations": self.iterations, "stop": self.stop}
        options = {name: v[k] if isinstance(v, Sequence) else v for name, v in chosen.items()}
        return {**options, "solver": self.solver}

    def check(self, steps: int) -> None:
        """Raises ValueError where a list is not as long as the timesteps."""
        for name in ("iterations", "stop"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != steps:
                raise ValueError(f"Solve.{name} has {len(value)} entries for {steps} timesteps; give one for each.")


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    indices: Sequence[int],
    labels: Int[Tensor, "N"] | Sequence[int] | None = None,
    *,
    seed: int,
    scheduler: Any,
    timesteps: Sequence[int],
    eta: float = 0.0,
    guidance: Guidance | None = None,
    solve: Solve | None = None,
    shape: tuple[int, int, int] | None = None,
    chunk: int = CHUNK,
    reproducible: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: Precision = "no",
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Samples number `indices` of the stream `seed`, with these labels.

    Args:
        model: a DiT, an FPDM, or any function (x, t, y) -> prediction.
        indices: numbers of the samples, each >= 0, in any order.
        labels: (N,) one class for each; None for an unconditional model.
        seed: of the stream.
        scheduler: from `noise_schedule.make_scheduler`, or a diffusers scheduler that takes explicit timesteps.
        timesteps: decreasing (`timesteps.timesteps`).
        eta: DDIM's share of fresh noise.
        guidance: classifier-free guidance; None: without.
        solve: how an FPDM solves at each timestep; None: the model's own number of iterations.
        shape: (C, H, W) of a sample; None: the model's.
        chunk: samples in one call of the network (twice as many rows with guidance).
        reproducible: the same bits for every set of indices, by chunks of one size (see the top of this file).
        device: where the model is.
        dtype: of the state x.
        precision: "bf16": the network is called under autocast to bfloat16; x and the schedule stay in `dtype`.
        progress: called as progress(done, total) after each timestep of each batch.

    Raises:
        ValueError: labels that do not fit the indices or the model, impossible timesteps, guidance without labels,
            lists that are not as long as the timesteps, `solve` with a model that is neither FPDM nor DiT.
    """
    began = time.perf_counter()
    if solve is not None and not hasattr(model, "has_fixed_point"):
        raise ValueError(f"solve is for an FPDM, not for {type(model).__name__}; leave it out, or unwrap the model.")
    walk = _Walk(
        model=model,
        reverse=lambda: Reverse(scheduler, timesteps, eta=eta),
        guidance=guidance or Guidance(),
        solve=solve or Solve(),
        shape=shape or model.latent,  # pyright: ignore[reportFunctionMemberAccess]
        device=torch.device(device),
        dtype=dtype,
        precision=precision,
    )
    walk.solve.check(len(timesteps))
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    batches, steps = _batches(indices, labels, chunk, reproducible), len(timesteps)
    total, parts, ran = steps * len(batches), [], 0
    for number, batch in enumerate(batches):
        y = None if labels is None else batch.labels(labels)
        done = number * steps
        tick = (lambda k, done=done: progress(done + k, total)) if progress else None
        *columns, evaluated = walk.run([generator(seed, Stream.SAMPLE, i) for i in batch.samples], y, tick)
        parts.append([column[batch.rows] for column in columns])
        ran += evaluated
    order = torch.tensor([p for batch in batches for p in batch.positions]).argsort()
    x, evaluations, residuals = (torch.cat(column)[order] for column in zip(*parts, strict=True))
    rows = 2 if walk.guidance.doubles else 1
    block_passes, macs = cost(model, evaluations, rows)
    calls = rows * steps * sum(len(batch.samples) for batch in batches)  # rows that the network was called on
    effort = Effort(
        evaluations=evaluations,
        residuals=residuals,
        block_passes=block_passes,
        macs=macs,
        seconds=time.perf_counter() - began,
        computed=ran + calls * explicit_blocks(model),
    )
    return SampleResult(samples=x, indices=tuple(indices), labels=labels, effort=effort)


@dataclass(frozen=True)
class _Batch:
    """Samples that are computed together.

    Attributes:
        samples: number of the sample in each row.
        positions: of the requested ones, in the caller's list of indices.
        rows: of the requested ones, in the same order.
    """

    samples: list[int]
    positions: list[int]
    rows: list[int]

    def labels(self, labels: Tensor) -> Tensor:
        """The label of each row; rows that are not requested take any."""
        y = labels[self.positions[0]].repeat(len(self.samples))
        y[self.rows] = labels[self.positions]
        return y


def _batches(indices: Sequence[int], labels: Tensor | None, chunk: int, reproducible: bool) -> list[_Batch]:
    """The batches of the two modes at the top of this file."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no sample; give 1 or more.")
    if not indices or min(indices) < 0:
        raise ValueError("indices must name at least one sample, and none below 0.")
    if labels is not None and labels.shape != (len(indices),):
        raise ValueError(f"labels has shape {tuple(labels.shape)} for {len(indices)} indices; give one for each.")
    if not reproducible:
        parts = [list(range(len(indices)))[first : first + chunk] for first in range(0, len(indices), chunk)]
        return [_Batch([indices[p] for p in part], part, list(range(len(part)))) for part in parts]
    groups: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        groups.setdefault(index // chunk, []).append(position)
    return [
        _Batch(list(range(group * chunk, (group + 1) * chunk)), positions, [indices[p] % chunk for p in positions])
        for group, positions in groups.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """Everything that one batch needs on its way through the timesteps."""

    model: Callable[..., Any]
    reverse: Callable[[], Reverse]
    guidance: Guidance
    solve: Solve
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    precision: Precision

    def run(
        self,
        generators: Sequence[torch.Generator],
        y: Int[Tensor, "B"] | None,
        tick: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Samples (B, C, H, W), evaluations (B, K) and relative residuals (B, K) of one batch, on the CPU, and
        the evaluations that were made for all its rows.
        """
        reverse = self.reverse()  # schedulers of several steps have a state: each batch takes its own
        records = _Records(rows=2 if self.guidance.doubles else 1)
        y = None if y is None else y.to(self.device)
        blank = torch.empty(len(generators), *self.shape, device=self.device, dtype=self.dtype)
        x = reverse.start(fresh_noise(blank, generators))
        for k, t in enumerate(reverse.timesteps):
            prediction = self._predict(reverse.input(k, x), t, y, k, records)
            x = reverse.step(k, prediction, x, generators)
            if tick:
                tick(k + 1)
        return x.cpu(), *records.close(len(generators)), int(records.ran)

    def _predict(self, x: Tensor, t: int, y: Tensor | None, k: int, records: "_Records") -> Tensor:
        time_of_row = torch.full(x.shape[:1], t, device=self.device)
        null_class = getattr(self.model, "null_class", None)
        inputs = self.guidance.inputs(x, time_of_row, y, null_class)
        model_input = inputs[0].to(getattr(self.model, "dtype", x.dtype))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if getattr(self.model, "has_fixed_point", False):
                options = self.solve.at(k)
                if self.solve.reuse is not None:
                    options["start"] = self.solve.reuse.start(records.solutions)
                prediction, solution = self.model(model_input, *inputs[1:], **options, return_solution=True)
                records.add(solution, keep=self.solve.reuse is not None)
            else:
                prediction = self.model(model_input, *inputs[1:])
                records.skip()
        # guidance multiplies differences, so it is computed in the precision of x
        return self.guidance.combine(prediction.to(x.dtype), self.shape[0])


@dataclass
class _Records:
    """What the solves of one batch cost and, for reuse, the last two solutions."""

    rows: int
    solutions: list[Tensor] = field(default_factory=list)
    evaluations: list[Tensor | None] = field(default_factory=list)
    residuals: list[Tensor | None] = field(default_factory=list)
    ran: Tensor | int = 0  # evaluations, times the rows that go through each

    def add(self, solution: Solution, *, keep: bool) -> None:
        """Records the solve of one timestep."""
        size = torch.linalg.vector_norm(solution.value.float().flatten(1), dim=1)
        relative = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
        self.evaluations.append(solution.evals.unflatten(0, (self.rows, -1)).sum(0))
        self.residuals.append(relative.unflatten(0, (self.rows, -1)).amax(0))
        self.ran = self.ran + solution.evals.max() * len(solution.evals)
        if keep:
            self.solutions = [*self.solutions[-1:], solution.value]

    def skip(self) -> None:
        """Records a timestep of an explicit network."""
        self.evaluations.append(None)
        self.residuals.append(None)

    def close(self, batch: int) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Evaluations and relative residuals, on the CPU."""
        evaluations = [torch.zeros(batch, dtype=torch.int64) if e is None else e for e in self.evaluations]
        residuals = [torch.full((batch,), float("nan")) if r is None else r for r in self.residuals]
        return torch.stack(evaluations, dim=1).cpu(), torch.stack(residuals, dim=1).cpu()
