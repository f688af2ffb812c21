"""The training loop.

One step takes the images s, s + 1, ..., s + B - 1 of the run's order (s images seen so far), computes their timesteps,
noise and dropped labels on the device from (seed, s + k), the loss and its gradient, and updates the weights by AdamW
and the moving average of the weights. Each of P processes takes B / P of the B samples, in A successive parts to save
memory. P and A change the result by rounding only.

A step does not wait for the device: the test for a finite gradient stays on the device, and counts and losses are read
every `LOG_EVERY` steps.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from tqdm import tqdm

from apps.diffusion.checkpoint.initialization import initialize, warn_of_another_target
from apps.diffusion.checkpoint.readers import check_finite
from apps.diffusion.checkpoint.trained_run import check_start
from apps.diffusion.checkpoint.training_state import Checkpoint, Progress
from apps.diffusion.config.training import Config
from apps.diffusion.data import BatchSampler, ImageDataset
from apps.diffusion.data.batch_sampler import training_batches
from apps.diffusion.files import hashing
from apps.diffusion.models import build
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.schedulers.noise_schedule import scheduler_of
from apps.diffusion.training import distributed, loss
from apps.diffusion.training.distillation import open_teacher
from apps.diffusion.training.loss import TrainingNoise
from apps.diffusion.training.metric_logger import StepMetrics, profiler, tracker
from apps.diffusion.training.noise import training_noise
from apps.diffusion.training.optimizer import AveragedWeights, adamw, learning_rate, step_if_finite
from apps.diffusion.training.solve import training_solve

LOG_EVERY = 25  # the most steps between two reads of counts and losses from the device
PATIENCE = 50  # training is aborted after so many successive steps without a finite gradient
AGREE_EVERY = 1.0  # approximate seconds between two exchanges of clock and stop request among the processes


Log = Callable[[dict[str, float], int], Any]
Show = Callable[[DiT | FPDM], Any]


class Diverged(RuntimeError):
    """Training has diverged; the message names the option to change."""


class Trainer:
    """A training run: `Trainer(config, images, start).run(save)`.

    Attributes:
        progress: counts of images and steps, seconds, and the history of the loss. The counts of steps are up to date
            after `synchronize`, a log entry, a checkpoint and `run` only.
        stop_requested: whether this process is to stop; may be set at any time, for example by a signal handler.
        stopping: whether all processes have agreed to stop.
    """

    def __init__(self, config: Config, images: ImageDataset, start: Checkpoint | None = None) -> None:
        self.config, self.images = config, images
        self.accelerator = distributed.accelerator(config, tracker(config.track), config.out / "logs")
        self.scheduler = scheduler_of(config)
        if config.schedule.kind == "diffusion":  # moved once, so that no step copies the table to the device
            self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.accelerator.device)
        iterations = (config.sampling.iterations or (10,))[0]
        try:
            model = build.network(config.model, images.shape, images.num_classes, iterations, config.seed)
        except ValueError as error:
            flags = "--data.size, --model.patch, --model.hidden and --model.heads"
            raise ValueError(f"{error} The flags are {flags}.") from None
        if config.init is not None and start is None:
            initialize(model, config.init)
            warn_of_another_target(config.init, self.scheduler)
        self.network = build.describe(model)
        self.null_class = model.null_class
        self.names = [name for name, _ in model.named_parameters()]
        self.ema = AveragedWeights(model, config.ema.decay)
        self.progress = Progress()
        if start is not None:
            check_start(start, model, self.network, config.out)
            for tensors in (start.model, start.ema):
                check_finite(tensors, config.out)
            build.load_weights(model, start.model, config.out)
            build.load_weights(self.ema.module, start.ema, config.out)
            self.progress = start.progress
        if config.optimizer.checkpointing:
            model.enable_gradient_checkpointing()
        if config.optimizer.compile != "no":
            model.compile_blocks(backend=config.optimizer.compile)
        optimizer = adamw(model.parameters(), config.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.ema.module.to(self.accelerator.device)
        distributed.shard_like(self.ema.module, self.model)
        if start is not None:
            distributed.load_optimizer_state(self.model, self.optimizer.optimizer, self.names, start.optimizer)
        counts = [self.progress.steps, self.progress.skipped, 0]
        # on the device: steps, skipped steps, and skipped steps since the last finite gradient
        self.counts = torch.tensor(counts, device=self.accelerator.device)
        self.teacher = None
        if config.teacher is not None:
            device = self.accelerator.device
            known = "" if start is None else start.teacher
            self.teacher = open_teacher(config.teacher, images.shape, images.num_classes, device, known)
        self.metrics = StepMetrics()
        self.saved = -1  # images seen at the last checkpoint
        self.stop_requested = False
        self.stopping = False  # written by `_agree` only
        self._batches: Iterator[list[Tensor]] | None = None
        # `_agree`: step count of the next exchange; step count and clock of the last exchange
        self._next_agreement, self._last_agreement = 0, (0, self.progress.seconds)
        self._steps = 0

    def run(self, save: Callable[[Checkpoint], Any], log: Log | None = None, show: Show | None = None) -> Progress:
        """Trains to the end of the budget, or to the end of the step in which a process sets `stop_requested`.

        Args:
            save: called by the main process with every checkpoint.
            log: called with every entry (see metric_logger.py) and the number of images seen; None: no entries.
            show: called by the main process every `sample_every` images with the network of averaged weights; its time
                does not count as training time. None: no image grids.

        Raises:
            Diverged: no step of the run, or none of the last `PATIENCE` steps, had a finite gradient.
        """
        config, progress = self.config, self.progress
        start = time.monotonic() - progress.seconds
        batch = config.optimizer.batch
        self._agree(progress.seconds)  # a signal may arrive before the first step
        main = self.accelerator.is_main_process
        with (
            profiler(config.out / "logs" if config.profile and main else None) as profiled_step,
            tqdm(
                total=config.optimizer.images,
                initial=progress.images,
                unit="img",
                unit_scale=True,
                desc=config.model.kind,
                mininterval=0.5 if sys.stderr.isatty() else 20,
                disable=not main,
            ) as bar,
        ):
            while not self.finished and not self.stopping:
                self.step()
                profiled_step()
                progress.seconds = self._agree(time.monotonic() - start)
                bar.update(batch)
                if self.metrics.steps >= LOG_EVERY:
                    self._log(log, bar)
                if progress.images % config.checkpoint_every < batch:
                    self._save(save, log, bar)
                if show and config.sample_every and progress.images % config.sample_every < batch:
                    start += self._show(show)
        self._log(log)
        if self.finished and not progress.steps:
            raise Diverged(
                f"None of the {progress.skipped} steps had a finite gradient, so the weights have not changed; check "
                "that the data are finite, and lower --optimizer.lr."
            )
        if self.saved != progress.images:
            self._save(save, log)
        self._agree(progress.seconds, now=True)  # a signal may have arrived since the last step
        return progress

    @property
    def finished(self) -> bool:
        """Whether the budget of images or time is spent."""
        return self.progress.images >= self.config.optimizer.images or self._time_share() >= 1

    def step(self) -> tuple[Tensor, Tensor]:
        """One step of training.

        Returns:
            The loss of this process's samples, and whether the gradient of the whole batch was finite; scalars on the
            device.
        """
        config, progress = self.config, self.progress
        x, y, noise = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, progress.images, self._time_share())
        self.optimizer.zero_grad()
        parts, total = config.optimizer.accumulate, torch.zeros((), device=x.device)
        for k in range(parts):
            part = slice(k * len(x) // parts, (k + 1) * len(x) // parts)
            # the processes exchange gradients only in the last part
            together = nullcontext() if k == parts - 1 else self.accelerator.no_sync(self.model)
            with together, build.attention(config):
                found = self._loss(x[part], None if y is None else y[part], noise.part(part))
                self.accelerator.backward(found.total / parts)
            total += found.total.detach() / parts
            self.metrics.add_solve(found.solution)
        # the norm of the gradient averaged over all processes
        norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip or math.inf)
        finite = distributed.full_tensor(norm).isfinite()
        step_if_finite(self.optimizer.optimizer, finite)
        steps, skipped, failures = self.counts
        self.counts = torch.stack([steps + finite, skipped + ~finite, (failures + 1) * ~finite])
        self.ema.update(self.accelerator.unwrap_model(self.model), self.counts[0], finite)
        progress.images += config.optimizer.batch
        self._steps += 1
        self.metrics.add_step(total, config.optimizer.batch)
        return total, finite

    def _loss(self, x: Tensor, y: Tensor | None, noise: TrainingNoise) -> loss.Loss:
        gamma = self.config.loss.gamma if self.config.loss.weighting == "min_snr" else None
        with self.accelerator.autocast():
            how = {"scheduler": self.scheduler, "null_class": self.null_class, "gamma": gamma, "teacher": self.teacher}
            return loss.loss(self.model, x, y, noise, solve=self._solve(noise), **how)

    def _batch(self) -> tuple[Tensor, Tensor | None, TrainingNoise]:
        """This process's part of the step: images (b, C, H, W), labels (b,), and their randomness, on the device."""
        config, device = self.config, self.accelerator.device
        size, rank = config.optimizer.batch, self.accelerator.process_index
        sampler = BatchSampler(
            len(self.images), size, config.seed, self.progress.images, rank, self.accelerator.num_processes
        )
        if self._batches is None:
            workers, pin = config.data.workers or 0, device.type == "cuda"
            self._batches = training_batches(self.images, sampler, workers=workers, pin_memory=pin)
        x, y = (value.to(device, non_blocking=True) for value in next(self._batches))
        noise = training_noise(config, self.images.shape, self.progress.images, sampler.part, device)
        return x, y if self.images.num_classes else None, noise

    def _solve(self, noise: TrainingNoise) -> loss.TrainingSolve | None:
        """The fixed-point solve of this step; None for a DiT."""
        done = max(self.progress.images / self.config.optimizer.images, self._time_share())
        return training_solve(self.config, noise, self.progress.images, done)

    def _time_share(self) -> float:
        return self.progress.seconds / self.config.max_time if self.config.max_time else 0.0

    def _agree(self, seconds: float, now: bool = False) -> float:
        """Sets `stopping` if a process has a stop request, so that all processes stop after the same step; returns the
        training seconds of the slowest process. Several processes exchange these about every `AGREE_EVERY` seconds (or
        with `now`); between two exchanges the returned seconds do not change.
        """
        if self.accelerator.num_processes == 1:
            self.stopping = self.stop_requested
            return seconds
        if self._steps < self._next_agreement and not (now or self.finished):
            return self.progress.seconds
        mine = torch.tensor([[seconds, float(self.stop_requested)]], device=self.accelerator.device)
        clock, stopping = gather(mine).amax(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self.stopping = bool(stopping)
        # these numbers are equal on all processes, so the next exchange is after the same step on all of them
        steps, before = self._last_agreement
        per_step = max(clock - before, 1e-9) / max(self._steps - steps, 1)
        self._last_agreement = (self._steps, clock)
        self._next_agreement = self._steps + min(LOG_EVERY, max(1, int(AGREE_EVERY / per_step)))
        return clock

    def synchronize(self) -> int:
        """Copies the counts of steps from the device into `progress`; returns the number of steps skipped since the
        last finite gradient.
        """
        self.progress.steps, self.progress.skipped, failures = self.counts.tolist()
        return failures

    def _log(self, log: Log | None, bar: "tqdm[Any] | None" = None) -> None:
        """Reads the counts from the device, and logs an entry for the steps since the previous entry.

        Raises:
            Diverged: none of the last `PATIENCE` steps had a finite gradient.
        """
        progress = self.progress
        failures = self.synchronize()
        if failures >= PATIENCE:
            raise Diverged(
                f"The gradient has not been finite for {failures} steps in a row, at {progress.images} images; lower "
                "--optimizer.lr or --optimizer.clip; if no step had a finite gradient, check that the data are finite."
            )
        if found := self.metrics.entry():
            rate = float(self.optimizer.param_groups[0]["lr"])
            progress.last = {**found, "learning_rate": rate, "skipped": float(progress.skipped)}
            progress.history.append((progress.images, found["loss"]))
            if log:
                log(progress.last, progress.images)
        self.metrics = StepMetrics()
        if bar is not None and progress.last:
            shown: dict[str, Any] = {"loss": f"{progress.last['loss']:.4f}", "skipped": progress.skipped}
            if "residual/mean" in progress.last:
                shown["residual"] = f"{progress.last['residual/mean']:.1e}"
            bar.set_postfix(shown, refresh=False)

    def _show(self, show: Show) -> float:
        """Calls `show`; returns the seconds that it took."""
        began = time.monotonic()
        network = self.averaged()
        if network is not None:
            show(network)
        self.accelerator.wait_for_everyone()
        self.metrics.began += time.monotonic() - began
        return time.monotonic() - began

    def averaged(self) -> DiT | FPDM | None:
        """The network with the averaged weights, in evaluation mode; None on all processes but the main one. All must
        call this.
        """
        weights = distributed.model_state(self.ema.module)
        if not self.accelerator.is_main_process:
            return None
        with torch.device("meta"):
            network = build.rebuild(self.network)
        network.load_state_dict(weights, assign=True)
        return network.to(self.accelerator.device).eval()

    def _save(self, save: Callable[[Checkpoint], Any], log: Log | None = None, bar: "tqdm[Any] | None" = None) -> None:
        self._log(log, bar)
        state = self.checkpoint()
        if self.accelerator.is_main_process:
            save(state)
        self.saved = self.progress.images
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> Checkpoint:
        """The state of the run as whole tensors, in the main process. All processes must call this."""
        return Checkpoint(
            network=self.network,
            model=distributed.model_state(self.model),
            ema=distributed.model_state(self.ema.module),
            optimizer=distributed.optimizer_state(self.model, self.optimizer.optimizer, self.names),
            progress=self.progress,
            classes=tuple(self.images.classes),
            teacher="" if self.teacher is None else hashing.of_tensors(self.teacher.state_dict()),
        )
