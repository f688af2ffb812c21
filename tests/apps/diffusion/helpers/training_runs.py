"""Folders of training runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.training.trainer import Trainer


def barely_trained(folder: Path, images: int = 320, model: dict[str, Any] | None = None, **options: Any) -> Path:
    """A run on digits of a few steps, as training leaves it in `folder`, without a summary; `options` are Config's."""
    config = c.Config(
        model=replace(c.ModelConfig(hidden=16, heads=2), **(model or {})),
        optimizer=c.OptimizerConfig(images=images, batch=16, lr=1e-2, warmup=0),
        out=folder,
        **options,
    )
    Trainer(config, digits("train")).run(lambda state: checkpoint.save(folder, state))
    (folder / "config.json").write_text(config.to_json())
    return folder
