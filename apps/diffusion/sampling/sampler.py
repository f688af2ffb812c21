"""The sampling loop for a model, a scheduler, guidance, iterations and warm starts; it reports its effort.

Sample i is a function of (seed, i, its label) only. All its noise, that of the start and that of ancestral steps, comes
from a generator that is seeded by a hash of (seed, i). Rounding depends on the batch size: a matrix product with 16
rows may round differently from one with 3 rows. There are therefore two modes:

    reproducible      The network is called on chunks of one fixed size, in which sample i has row i mod size. Rows that
                      are not requested are computed and dropped. On one kind of device, with one chunk size, images are
                      equal to the last bit for every set and order of requested samples and every number of processes.
                      A single image costs as much as a chunk. Complete chunks, [0, size), [size, 2 size), ..., have no
                      extra cost.
    otherwise         Only requested samples are computed, in batches of at most the chunk size. Images are equal up to
                      rounding.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.batches import batches
from apps.diffusion.sampling.effort import Effort as Effort
from apps.diffusion.sampling.effort import EffortRecord
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.parallel import Parallel
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.reverse_step import Reverse, fresh_noise
from implicit import AbstractSolver, Solution, Stop

CHUNK = 16
Precision = Literal["no", "bf16"]


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """N samples, on the CPU, in the order of the requested indices.

    Attributes:
        samples: (N, C, H, W) latents (or pixels), not clipped.
        indices: numbers of the samples.
        labels: (N,) classes of the samples; None for an unconditional model.
        effort: cost of the samples.
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
    """The solves of an FPDM at K timesteps. A DiT ignores these options.

    Args:
        iterations: number of evaluations at every timestep, or one number per timestep (see iteration_budget.py). None:
            the number in the model's configuration, or as many as `stop` takes.
        stop: stopping criterion of all timesteps, or one per timestep, instead of iterations; every sample stops on its
            own. None: a fixed number of iterations.
        solver: solver of the fixed-point layer; None: Picard, the plain iteration.
        reuse: rule for starting from earlier timesteps' solutions; None: solves do not use earlier solutions.
        trace: whether to record the residual of every iteration (`Effort.traces`); needs one number of iterations.

    Raises:
        ValueError: both `iterations` and `stop` are given.
    """

    iterations: int | Sequence[int] | None = None
    stop: Stop | Sequence[Stop] | None = None
    solver: AbstractSolver[Any] | None = None
    reuse: Reuse | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        if self.iterations is not None and self.stop is not None:
            raise ValueError("Solve.iterations and Solve.stop were both given; give one of them.")

    def call(
        self, model: Callable[..., Any], inputs: tuple[Any, ...], k: int, solutions: Sequence[Solution]
    ) -> tuple[Tensor, Solution]:
        """The prediction and the solution of an FPDM at the k-th timestep.

        Args:
            model: the FPDM.
            inputs: (x, t, y), with twice the rows under guidance.
            k: number of the timestep.
            solutions: solutions at the last timesteps, newest last.
        """
        reuse, rows = self.reuse or Reuse(share=0.0), len(inputs[0])
        # where guidance begins or ends, the number of rows changes, and the solver state cannot be carried over
        carried = reuse.history and solutions and len(solutions[-1].value) == rows
        return model(
            *inputs,
            iterations=self.iterations[k] if isinstance(self.iterations, Sequence) else self.iterations,
            stop=self.stop[k] if isinstance(self.stop, Sequence) else self.stop,
            solver=self.solver,
            start=reuse.start([_with_rows(solution.value, rows) for solution in solutions]),
            state=solutions[-1].state if carried else None,
            keep_state=reuse.history,
            trace=self.trace,
            return_solution=True,
        )

    def alike(self) -> "Solve":
        """These options, checked for parallel sampling, in which all timesteps are solved at once.

        Raises:
            ValueError: the iterations differ between timesteps, or solves start from another timestep's solution.
        """
        for name in ("iterations", "stop"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(set(value)) > 1:
                raise ValueError(f"Solve.{name} differs between timesteps; give one value for parallel sampling.")
        if self.reuse is not None:
            raise ValueError(
                "Solve.reuse starts from the previous timestep's solution, which parallel sampling lacks; leave it out."
            )
        return self

    def check(self, steps: int) -> None:
        """Raises ValueError if a list does not have one entry for each of `steps` timesteps."""
        for name in ("iterations", "stop"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and len(value) != steps:
                raise ValueError(
                    f"Solve.{name} has {len(value)} entries for {steps} timesteps; give one entry for each timestep."
                )


def _with_rows(value: Tensor, rows: int) -> Tensor:
    """The solutions of an earlier timestep for a batch of `rows`.

    Guidance doubles the batch: labeled rows first, then unlabeled ones. At the timestep where it ends, the labeled half
    is kept; where it begins, the labeled solutions serve both halves.
    """
    return value[:rows] if len(value) >= rows else torch.cat([value, value])


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """The arguments of the sampling loop for one network; `plan.plan` makes them from sampling options.

    Args:
        scheduler: from `noise_schedule.make_scheduler`, or a diffusers scheduler that takes explicit timesteps.
        timesteps: timesteps, decreasing (`timesteps.timesteps`).
        eta: stochasticity of DDIM, 0 (deterministic) to 1.
        guidance: classifier-free guidance; default: no guidance.
        solve: the solves of an FPDM; None: the number of iterations in the model's configuration.
        parallel: options of solving for all timesteps at once (parallel.py); None: one timestep after another.
    """

    scheduler: Any
    timesteps: Sequence[int]
    eta: float = 0.0
    guidance: Guidance = field(default_factory=Guidance)
    solve: Solve | None = None
    parallel: Parallel | None = None

    def __post_init__(self) -> None:
        if self.parallel is not None and self.guidance.interval is not None:
            raise ValueError(
                "Guidance.interval makes timesteps differ, and parallel sampling treats all alike; leave one out."
            )


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    indices: Sequence[int],
    labels: Int[Tensor, "N"] | Sequence[int] | None = None,
    *,
    plan: SamplingPlan,
    seed: int,
    shape: tuple[int, int, int] | None = None,
    chunk: int = CHUNK,
    reproducible: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: Precision = "no",
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """The samples `indices` of the seed `seed`, with these labels.

    Args:
        model: a DiT, an FPDM, or any function (x, t, y) -> prediction.
        indices: numbers of the samples, each >= 0, in any order.
        labels: (N,) class of each sample; None for an unconditional model.
        plan: scheduler, timesteps, guidance and solves.
        seed: random seed.
        shape: (C, H, W) of a sample; None: the model's shape.
        chunk: number of samples in one call of the network (twice as many rows with guidance).
        reproducible: whether samples are equal to the last bit for every set of indices (see the top of this file).
        device: device of the model.
        dtype: dtype of the noisy image x.
        precision: "bf16": the network is called under autocast to bfloat16; x and the schedule stay in `dtype`.
        progress: called as progress(done, total) after each timestep of each batch; None: no progress is reported.

    Raises:
        ValueError: labels do not fit the indices or the model, timesteps are impossible, guidance has no labels, a list
            does not have one entry per timestep, a solve is given for a model that is neither FPDM nor DiT, or the
            scheduler or the solves of a parallel plan carry a state from timestep to timestep.
    """
    began = time.perf_counter()
    if plan.solve is not None and not hasattr(model, "has_fixed_point"):
        raise ValueError(f"solve is for an FPDM, not for {type(model).__name__}; leave it out, or unwrap the model.")
    solve = plan.solve or Solve()
    solve.check(len(plan.timesteps))
    solve = solve if plan.parallel is None else solve.alike()
    size = shape or cast(Any, model).latent
    trajectory = _Trajectory(
        model=model, plan=plan, solve=solve, shape=size, device=torch.device(device), dtype=dtype, precision=precision
    )
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device="cpu")
    groups, steps = batches(indices, labels, chunk, reproducible), len(plan.timesteps)
    total, parts, efforts = steps * len(groups), [], []
    for number, batch in enumerate(groups):
        y = None if labels is None else batch.labels(labels)
        done = number * steps
        tick = (lambda k, done=done: progress(done + k, total)) if progress else None
        x, effort = trajectory.run([generator(seed, Stream.SAMPLE, i) for i in batch.samples], y, tick)
        parts.append(x[batch.rows])
        efforts.append(effort.of(batch.rows))
    order = torch.tensor([p for batch in groups for p in batch.positions], device="cpu").argsort()
    effort = replace(Effort.joined(efforts).of(order), seconds=time.perf_counter() - began)
    return SampleResult(samples=torch.cat(parts)[order], indices=tuple(indices), labels=labels, effort=effort)


@dataclass(frozen=True, kw_only=True)
class _Trajectory:
    """The sampling of one batch over all timesteps."""

    model: Callable[..., Any]
    plan: SamplingPlan
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
    ) -> tuple[Float[Tensor, "B C H W"], Effort]:
        """The samples of one batch, on the CPU, and their cost."""
        plan = self.plan
        # a multistep scheduler carries a state, so each batch has its own `Reverse`
        reverse = Reverse(plan.scheduler, plan.timesteps, eta=plan.eta)
        record = EffortRecord(batch=len(generators), steps=len(plan.timesteps))
        y = None if y is None else y.to(self.device)
        blank = torch.empty(len(generators), *self.shape, device=self.device, dtype=self.dtype)
        x = reverse.start(fresh_noise(blank, generators))
        if plan.parallel is None:
            for k in range(record.steps):
                prediction = self._predict(reverse, range(k, k + 1), reverse.input(k, x).unsqueeze(1), y, record)[:, 0]
                x = reverse.step(k, prediction, x, generators)
                if tick:
                    tick(k + 1)
        else:
            drawn = [fresh_noise(x, generators) if reverse.adds_noise(k) else 0 * x for k in range(record.steps)]
            predict = partial(self._predict, reverse, y=y, record=record)
            x = plan.parallel.solve(predict, reverse, x, torch.stack(drawn, dim=1))
            if tick:
                tick(record.steps)
        return x.cpu(), record.close(self.model)

    def _predict(
        self, reverse: Reverse, ks: range, x: Float[Tensor, "B n C H W"], y: Tensor | None, record: EffortRecord
    ) -> Float[Tensor, "B n C_out H W"]:
        """The predictions for all samples at the timesteps number `ks`, from one call of the network."""
        times = torch.cat([torch.full((1,), reverse.times[k], device=self.device) for k in ks]).repeat(len(x))
        y = None if y is None else y.repeat_interleave(len(ks))
        null_class = getattr(self.model, "null_class", None)
        guidance = self.plan.guidance.at(reverse.timesteps[ks[0]])
        rows = 2 if guidance.doubles else 1
        noisy, *rest = guidance.inputs(x.flatten(0, 1), times, y, null_class)
        inputs = (noisy.to(getattr(self.model, "dtype", x.dtype)), *rest)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if getattr(self.model, "has_fixed_point", False):
                prediction, solution = self.solve.call(self.model, inputs, ks[0], record.solutions)
                record.enter(ks, solution, rows=rows, keep=self.solve.reuse is not None)
            else:
                prediction = self.model(*inputs)
                record.enter(ks, None, rows=rows)
        # guidance amplifies the rounding of a difference, so it is computed in the dtype of x
        guided = guidance.combine(prediction.to(x.dtype), self.shape[0])
        return guided.unflatten(0, (len(x), len(ks)))
