"""The training loop.

One step: images s, s + 1, ..., s + B - 1 of the run's order (s = images seen so far), their timesteps, noise
and hidden labels, all drawn from (seed, s); the loss and its gradient; AdamW; the moving average of the
weights. Each of P processes takes its B / P of the B draws, in A parts one after another where they would not fit
the memory, so P and A change nothing but rounding.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import implicit
from apps.diffusion.checkpoint.trained_run import fit
from apps.diffusion.checkpoint.training_state import Checkpoint, Progress
from apps.diffusion.config.training import Config, OptimizerConfig
from apps.diffusion.data import DataSet, order
from apps.diffusion.models import build
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.rng import Stream, generator
from apps.diffusion.training import distributed as sharding
from apps.diffusion.training import loss as objective
from apps.diffusion.training.loss import Draw
from apps.diffusion.training.metric_logger import Tally, tracker

PATIENCE = 50  # steps in a row without a finite gradient after which there is no hope


Log = Callable[[dict[str, float], int], Any]
Show = Callable[[DiT | FPDM], Any]


class Diverged(RuntimeError):
    """Training went wrong; the message says what to change."""


def learning_rate(config: OptimizerConfig, images: int, time_share: float) -> float:
    """The rate of the step that starts after `images` images, when the share `time_share` of `max_time` is
    spent.
    """
    rising = min(1.0, (images + config.batch) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant":
        return config.lr * rising
    done = min(1.0, max(images / config.images, time_share))
    return config.lr * rising * 0.5 * (1 + math.cos(math.pi * done))


def averaged_decay(decay: float, steps: int) -> float:
    """Weight of the old average at the update after `steps` steps."""
    return min(decay, (1 + steps) / (10 + steps))


class Trainer:
    """A run in the making: `Trainer(config, images, start).run()`."""

    def __init__(self, config: Config, images: DataSet, start: Checkpoint | None = None) -> None:
        self.config = config
        self.images = images
        self.accelerator = sharding.accelerator(config.optimizer, tracker(config.track), config.out / "logs")
        self.scheduler = build.scheduler(config, "ddpm")
        model = build.network(config.model, images.shape, images.num_classes, config.sampling.iterations, config.seed)
        self.network = build.describe(model)
        self.null_class = model.null_class
        self.ema = AveragedModel(model, device=self.accelerator.device, multi_avg_fn=self._average)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.optimizer.lr,
            betas=(0.9, config.optimizer.beta2),
            weight_decay=config.optimizer.weight_decay,
        )
        self.progress = Progress()
        if start is not None:
            self._restore(model, start)
        if config.optimizer.checkpointing:
            model.enable_gradient_checkpointing()
        if config.optimizer.compile != "no":
            model.compile_blocks(backend=config.optimizer.compile)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        sharding.like(self.ema.module, self.model)
        if start is not None:
            moments = sharding.shares(start.optimizer, self.model.parameters())
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.tally = Tally()
        self.entry: dict[str, float] = {}  # the last one
        self.saved = -1  # images seen at the last checkpoint
        self.asked = False  # anyone may set it, at any time
        self.stopping = False  # what all processes have agreed on; `_agree` alone writes it

    def run(
        self,
        save: Callable[[Checkpoint], Any],
        log: Log | None = None,
        show: Show | None = None,
    ) -> Progress:
        """Train to the end of the budget, or to the end of the step in which a process sets its `asked`.

        Args:
            save: called by the main process with every checkpoint.
            log: called with every entry (see logbook.py) and the images seen.
            show: called by the main process every `sample_every` images with the averaged network; the time it takes
                is not training's.

        Raises:
            Diverged: no step, or none of the last `PATIENCE`, had a finite gradient.
        """
        config, progress = self.config, self.progress
        start = time.monotonic() - progress.seconds
        failures = 0
        bar = tqdm(
            total=config.optimizer.images,
            initial=progress.images,
            unit="img",
            unit_scale=True,
            desc=config.model.kind,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            disable=not self.accelerator.is_main_process,
        )
        self._agree(progress.seconds)  # on a signal that came before the first step
        while not self.finished and not self.stopping:
            loss, finite = self.step()
            failures = 0 if finite else failures + 1
            if failures == PATIENCE:
                raise Diverged(
                    f"The gradient has not been finite for {PATIENCE} steps in a row, at {progress.images} images; "
                    "lower --optimizer.lr, or clip harder; where it never was, see whether the data are finite."
                )
            progress.seconds = self._agree(time.monotonic() - start)
            bar.update(config.optimizer.batch)
            self._record(loss, bar, log)
            if progress.images % config.checkpoint_every < config.optimizer.batch:
                self._save(save, log)
            if show and config.sample_every and progress.images % config.sample_every < config.optimizer.batch:
                start += self._show(show)
        bar.close()
        if self.finished and not progress.steps:
            raise Diverged(
                f"Not one of the {progress.skipped} steps had a finite gradient, and nothing is learnt; see whether "
                "the data are finite, and lower --optimizer.lr."
            )
        if self.saved != progress.images:
            self._save(save, log)
        self._agree(progress.seconds)  # on a signal that came since the last step
        return progress

    @property
    def finished(self) -> bool:
        """Whether the budget of images or time is spent."""
        return self.progress.images >= self.config.optimizer.images or self._time_share() >= 1

    def step(self) -> tuple[float, bool]:
        """One step of training; returns the loss of the whole batch, and whether its gradient was finite."""
        config, progress = self.config, self.progress
        x, y, draw = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, progress.images, self._time_share())
        self.optimizer.zero_grad()
        parts, loss = config.optimizer.accumulate, torch.zeros((), device=x.device)
        for k in range(parts):
            part = slice(k * len(x) // parts, (k + 1) * len(x) // parts)
            # gradients are averaged over processes once, with the last part
            together = nullcontext() if k == parts - 1 else self.accelerator.no_sync(self.model)
            with together, build.attention(config):
                found = self._loss(x[part], None if y is None else y[part], draw.part(part))
                self.accelerator.backward(found.total / parts)
            loss += found.total.detach() / parts
            self.tally.solved(found.solution)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip or math.inf)
        finite = norm is None or math.isfinite(sharding.number(norm))  # of the average over all processes
        if finite:
            self.optimizer.step()
            progress.steps += 1
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))
        else:
            progress.skipped += 1
        progress.images += config.optimizer.batch
        return float(self.accelerator.reduce(loss, reduction="mean")), finite  # pyright: ignore

    def _loss(self, x: Tensor, y: Tensor | None, draw: Draw) -> objective.Loss:
        with self.accelerator.autocast():
            return objective.loss(
                self.model, x, y, draw, scheduler=self.scheduler, null_class=self.null_class, **self._solve()
            )

    def _batch(self) -> tuple[Tensor, Tensor | None, Draw]:
        """This process's part of the step: images (b, C, H, W), labels (b,), and their draws."""
        size, seen, seed = self.config.optimizer.batch, self.progress.images, self.config.seed
        draws = generator(seed, Stream.STEP, seen)
        noise = torch.randn(size, *self.images.shape, generator=draws)
        # one timestep from each of `size` equal parts of 0..T-1: uniform, with less variance
        levels = (torch.arange(size) + torch.rand(size, generator=draws, dtype=torch.float64)) / size
        t = (levels * self.config.schedule.timesteps).long()
        dropped = torch.rand(size, generator=draws) < self.config.optimizer.label_dropout
        share = size // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        n = len(self.images)
        epochs = [(seen + i) // n for i in range(size)]
        x, y = self.images.draw(order(n, seed, seen, size)[mine], epochs[mine], seed)
        device = self.accelerator.device
        labels = y.to(device) if self.images.num_classes else None
        return x.to(device), labels, Draw(noise=noise[mine], t=t[mine], dropped=dropped[mine]).to(device)

    def _solve(self) -> dict[str, Any]:
        """How this step solves the fixed point."""
        if self.config.model.kind == "dit":
            return {}
        return {
            "solver": self.config.solver,
            "grad": self._estimator(),
            "stop": self.config.stop,
            "return_solution": True,
        }

    def _estimator(self) -> implicit.AbstractGrad:
        """The gradient estimator of this step; one that draws numbers takes a generator from (seed, images seen)."""
        grad: Any = self.config.grad
        if not hasattr(grad, "generator"):
            return grad
        return replace(grad, generator=generator(self.config.seed, Stream.SOLVE, self.progress.images))

    def _average(self, average: Any, current: Any, updates: Any) -> None:
        """average <- d average + (1 - d) current; torch calls this with two lists of tensors."""
        get_ema_multi_avg_fn(averaged_decay(self.config.ema.decay, int(updates)))(average, current, updates)

    def _time_share(self) -> float:
        return self.progress.seconds / self.config.max_time if self.config.max_time else 0.0

    def _agree(self, seconds: float) -> float:
        """The longest clock, and whether anyone was told to stop, so that all processes stop at the same step."""
        if self.accelerator.num_processes == 1:
            self.stopping = self.asked
            return seconds
        mine = torch.tensor([[seconds, float(self.asked)]], dtype=torch.float64, device=self.accelerator.device)
        clock, stopping = gather(mine).amax(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        self.stopping = bool(stopping)
        return clock

    def _record(self, loss: float, bar: tqdm[Any], log: Log | None) -> None:
        self.tally.stepped(loss, self.config.optimizer.batch)
        if self.tally.steps >= 25:
            self._enter(log)
        mean = self.entry.get("loss", loss)
        told = {"loss": f"{mean:.4f}", "skipped": self.progress.skipped}
        if "residual/mean" in self.entry:
            told["residual"] = f"{self.entry['residual/mean']:.1e}"
        bar.set_postfix(told, refresh=False)

    def _enter(self, log: Log | None) -> None:
        """Add to the history what has come together since the last entry."""
        found = self.tally.entry()
        if found:
            rate = self.optimizer.param_groups[0]["lr"]
            self.entry = {**found, "learning_rate": float(rate), "skipped": float(self.progress.skipped)}
            self.progress.history.append((self.progress.images, found["loss"]))
            if log:
                log(self.entry, self.progress.images)
        self.tally = Tally()

    def _show(self, show: Show) -> float:
        """Have samples shown; returns the seconds that it took."""
        began = time.monotonic()
        network = self.averaged()
        if network is not None:
            show(network)
        self.accelerator.wait_for_everyone()
        self.tally.began += time.monotonic() - began
        return time.monotonic() - began

    def averaged(self) -> DiT | FPDM | None:
        """The network with the averaged weights, in evaluation mode: the main process gets it, all must ask."""
        weights = sharding.whole(self.ema.module.state_dict(), self.accelerator.is_main_process)
        if not self.accelerator.is_main_process:
            return None
        with torch.device("meta"):
            network = build.rebuild(self.network)
        network.load_state_dict(weights, assign=True)
        return network.to(self.accelerator.device).eval()

    def _save(self, save: Callable[[Checkpoint], Any], log: Log | None = None) -> None:
        self._enter(log)
        state = self.checkpoint()
        if self.accelerator.is_main_process:
            save(state)
        self.saved = self.progress.images
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> Checkpoint:
        """The run as it stands, its tensors whole. All processes must ask; the main one gets the tensors."""
        keep = self.accelerator.is_main_process
        moments = self.optimizer.state_dict()["state"]
        return Checkpoint(
            network=self.network,
            model=sharding.whole(self.accelerator.unwrap_model(self.model).state_dict(), keep),
            ema=sharding.whole(self.ema.module.state_dict(), keep),
            optimizer={i: sharding.whole(entry, keep) for i, entry in moments.items()},
            progress=self.progress,
        )

    def _restore(self, model: torch.nn.Module, start: Checkpoint) -> None:
        """All but the optimizer's state, which is checked."""
        if _architecture(start.network) != _architecture(self.network):
            raise ValueError(
                f"The checkpoint holds another network ({start.network}) than the configuration describes "
                f"({self.network}); "
                "resume it with the settings it was started with."
            )
        fit(model, start.model, self.config.out)
        fit(self.ema.module, start.ema, self.config.out)
        sizes = dict(enumerate(p.shape for p in model.parameters()))
        for i, entry in start.optimizer.items():
            if any(i not in sizes or (value.ndim and value.shape != sizes[i]) for value in entry.values()):
                raise ValueError(
                    f"The optimizer's state in {self.config.out} is that of another network (parameter {i} has another "
                    "shape); delete this checkpoint to go on from the one before, or train again into a new folder."
                )
        self.ema.n_averaged.fill_(start.progress.steps)
        self.progress = start.progress


def _architecture(network: dict[str, Any]) -> dict[str, Any]:
    """What decides which weights there are and what they mean; how often an FPDM iterates is free."""
    return {**network, "config": {k: v for k, v in network["config"].items() if k != "iterations"}}
