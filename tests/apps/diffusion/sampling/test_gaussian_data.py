"""The sampling loop on Gaussian data, whose denoiser is known in closed form.

Gaussian data N(mu, S) has the denoiser E[x_0 | x_t] = mu + sqrt(a) S (a S + (1 - a) I)^-1 (x_t - sqrt(a) mu),
a = abar_t. With it, each sampler is an affine map of its noise, component by component in the eigenbasis of S.
"""

import math

import numpy as np
import pytest
import torch

from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.schedulers.noise_schedule import SAMPLERS, make_scheduler, same_noise
from apps.diffusion.schedulers.timesteps import timesteps
from tests.apps.diffusion.helpers.small_models import sample_by

SHAPE = (1, 2, 2)
SPREAD = np.array([0.1, 0.5, 1.0, 2.0])  # standard deviations along the eigenvectors


class Gaussian:
    """Data N(mu + label, S) and its exact velocity."""

    null_class = 5

    def __init__(self, scheduler):
        source = torch.Generator().manual_seed(0)
        self.basis = torch.linalg.qr(torch.randn(4, 4, generator=source, dtype=torch.float64))[0]
        self.mu = torch.randn(4, generator=source, dtype=torch.float64)
        self.spread = torch.tensor(SPREAD)
        self.abar = scheduler.alphas_cumprod.double()

    def covariance(self):
        return (self.basis * self.spread**2) @ self.basis.T

    def root(self):
        return (self.basis * self.spread) @ self.basis.T

    def __call__(self, x, t, y=None):
        a = self.abar[t[0]]
        mu = self.mu if y is None else self.mu + y[:, None].double()
        x = x.flatten(1)
        gain = torch.linalg.solve(
            a * self.covariance() + (1 - a) * torch.eye(4, dtype=torch.float64), a.sqrt() * self.covariance()
        )
        clean = mu + (x - a.sqrt() * mu) @ gain.mT
        eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
        return (a.sqrt() * eps - (1 - a).sqrt() * clean).unflatten(1, SHAPE)


def affine_step(a, b, sd, eta):
    """In one eigendirection of standard deviation sd and mean 0, x at abar = b is A x + C z from x at abar = a."""
    gain = math.sqrt(a) * sd**2 / (a * sd**2 + 1 - a)
    rest = (1 - math.sqrt(a) * gain) / math.sqrt(1 - a)
    small = (1 - b) / (1 - a) * (1 - a / b) * eta**2
    return math.sqrt(b) * gain + math.sqrt(1 - b - small) * rest, math.sqrt(small)


def by_hand(gaussian, array, noises, eta, final=1.0):
    """Samples (N, 4) from noises (N, K + 1, 4): the first is x at the first timestep."""
    abar = gaussian.abar.tolist()
    x = noises[:, 0].numpy() @ gaussian.basis.numpy()
    mean = gaussian.mu.numpy() @ gaussian.basis.numpy()
    x = x - math.sqrt(abar[array[0]]) * mean
    for k, t in enumerate(array):
        b = abar[array[k + 1]] if k + 1 < len(array) else final
        for j, sd in enumerate(SPREAD):
            A, C = affine_step(abar[t], b, sd, eta)
            z = noises[:, k + 1].numpy() @ gaussian.basis.numpy()[:, j] if C else 0.0
            x[:, j] = A * x[:, j] + C * z
    return torch.from_numpy((x + mean) @ gaussian.basis.numpy().T)


def drawn(n, steps, seed):
    """The noise that each sample's generator gives, first and ancestral, (N, steps + 1, 4)."""
    sources = [generator(seed, Stream.SAMPLE, i) for i in range(n)]
    rows = [torch.stack([torch.randn(SHAPE, generator=g) for _ in range(steps + 1)]) for g in sources]
    return torch.stack(rows).flatten(2).double()


@pytest.mark.parametrize("array", [timesteps(20), timesteps(7, "linspace"), timesteps(30), (999, 998, 400, 2)])
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 1.0)])
def test_gaussian_data_sample_by_sample(kind, eta, array):
    scheduler = make_scheduler(kind)
    gaussian = Gaussian(scheduler)
    options = {"eta": eta} if kind == "ddim" else {}
    result = sample_by(
        gaussian, range(9), seed=3, scheduler=scheduler, timesteps=array, shape=SHAPE, dtype=torch.float64, **options
    )
    expected = by_hand(gaussian, array, drawn(9, len(array), 3), eta)
    torch.testing.assert_close(result.samples.flatten(1), expected, rtol=1e-9, atol=1e-9)


