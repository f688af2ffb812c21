"""Distillation of a trained network into a smaller one: the configuration, and the loss.

    L = mean ( student(x_t, t, y') - teacher(x_t, t, y') )^2

over all channels of the prediction, a learned variance included, on the images, timesteps, noise and dropped labels of
ordinary training. The student of `student_config` is an FPDM whose first weights are a DiT's (checkpoint/
initialization.py), with the noise schedule and the prediction target of the DiT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.readers import ReadOptions, read_network
from apps.diffusion.checkpoint.trained_run import read_config
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config, ModelConfig, NoiseSchedule
from apps.diffusion.models.dit import DiT
from apps.diffusion.schedulers.noise_levels import is_flow, network_time, noisy_image
from apps.diffusion.training.loss import Loss, TrainingNoise, TrainingSolve, predict, with_earlier
from implicit import StochasticJFB

_ITERATIONS = 5  # of the student in sampling


def student_config(source: Path) -> Config:
    """The configuration of an FPDM that learns from the DiT at `source`: one explicit block on either side of the
    fixed-point layer, the DiT's sizes, and the data of the DiT's run where they are known, else latents.

    Raises:
        ValueError: there is no DiT.
    """
    folder = pretrained.locate(source)
    known = _own_config(folder)
    if folder.is_file():
        teacher, schedule = read_network(folder, ReadOptions()), NoiseSchedule(prediction="epsilon", zero_snr=False)
    else:
        opened = open_network(source)
        teacher, schedule = opened.model, _schedule(opened.scheduler)
    if not isinstance(teacher, DiT):
        raise ValueError(f"{source} holds an FPDM; give a DiT to distill.")
    model = ModelConfig(
        kind="fpdm",
        hidden=teacher.hidden_size,
        heads=teacher.config["num_heads"],
        patch=teacher.patch_size,
        mlp_ratio=float(teacher.mlp_ratio),
        condition_on_time=True,
        learn_sigma=teacher.out_channels == 2 * teacher.latent[0],
    )
    base = known or PRESETS["latents"]()
    optimizer = replace(base.optimizer, images=200_000, warmup=min(base.optimizer.warmup, 6_400))
    return replace(
        base,
        model=model,
        schedule=schedule,
        optimizer=optimizer,
        grad=StochasticJFB(N=2, M=2),
        sampling=replace(base.sampling, iterations=(_ITERATIONS,)),
        init=source,
        teacher=source,
        max_time=None,
        out=Path("runs/distilled"),
    )


def _own_config(folder: Path) -> Config | None:
    """The configuration of the run that a folder holds or comes from; None where it is not known."""
    if (folder / pretrained.RECORD).is_file():
        return pretrained.read_record(folder)[0]
    return read_config(folder) if (folder / "checkpoints").is_dir() else None


def _schedule(scheduler: Any) -> NoiseSchedule:
    noise = scheduler.config
    if is_flow(scheduler):
        return NoiseSchedule(kind="rectified_flow", timesteps=noise["num_train_timesteps"], shift=noise["shift"])
    return NoiseSchedule(
        betas=noise["beta_schedule"],
        beta_start=noise["beta_start"],
        beta_end=noise["beta_end"],
        timesteps=noise["num_train_timesteps"],
        prediction=noise["prediction_type"],
        zero_snr=bool(noise["rescale_betas_zero_snr"]),
    )


def open_teacher(path: Path, shape: tuple[int, int, int], num_classes: int, device: torch.device) -> torch.nn.Module:
    """The network to learn from, in evaluation mode, without gradients.

    Raises:
        ValueError: it cannot be read, or takes other images or classes.
    """
    folder = pretrained.locate(path)
    teacher = read_network(folder, ReadOptions())
    if teacher.latent != shape or teacher.num_classes != num_classes:
        raise ValueError(
            f"--teacher {path} takes images {teacher.latent} of {teacher.num_classes} classes, and the data have "
            f"{shape} and {num_classes}; train on the teacher's data."
        )
    return teacher.requires_grad_(False).eval().to(device)  # pyright: ignore[reportArgumentType]


def distillation_loss(
    model: Callable[..., Any],
    teacher: Callable[..., Tensor],
    x0: Float[Tensor, "B C H W"],
    y: Int[Tensor, " B"] | None,
    noise: TrainingNoise,
    *,
    scheduler: Any,
    null_class: int | None,
    solve: TrainingSolve | None = None,
) -> Loss:
    """The loss at the top of this file; arguments as those of `loss.loss`, with the network `teacher` to learn from."""
    if y is not None and null_class is not None:
        y = torch.where(noise.dropped, null_class, y)
    noisy, time = noisy_image(scheduler, x0, noise.noise, noise.t), network_time(scheduler, noise.t)
    with torch.no_grad():
        target = teacher(noisy, time, y)
    solve = with_earlier(model, x0, y, noise, scheduler, solve)
    prediction, solution, penalty = predict(model, noisy, time, y, solve)
    error = (prediction.to(x0.dtype) - target.to(x0.dtype)).square().flatten(1).mean(1)
    return Loss(total=error.mean() + penalty, error=error.detach(), solution=solution)
