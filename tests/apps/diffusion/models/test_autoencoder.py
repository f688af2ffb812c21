"""The decoder inverts the scaling of latents that the encoder's constants define."""

import torch

from apps.diffusion.models.autoencoder import decode
from tests.apps.diffusion.helpers import image_files


def test_latents_mean_and_std_are_undone_before_decoding():
    vae = image_files.tiny_vae()
    raw = torch.randn(2, vae.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor
    expected = decode(vae, (raw - shift) * scaling)
    mean, std = [0.1 * k for k in range(raw.shape[1])], [1.0 + k for k in range(raw.shape[1])]
    vae.register_to_config(latents_mean=mean, latents_std=std)
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    torch.testing.assert_close(decode(vae, (raw - m) / s * scaling), expected, rtol=1e-4, atol=1e-5)
