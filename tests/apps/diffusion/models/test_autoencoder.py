"""Opening a VAE, and decoding, which inverts the scaling of latents."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apps.diffusion.models.autoencoder import constants, decode, open_vae
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


def test_decoding_inverts_the_scaling():
    model: Any = image_files.tiny_vae()
    z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.decode(z / 0.5 + 0.25).sample
    torch.testing.assert_close(decode(model, z), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(decode(model, z)[1:2], decode(model, z[1:2]))
    assert constants(model) == (0.5, 0.25)


def _lost_tensors(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "conv_in" not in name}, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
        _lost_tensors,
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: image_files.truncate(folder / "diffusion_pytorch_model.safetensors"),
    ],
)
def test_an_unreadable_folder_is_refused(tmp_path, change):
    image_files.tiny_vae().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        open_vae(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused_without_a_look_at_the_hub(tmp_path, monkeypatch):
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    for name, subfolder in (("vae", "decoder"), ("vea", None)):
        with pytest.raises(ValueError, match=subfolder or name):
            open_vae(name, subfolder)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    vae = image_files.tiny_vae()
    with torch.no_grad():
        next(vae.decoder.parameters()).fill_(float("nan"))
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN.*decoder"):
        open_vae(tmp_path)
