"""Where a command computes and writes, tried out before anything is written."""

from __future__ import annotations

import os

from apps.diffusion.files.atomic import make_folder as make_folder


def device_of(name: str) -> str:
    """The device by this name; cuda alone is this process's own of several (LOCAL_RANK).

    Raises:
        ValueError: there is none by this name here, or nothing can be computed on it.
    """
    import torch

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.ones(1, device=device).sum().item()
    except (
        RuntimeError,
        AssertionError,
        ImportError,
        NotImplementedError,
    ) as error:  # whatever the device's code raises
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"--device {name} cannot be used here ({reason}); give cpu, or another that there is."
        ) from None
    return device