def exact_map(gaussian, noise):
    """Where the probability-flow ODE leads from pure noise: mu + S^(1/2) noise."""
    return gaussian.mu + noise @ gaussian.root()


@pytest.mark.parametrize("kind", ["ddim", "dpm++"])
def test_many_deterministic_steps_are_the_exact_map(kind):
    errors = []
    for steps in (20, 100, 500):
        scheduler = make_scheduler(kind)
        gaussian = Gaussian(make_scheduler("ddim"))
        result = sample_by(
            gaussian,
            range(16),
            seed=0,
            scheduler=scheduler,
            timesteps=timesteps(steps),
            shape=SHAPE,
            dtype=torch.float64,
        )
        exact = exact_map(gaussian, drawn(16, 0, 0)[:, 0])
        errors.append(float((result.samples.flatten(1) - exact).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[-1] < 0.03


def spread_of_samples(array, eta):
    """Standard deviations along the eigenvectors that the affine steps lead to."""
    abar = make_scheduler("ddim").alphas_cumprod.double().tolist()
    steps = list(zip(array, [*(abar[t] for t in array[1:]), 1.0], strict=True))
    variance = np.ones(4)
    for t, b in steps:
        for j, sd in enumerate(SPREAD):
            A, C = affine_step(abar[t], b, sd, eta)
            variance[j] = A**2 * variance[j] + C**2
    return np.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_more_steps_bring_the_spread_of_the_data(eta):
    errors = [np.abs(spread_of_samples(timesteps(n), eta) / SPREAD - 1).max() for n in (20, 100, 1000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm++"])
def test_mean_and_covariance_are_those_of_the_data(kind):
    scheduler = make_scheduler(kind)
    gaussian = Gaussian(make_scheduler("ddim"))
    n = 2048
    result = sample_by(
        gaussian,
        range(n),
        seed=1,
        scheduler=scheduler,
        timesteps=timesteps(100),
        shape=SHAPE,
        chunk=n,
        dtype=torch.float64,
    )
    spread = SPREAD if kind == "dpm++" else spread_of_samples(timesteps(100), float(kind == "ddpm"))
    x = (result.samples.flatten(1) - gaussian.mu) @ gaussian.basis / torch.tensor(spread)
    assert x.mean(0).abs().max() < 5 / n**0.5
    assert (torch.cov(x.T) - torch.eye(4)).abs().max() < 5 * (2 / n) ** 0.5


def test_guidance_on_gaussian_data_moves_the_mean_by_the_formula():
    """Means differ by the label alone, so guidance s puts the mean at u + s (c - u)."""
    scheduler = make_scheduler("ddim")
    gaussian = Gaussian(scheduler)
    options = {"seed": 2, "scheduler": scheduler, "timesteps": timesteps(10), "shape": SHAPE, "dtype": torch.float64}
    guided = sample_by(gaussian, range(4), [1] * 4, guidance=Guidance(scale=3.0), **options).samples
    plain = {label: sample_by(gaussian, range(4), [label] * 4, **options).samples for label in (1, 5)}
    torch.testing.assert_close(guided, plain[5] + 3.0 * (plain[1] - plain[5]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_sampler_brings_gaussian_data(name, zero_snr):
    """Mean and covariance at 100 timesteps; the deterministic ones lead each noise where the exact map does."""
    base = make_scheduler("ddim", zero_snr=zero_snr)
    if zero_snr and name in ("dpm++-single", "lms"):
        with pytest.raises(ValueError, match="zero_snr"):
            same_noise(base, name)
        return
    gaussian, n, array = Gaussian(base), 256, timesteps(100 if name == "lms" else 200)
    options = {"seed": 5, "scheduler": same_noise(base, name), "shape": SHAPE, "chunk": n, "dtype": torch.float64}
    x = sample_by(gaussian, range(n), timesteps=array, **options).samples.flatten(1)
    if name not in ("ddpm", "euler-ancestral"):
        error = (x - exact_map(gaussian, drawn(n, 0, 5)[:, 0])).abs().max()
        assert error < (0.07 if name in ("ddim", "euler") else 0.03)  # first order, second order
    standard = (x - gaussian.mu) @ gaussian.basis / torch.tensor(SPREAD)
    assert standard.mean(0).abs().max() < 3 / n**0.5
    assert (torch.cov(standard.T) - torch.eye(4)).abs().max() < 4 * (2 / n) ** 0.5
