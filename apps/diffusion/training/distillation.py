"""Distillation of a trained network (the teacher) into a smaller one (the student).

The loss is at the top of loss.py. The student of `student_config` is an FPDM that is initialized from the weights of a
DiT (checkpoint/initialization.py) and has the noise schedule and the prediction target of the DiT.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.readers import read_network
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.training import Config, LossConfig, ModelConfig, NoiseSchedule
from apps.diffusion.files import hashing
from apps.diffusion.models.dit import DiT
from apps.diffusion.schedulers.noise_levels import is_flow, starts_at_noise
from implicit import StochasticJFB

_ITERATIONS = 5  # fixed-point iterations of the student at each timestep of sampling


def student_config(source: Path) -> Config:
    """The configuration of an FPDM that learns from the DiT at `source`: one explicit block on either side of the
    fixed-point layer, and the DiT's sizes. The data are those of the DiT's training run if `source` has a run
    configuration, else latents.

    Raises:
        ValueError: `source` holds no DiT.
    """
    folder, base = pretrained.locate(source), PRESETS["latents"]()
    if folder.is_file():
        teacher, schedule = read_network(folder), NoiseSchedule(prediction="epsilon", zero_snr=False)
    else:
        opened = open_network(source)
        teacher, schedule, base = opened.model, _schedule(opened.scheduler), opened.config or base
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
    optimizer = replace(base.optimizer, images=200_000, warmup=min(base.optimizer.warmup, 6_400))
    return replace(
        base,
        model=model,
        schedule=schedule,
        loss=replace(base.loss, weighting="uniform", gamma=LossConfig.gamma),
        optimizer=optimizer,
        grad=StochasticJFB(N=2, M=2),
        sampling=replace(base.sampling, iterations=(_ITERATIONS,)),
        init=source,
        teacher=source,
        max_time=None,
        out=Path("runs/distilled"),
    )


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
        zero_snr=starts_at_noise(scheduler),
    )


def open_teacher(
    path: Path, shape: tuple[int, int, int], num_classes: int, device: torch.device, known: str = ""
) -> torch.nn.Module:
    """The teacher at `path`, in evaluation mode, without gradients.

    Args:
        path: a run, a model or pipeline folder, a network by name, or a checkpoint file in a published layout.
        shape: (C, H, W) of the images.
        num_classes: number of classes of the data.
        device: device of the teacher.
        known: SHA-256 of the weights of the run's teacher; empty: unknown.

    Raises:
        ValueError: the teacher cannot be read, it has other weights than the run's teacher, or its image shape or
            number of classes differs from that of the data.
    """
    try:
        teacher = read_network(pretrained.locate(path))
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from None
    if known not in ("", hashing.of_tensors(teacher.state_dict())):
        raise ValueError(
            f"--teacher {path} has other weights now than the teacher that this run was started with, for example "
            "because it was trained on; give a copy of the latter with --teacher, or another --out for another run."
        )
    if teacher.latent != shape or teacher.num_classes != num_classes:
        raise ValueError(
            f"--teacher {path} takes images {teacher.latent} of {teacher.num_classes} classes, and the data have "
            f"{shape} and {num_classes}; train on the teacher's data."
        )
    return teacher.requires_grad_(False).eval().to(device)  # pyright: ignore[reportArgumentType]
