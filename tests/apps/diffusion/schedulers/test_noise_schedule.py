"""Noise schedules and timesteps, compared with numbers and formulas that are computed independently."""

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from apps.diffusion.schedulers.noise_levels import clean_and_noise
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.schedulers.timesteps import timesteps

ABAR = {0: 0.9999, 250: 0.5189, 500: 0.07525, 750: 0.002644, 900: 0.000103, 998: 4.213e-09, 999: 0.0}


def test_zero_terminal_snr_has_the_published_values():
    scheduler = make_scheduler()
    for t, value in ABAR.items():
        assert float(scheduler.alphas_cumprod[t]) == pytest.approx(value, rel=5e-3, abs=0)
    assert float(scheduler.betas[-1]) == 1


def test_abar_is_the_rescaled_product_in_float64():
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    plain = root**2
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    for kind in ("ddim", "ddpm"):
        # relative, but for the last few steps, where float32 leaves fewer digits of a difference
        np.testing.assert_allclose(make_scheduler(kind).alphas_cumprod[:950], rescaled[:950], rtol=1e-3)
        np.testing.assert_allclose(make_scheduler(kind).alphas_cumprod, rescaled, atol=1e-6)
        np.testing.assert_allclose(make_scheduler(kind, zero_snr=False).alphas_cumprod, plain, rtol=1e-4)


def test_kinds_are_diffusers_schedulers_with_the_settings():
    kinds = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}
    for kind, cls in kinds.items():
        scheduler = make_scheduler(kind, prediction="sample", spacing="linspace", betas="scaled_linear")
        assert type(scheduler) is cls
        for name, value in (("prediction_type", "sample"), ("timestep_spacing", "linspace")):
            assert scheduler.config[name] == value
        assert scheduler.config["beta_schedule"] == "scaled_linear"
        assert scheduler.config["rescale_betas_zero_snr"]
        again = cls.from_config(scheduler.config)
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert make_scheduler("ddpm", learn_sigma=True).config["variance_type"] == "learned_range"
    assert make_scheduler("ddpm").config["variance_type"] == "fixed_small"
    assert not make_scheduler("ddim").config["clip_sample"]
    assert make_scheduler("ddim", clip=2.0).config["clip_sample_range"] == 2.0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"prediction": "epsilon"}, "v_prediction"),
        ({"spacing": "leading"}, "trailing"),
        ({"kind": "euler"}, "ddim"),
        ({"prediction": "v"}, "v_prediction"),
        ({"spacing": "even"}, "linspace"),
        ({"betas": "cubic"}, "linear"),
        ({"train_steps": 1}, "train_steps"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"clip": -1.0}, "clip"),
        ({"kind": "dpm++", "clip": 1.0}, "clip"),
    ],
)
def test_impossible_schedules_are_refused_with_a_remedy(change, name):
    with pytest.raises(ValueError, match=re.escape(name)):
        make_scheduler(**change)


def test_eps_and_leading_are_fine_without_zero_snr():
    config = make_scheduler("ddim", prediction="epsilon", spacing="leading", zero_snr=False).config
    assert config.prediction_type == "epsilon" and config.timestep_spacing == "leading"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 28, 30, 250, 999, 1000])
def test_timesteps_fall_and_start_at_the_noisiest(n):
    for spacing in ("trailing", "linspace"):
        array = timesteps(n, spacing)
        assert len(array) == n and array[0] == 999 and array[-1] >= 0
        assert all(a > b for a, b in pairwise(array))
    if n > 1:
        assert timesteps(n, "linspace") == tuple(round(i * 999 / (n - 1)) for i in range(n))[::-1]
        assert timesteps(n, "linspace")[-1] == 0
    assert timesteps(n, "leading")[-1] == 0


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("n", [2, 5, 20, 30, 100])
def test_timesteps_are_those_of_diffusers_where_it_has_them(n, spacing):
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    assert list(timesteps(n, spacing)) == scheduler.timesteps.tolist()


def test_timesteps_refuse_impossible_counts():
    for n in (0, -1, 1001):
        with pytest.raises(ValueError, match="1000"):
            timesteps(n)
    with pytest.raises(ValueError, match="spacing"):
        timesteps(5, "even")


@pytest.mark.parametrize("t", [0, 400, 998])
def test_clean_and_noise_invert_the_three_predictions(t):
    scheduler = make_scheduler(zero_snr=False)
    abar = scheduler.alphas_cumprod[t].double()
    x0, eps = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    for kind, prediction in (("v_prediction", v), ("epsilon", eps), ("sample", x0)):
        clean, noise = clean_and_noise(prediction, x, abar.sqrt(), (1 - abar).sqrt(), kind)
        torch.testing.assert_close(clean, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(noise, eps, rtol=1e-9, atol=1e-9)


def test_v_determines_the_image_at_the_last_timestep():
    x0, eps = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    clean, noise = clean_and_noise(-x0, eps, torch.tensor(0.0), torch.tensor(1.0), "v_prediction")
    assert torch.equal(clean, x0) and torch.equal(noise, eps)
