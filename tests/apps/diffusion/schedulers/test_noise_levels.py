"""Levels of a rectified flow, compared with diffusers' tables and steps, and on data whose velocity is known."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.parallel import Parallel
from apps.diffusion.schedulers.noise_levels import (
    clean_and_noise,
    is_flow,
    levels,
    network_time,
    noisy_image,
    prediction_kind,
    target,
)
from apps.diffusion.schedulers.noise_schedule import make_scheduler, same_noise
from apps.diffusion.schedulers.reverse_step import Reverse
from apps.diffusion.schedulers.timesteps import timesteps
from apps.diffusion.training.weighting import min_snr
from tests.apps.diffusion.helpers.small_models import sample_by

SHAPE = (1, 2, 2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sigmas_and_times_are_those_of_diffusers(shift):
    scheduler = make_scheduler("flow", shift=shift)
    t = torch.arange(1000)
    a, b = levels(scheduler, t)
    # diffusers lists them from the noisiest down
    torch.testing.assert_close(b.flip(0), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(network_time(scheduler, t).flip(0), scheduler.timesteps, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(a + b, torch.ones(1000))
    assert (float(a[-1]), float(b[-1])) == (0, 1) and is_flow(scheduler)


def test_levels_of_a_diffusion_are_those_of_diffusers():
    scheduler, source = make_scheduler("ddpm"), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, *SHAPE, generator=source).unbind(0)
    t = torch.tensor([0, 500, 999])
    reference: Any = DDPMScheduler.from_config(scheduler.config)
    assert torch.equal(noisy_image(scheduler, x0, eps, t), reference.add_noise(x0, eps, t))
    assert torch.equal(target(scheduler, x0, eps, t), reference.get_velocity(x0, eps, t))
    assert torch.equal(network_time(scheduler, t), t) and prediction_kind(scheduler) == "v_prediction"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_step_is_that_of_diffusers(shift):
    scheduler, array = make_scheduler("flow", shift=shift), timesteps(5)
    reverse = Reverse(scheduler, array)
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=levels(scheduler, torch.tensor(array))[1].tolist())
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, *SHAPE, generator=source, dtype=torch.float64)
    for k, t in enumerate(theirs.timesteps):
        assert reverse.times[k] == pytest.approx(float(t), rel=1e-6)
        u = torch.randn(x.shape, generator=source, dtype=torch.float64)
        expected = theirs.step(u, t, x, return_dict=False)[0]
        found = reverse.step(k, u, x, [])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert reverse.gain(k) == pytest.approx(1.0)
        x = expected


def test_targets_and_their_inverse():
    scheduler, source = make_scheduler("flow"), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, *SHAPE, generator=source, dtype=torch.float64).unbind(0)
    t = torch.tensor([0, 300, 700, 999])
    x, u = noisy_image(scheduler, x0, eps, t), target(scheduler, x0, eps, t)
    for i in range(4):
        sigma = (int(t[i]) + 1) / 1000
        torch.testing.assert_close(x[i], (1 - sigma) * x0[i] + sigma * eps[i])
        torch.testing.assert_close(u[i], eps[i] - x0[i])
        a, b = (level[i] for level in levels(scheduler, t, torch.float64))
        clean, noise = clean_and_noise(u[i], x[i], a, b, "flow_prediction")
        torch.testing.assert_close(clean, x0[i])
        torch.testing.assert_close(noise, eps[i])


def test_the_min_snr_weight_counts_an_error_of_the_image_alike():
    """An error e of x_0 is an error e / sigma of u."""
    a, b = levels(make_scheduler("flow"), torch.tensor([50, 500, 999]), torch.float64)
    error = 0.2
    weighted = min_snr(a, b, "flow_prediction", 5.0) * (error / b) ** 2
    torch.testing.assert_close(weighted, (a / b).square().clamp(max=5.0) * error**2)


class Gaussian:
    """Independent data N(mu, s^2) and its exact velocity E[eps - x_0 | x]."""

    def __init__(self, spread):
        source = torch.Generator().manual_seed(1)
        self.mu = torch.randn(SHAPE, generator=source, dtype=torch.float64)
        self.spread = spread

    def __call__(self, x, t, y=None):
        sigma = (t.double() / 1000).view(-1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * self.spread**2 + sigma**2
        gap = x - (1 - sigma) * self.mu
        clean = self.mu + (1 - sigma) * self.spread**2 / variance * gap
        return (x - clean) / sigma


def sampled(model, array, **options):
    return sample_by(
        model, range(4), seed=0, scheduler=make_scheduler("flow"), timesteps=array, shape=SHAPE, dtype=torch.float64,
        **options,
    ).samples  # fmt: skip


def test_the_exact_velocity_of_one_image_leads_there_in_one_step_and_in_many():
    point = Gaussian(spread=0.0)
    for steps in (1, 3, 20):
        torch.testing.assert_close(sampled(point, timesteps(steps)), point.mu.expand(4, *SHAPE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_many_steps_are_the_exact_map_of_gaussian_data(spread):
    """The flow of a Gaussian leads the noise z to mu + s z; Euler's error is of first order."""
    noise = torch.stack([torch.randn(SHAPE, generator=generator(0, Stream.SAMPLE, i)) for i in range(4)]).double()
    model, errors = Gaussian(spread), []
    for steps in (20, 100, 500):
        errors.append(float((sampled(model, timesteps(steps)) - model.mu - spread * noise).abs().max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.02
    together = sampled(model, timesteps(20), parallel=Parallel(solver="picard", rtol=1e-8))
    torch.testing.assert_close(together, sampled(model, timesteps(20)), rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="flow"):
        same_noise(make_scheduler("flow"), "ddim")
    with pytest.raises(ValueError, match="ddim"):
        same_noise(make_scheduler("ddpm"), "flow")
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        is_flow(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="eta"):
        Reverse(make_scheduler("flow"), timesteps(3), eta=0.5)
    for shift, kind in ((0.0, "flow"), (2.0, "ddpm")):
        with pytest.raises(ValueError, match="shift"):
            make_scheduler(kind, shift=shift)
