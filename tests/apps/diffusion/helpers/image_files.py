"""Generated image files, and a tiny VAE."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image


def random_image(seed, width=40, height=32, mode="RGB"):
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def tree(root, classes=("cat", "dog", "owl"), each=5):
    """Images in one folder per class, of several sizes and kinds; returns how many."""
    for k, name in enumerate(classes):
        for i in range(each):
            suffix, mode = [("png", "RGB"), ("jpg", "RGB"), ("png", "L"), ("png", "RGBA"), ("webp", "RGB")][i % 5]
            save(root / name / f"{i}.{suffix}", random_image(10 * k + i, 33 + 7 * i, 36 + 5 * k, mode))
    return len(classes) * each


def damage(root):
    """Adds one truncated, one foreign, one empty and one tiny file; returns their names."""
    stream = io.BytesIO()
    random_image(99, 64, 64).save(stream, format="PNG")
    (root / "cat" / "cut.png").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (root / "dog" / "not.png").write_text("this is no image")
    (root / "dog" / "void.jpg").touch()
    save(root / "owl" / "tiny.png", random_image(98, 50, 3))
    return {"cat/cut.png", "dog/not.png", "dog/void.jpg", "owl/tiny.png"}


def truncate(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


def tiny_vae(seed=0, latent_channels=4):
    """An AutoencoderKL that halves the side twice, with drawn weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (8, 8, 8),
        }
        return AutoencoderKL(
            **blocks,
            latent_channels=latent_channels,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        ).eval()
