"""The autoencoder between images and latents: any diffusers AutoencoderKL.

Latents are scaled for the diffusion model with the constants in the VAE's configuration: z = scaling (latent - shift),
or z = scaling (latent - latents_mean) / latents_std per channel if the configuration has latents_mean and latents_std.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from apps.diffusion.files import hashing
from apps.diffusion.files.names import first_names


def open_vae(
    name: str | Path, subfolder: str | None = None, device: str = "cpu", channels: int | None = None
) -> tuple[AutoencoderKL, str]:
    """The VAE in evaluation mode, and its name for messages.

    Args:
        name: a folder, or a name on the hub.
        subfolder: subfolder of the VAE in a folder or repository of several models; None: the subfolder vae of a local
            folder without config.json, else no subfolder.
        device: device of the VAE.
        channels: number of channels that its latents must have; None: any number.

    Raises:
        ValueError: the VAE cannot be read, is incomplete, or has latents with another number of channels.
    """
    if subfolder is None and not (Path(name) / "config.json").exists() and (Path(name) / "vae").is_dir():
        subfolder = "vae"
    title = f"{name}/{subfolder}" if subfolder else str(name)
    if not Path(title).is_dir() and (Path(name).is_dir() or "/" not in str(name)):
        raise ValueError(
            f"There is no folder {title}; give the folder of a diffusers AutoencoderKL, or its name on the hub, "
            "OWNER/NAME."
        )
    try:
        loaded: Any = AutoencoderKL.from_pretrained(str(name), subfolder=subfolder, output_loading_info=True)
    except Exception as error:  # diffusers raises errors of many types: files, JSON, tensors, network
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The VAE {title} cannot be read ({type(error).__name__}: {reason}); give the folder of a diffusers "
            "AutoencoderKL, or its name on the hub."
        ) from None
    vae, info = loaded
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    if lacking:
        raise ValueError(f"The VAE {title} is incomplete: {', '.join(map(str, lacking))}; fetch it again.")
    if bad := [name for name, value in vae.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"The VAE {title} holds NaN or infinity in {first_names(bad, 3)}; fetch it again.")
    if channels is not None and vae.config.latent_channels != channels:
        raise ValueError(
            f"The VAE {title} decodes latents of {vae.config.latent_channels} channels, and this network generates "
            f"{channels} channels; give the VAE that encoded the training latents."
        )
    return vae.requires_grad_(False).eval().to(device), title


def open_decoder(index: Mapping[str, Any], name: str | None = None, device: str = "cpu") -> AutoencoderKL:
    """The VAE that encoded a folder of latents, to decode latents.

    Args:
        index: index of the folder of latents (`data.latents.read_index`).
        name: folder or hub name of a copy of the VAE; None: the name in the index.
        device: device of the VAE.

    Raises:
        ValueError: the VAE cannot be read, or its weights are not those that encoded the latents.
    """
    made_by = index["vae"]
    where, subfolder = name or made_by["name"], None
    if not Path(where).is_dir() and where.count("/") == 2:  # owner/repository/subfolder, on the hub
        where, subfolder = where.rsplit("/", 1)
    vae, title = open_vae(where, subfolder, device)
    if digests(vae)["weights_sha256"] != made_by["weights_sha256"]:
        raise ValueError(
            f"The VAE {title} has other weights than the encoder of these latents, {made_by['name']}; give the encoder "
            "(--data.vae of train, --vae of sample, vae= of the pipeline)."
        )
    return vae


def check_images(vae: AutoencoderKL, size: int) -> None:
    """Raises ValueError if the VAE does not take color images with sides of `size` pixels."""
    config: Any = vae.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    if size % factor or config.in_channels != 3:
        raise ValueError(
            f"This VAE takes images of {config.in_channels} channels with sides that are multiples of {factor}, and "
            f"the images have 3 channels and --size {size}; change --size, or give another VAE."
        )


def digests(vae: AutoencoderKL) -> dict[str, str]:
    """SHA-256 of the VAE's configuration and of its weights; neither depends on the folder of the VAE."""
    config = {key: value for key, value in dict(vae.config).items() if not key.startswith("_")}
    weights = hashing.of_tensors(vae.state_dict(), as_float=True)
    return {"config_sha256": hashing.of_json(config), "weights_sha256": weights}


def constants(vae: AutoencoderKL) -> tuple[float, float]:
    """(scaling, shift) of the VAE's latents."""
    config: Any = vae.config
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


@torch.no_grad()
def moments(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (b, 2, C, h, w) of the latents of images x (b, 3, H, W) in [-1, 1] and of their
    mirror images, not scaled, on the CPU.
    """
    posteriors: list[Any] = [vae.encode(side).latent_dist for side in (x, x.flip(3))]  # pyright: ignore
    mean = torch.stack([p.mean for p in posteriors], dim=1)
    std = torch.stack([p.std for p in posteriors], dim=1)
    return mean.cpu(), std.cpu()


@torch.no_grad()
def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Images (b, 3, H, W), approximately in [-1, 1], of scaled latents z (b, C, h, w), on the CPU in float32.

    Latents are decoded one at a time, so that the rounding of an image does not depend on the batch.
    """
    scaling, shift = constants(vae)
    config: Any = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    z = z.to(vae.device, vae.dtype)
    if mean is not None and std is not None:  # one number per channel, instead of the shift
        mean, std = (torch.tensor(v, device=z.device, dtype=z.dtype).view(1, -1, 1, 1) for v in (mean, std))
        rows = (z * std / scaling + mean).split(1)
    else:
        rows = (z / scaling + shift).split(1)
    return torch.cat([vae.decode(row, return_dict=False)[0].float().cpu() for row in rows])  # pyright: ignore
