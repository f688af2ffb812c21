"""The one sampling loop: model x scheduler x guidance x iterations x reuse; it reports its effort.

Sample i is a function of (seed, i, its label) alone. Its noise, the first and the ancestral, comes from a
generator of its own, hashed from (seed, i). Arithmetic is harder: a matrix product of 16 rows may round
otherwise than one of 3. So a network is only ever called on chunks of one fixed size, and sample i always
sits in place i mod size of its chunk; places that nobody asked for are computed and thrown away. With that,
images are the same to the last bit whatever is asked for together, in whichever order, by however many
processes (on one kind of device and with one chunk size). Asking for whole chunks, [0, size), [size, 2 size),
..., wastes nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.models.cost import cost, explicit_blocks
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.models.transformer import Frame
from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.effort import Effort as Effort
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.reverse_step import Reverse, fresh_noise
from implicit import AbstractSolver, Solution, Stop

CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """N samples, on the CPU, in the order in which they were asked for.

    Attributes:
        samples: (N, C, H, W) latents (or pixels) as the model makes them, not clipped.
        indices: which samples these are.
        labels: (N,) their classes; None for an unconditional model.
        effort: what they cost.
    """

    samples: Float[Tensor, "N C H W"]
    indices: tuple[int, ...]
    labels: Int[Tensor, "N"] | None
    effort: Effort


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How an FPDM solves at each of K timesteps. A DiT has nothing to solve and takes no notice of it.

    Args:
        iterations: evaluations at every timestep, or one number for each (see allocation.py). None: the
            model's own.
        stop: a tolerance instead, for all or for each timestep; every sample stops by itself.
        solver: how the next iterate is made; None is the naive iteration.
        reuse: start from earlier solutions; None starts fresh.

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
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> SampleResult:
    """Samples number `indices` of the stream `seed`, with these labels.

    Args:
        model: a DiT, an FPDM, or any function (x, t, y) -> prediction.
        indices: which samples, each >= 0; any subset in any order, the same bits (see the top of this file).
        labels: (N,) one class for each; None for an unconditional model.
        seed: of the stream.
        scheduler: from `schedule.make_scheduler`, or a diffusers scheduler that takes explicit timesteps.
        timesteps: the array to walk, falling (`schedule.timesteps`).
        eta: DDIM's share of fresh noise.
        guidance: classifier-free guidance; None is none.
        solve: how an FPDM solves at each timestep; None is the model's own count of iterations.
        shape: (C, H, W) of a sample; None takes the model's.
        chunk: samples in one call of the network (twice as many rows with guidance).
        device: where the model is.
        dtype: of the state x.
        progress: called as progress(done, total) after each timestep of each chunk.

    Raises:
        ValueError: labels that do not fit the indices or the model, an impossible array of timesteps,
            guidance without labels, lists that are not as long as the timesteps, `solve` with a model that is
            neither FPDM nor DiT.
    """
    began = time.perf_counter()
    if solve is not None and not isinstance(model, Frame):
        raise ValueError(f"solve is for an FPDM, not for {type(model).__name__}; leave it out, or unwrap the model.")
    solve = solve or Solve()
    solve.check(len(timesteps))
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    groups = _grouped(indices, labels, chunk)
    walk = _Walk(
        model=model,
        reverse=lambda: Reverse(scheduler, timesteps, eta=eta),
        guidance=guidance or Guidance(),
        solve=solve,
        shape=shape or model.latent,  # pyright: ignore[reportFunctionMemberAccess]
        device=torch.device(device),
        dtype=dtype,
    )
    total, parts, ran = len(groups) * len(timesteps), [], 0
    for number, (group, positions) in enumerate(groups.items()):
        places = torch.tensor([indices[p] % chunk for p in positions])
        y = None if labels is None else _placed(labels[positions], places, chunk)
        done = number * len(timesteps)
        tick = (lambda k, done=done: progress(done + k, total)) if progress else None
        own = [generator(seed, Stream.SAMPLE, group * chunk + place) for place in range(chunk)]
        *columns, evaluated = walk.run(own, y, tick)
        parts.append([column[places] for column in columns])
        ran += evaluated
    order = torch.tensor([p for positions in groups.values() for p in positions]).argsort()
    x, evaluations, residuals = (torch.cat(column)[order] for column in zip(*parts, strict=True))
    rows = 2 if walk.guidance.doubles else 1
    block_passes, macs = cost(model, evaluations, rows)
    calls = rows * chunk * total
    effort = Effort(
        evaluations=evaluations,
        residuals=residuals,
        block_passes=block_passes,
        macs=macs,
        seconds=time.perf_counter() - began,
        computed=ran + calls * explicit_blocks(model),
    )
    return SampleResult(samples=x, indices=tuple(indices), labels=labels, effort=effort)


def _grouped(indices: Sequence[int], labels: Tensor | None, chunk: int) -> dict[int, list[int]]:
    """Which positions of `indices` belong to which chunk."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} holds no sample; give 1 or more.")
    if not indices or min(indices) < 0:
        raise ValueError("indices must name at least one sample, and none below 0.")
    if labels is not None and labels.shape != (len(indices),):
        raise ValueError(f"labels has shape {tuple(labels.shape)} for {len(indices)} indices; give one for each.")
    groups: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        groups.setdefault(index // chunk, []).append(position)
    return groups


def _placed(labels: Tensor, places: Tensor, chunk: int) -> Tensor:
    """The labels (chunk,) of a whole chunk; places that nobody asked for take anybody's."""
    y = labels[0].repeat(chunk)
    y[places] = labels
    return y


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """Everything that one chunk's walk through the timesteps needs."""

    model: Callable[..., Any]
    reverse: Callable[[], Reverse]
    guidance: Guidance
    solve: Solve
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype

    def run(
        self,
        generators: Sequence[torch.Generator],
        y: Int[Tensor, "B"] | None,
        tick: Callable[[int], None] | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Samples (B, C, H, W), evaluations (B, K) and relative residuals (B, K) of one chunk, on the CPU, and
        the evaluations that were made for all its rows.
        """
        reverse = self.reverse()  # schedulers of several steps have a memory: each chunk takes its own
        books = _Books(rows=2 if self.guidance.doubles else 1)
        y = None if y is None else y.to(self.device)
        blank = torch.empty(len(generators), *self.shape, device=self.device, dtype=self.dtype)
        x = reverse.start(fresh_noise(blank, generators))
        for k, t in enumerate(reverse.timesteps):
            prediction = self._predict(reverse.input(k, x), t, y, k, books)
            x = reverse.step(k, prediction, x, generators)
            if tick:
                tick(k + 1)
        return x.cpu(), *books.close(len(generators)), int(books.ran)

    def _predict(self, x: Tensor, t: int, y: Tensor | None, k: int, books: "_Books") -> Tensor:
        time_of_row = torch.full(x.shape[:1], t, device=self.device)
        null_class = getattr(self.model, "null_class", None)
        inputs = self.guidance.inputs(x, time_of_row, y, null_class)
        model_input = inputs[0].to(getattr(self.model, "dtype", x.dtype))
        if isinstance(self.model, FPDM):
            options = self.solve.at(k)
            if self.solve.reuse is not None:
                options["start"] = self.solve.reuse.start(books.solutions)
            prediction, solution = self.model(model_input, *inputs[1:], **options, return_solution=True)
            books.enter(solution, keep=self.solve.reuse is not None)
        else:
            prediction = self.model(model_input, *inputs[1:])
            books.skip()
        return self.guidance.combine(prediction, self.shape[0])


@dataclass
class _Books:
    """What the solves of one chunk cost and, for reuse, the last two solutions."""

    rows: int
    solutions: list[Tensor] = field(default_factory=list)
    evaluations: list[Tensor | None] = field(default_factory=list)
    residuals: list[Tensor | None] = field(default_factory=list)
    ran: Tensor | int = 0  # evaluations, times the rows that go through each

    def enter(self, solution: Solution, *, keep: bool) -> None:
        """Book one timestep's solve."""
        size = torch.linalg.vector_norm(solution.value.float().flatten(1), dim=1)
        relative = solution.residual.float() / size.clamp_min(torch.finfo(torch.float32).tiny)
        self.evaluations.append(solution.evals.unflatten(0, (self.rows, -1)).sum(0))
        self.residuals.append(relative.unflatten(0, (self.rows, -1)).amax(0))
        self.ran = self.ran + solution.evals.max() * len(solution.evals)
        if keep:
            self.solutions = [*self.solutions[-1:], solution.value]

    def skip(self) -> None:
        """Book a timestep of an explicit network."""
        self.evaluations.append(None)
        self.residuals.append(None)

    def close(self, batch: int) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Evaluations and relative residuals, on the CPU."""
        evaluations = [torch.zeros(batch, dtype=torch.int64) if e is None else e for e in self.evaluations]
        residuals = [torch.full((batch,), float("nan")) if r is None else r for r in self.residuals]
        return torch.stack(evaluations, dim=1).cpu(), torch.stack(residuals, dim=1).cpu()
