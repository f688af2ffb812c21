"""Timestep distributions, compared with scipy's quantiles, and min-SNR weights, compared with the paper's formula."""

import numpy as np
import pytest
import scipy.stats
import torch

from apps.diffusion.config.training import Config, LossConfig, ModelConfig, NoiseSchedule, OptimizerConfig
from apps.diffusion.data import digits
from apps.diffusion.schedulers.noise_levels import levels
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.training.loss import loss
from apps.diffusion.training.trainer import Trainer
from apps.diffusion.training.weighting import min_snr, quantile


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (-1.2, 0.5), (0.7, 2.0)])
def test_the_logit_normal_is_that_of_scipy(location, scale):
    u = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    normal = scipy.stats.norm.ppf(u.numpy(), loc=location, scale=scale)
    expected = 1 / (1 + np.exp(-normal))
    np.testing.assert_allclose(quantile(u, "logit_normal", location, scale).numpy(), expected, rtol=1e-9)
    assert torch.equal(quantile(u, "uniform"), u)
    ends = quantile(torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), "logit_normal", location, scale)
    assert ends[0] == 0 and 0.5 < ends[1] < 1
    with pytest.raises(ValueError, match="timesteps"):
        quantile(u, "normal")  # pyright: ignore[reportArgumentType]


def test_weights_are_those_of_the_paper_s_equation():
    scheduler = make_scheduler("ddpm", zero_snr=False)
    abar = scheduler.alphas_cumprod.double()
    snr = abar / (1 - abar)
    capped = snr.clamp(max=5.0)
    for prediction, expected in (
        ("sample", capped),
        ("epsilon", capped / snr),
        ("v_prediction", capped / (snr + 1)),
    ):
        assert torch.allclose(min_snr(abar.sqrt(), (1 - abar).sqrt(), prediction, 5.0), expected, rtol=1e-9)


def test_one_error_of_the_image_counts_the_same_whatever_is_predicted():
    """Errors of x_0, eps and v that are one error of x_0 have one weighted loss."""
    abar, error = torch.tensor([0.9, 0.3, 0.01], dtype=torch.float64), 0.2
    of_eps = error * (abar / (1 - abar)).sqrt()  # eps = (x - sqrt(abar) x_0) / sqrt(1 - abar)
    of_v = error / (1 - abar).sqrt()  # v = (sqrt(abar) x - x_0) / sqrt(1 - abar)
    weighted = [
        min_snr(abar.sqrt(), (1 - abar).sqrt(), prediction, 5.0) * value**2
        for prediction, value in (("sample", torch.tensor(error)), ("epsilon", of_eps), ("v_prediction", of_v))
    ]
    assert torch.allclose(weighted[0], weighted[1]) and torch.allclose(weighted[0], weighted[2])


def test_the_weight_is_finite_at_zero_terminal_snr():
    abar = make_scheduler("ddpm").alphas_cumprod
    weights = min_snr(abar.sqrt(), (1 - abar).sqrt(), "v_prediction", 5.0)
    assert weights.isfinite().all() and weights[-1] == 0 and weights.max() <= 1


def trainer(**changes):
    config = Config(
        model=ModelConfig(hidden=16, heads=2, patch=4),
        optimizer=OptimizerConfig(images=640, batch=64, warmup=0),
        track="none",
        **changes,
    )
    return Trainer(config, digits("train"))


def test_the_loss_is_the_weighted_mean_of_the_errors():
    made = trainer(loss=LossConfig(weighting="min_snr", gamma=2.0))
    x, y, noise = made._batch()
    model = made.accelerator.unwrap_model(made.model)
    plain, weighted = (
        loss(
            model,
            x,
            y,
            noise,
            scheduler=made.scheduler,
            null_class=made.null_class,
            gamma=gamma,
            solve=made._solve(noise),
        )
        for gamma in (None, 2.0)
    )
    w = min_snr(*levels(made.scheduler, noise.t), "v_prediction", 2.0)
    assert torch.equal(plain.error, weighted.error)
    assert weighted.total.item() == pytest.approx((w * plain.error).mean().item(), rel=1e-5)
    assert weighted.total.item() == pytest.approx(made._loss(x, y, noise).total.item(), rel=0.5)


def test_the_trainer_draws_the_timesteps_of_its_distribution():
    drawn = {}
    for name in ("uniform", "logit_normal"):
        made = trainer(loss=LossConfig(timesteps=name))
        drawn[name] = np.sort(made._batch()[2].t.numpy())
    levels = (np.arange(64) + 0.5) / 64
    # one timestep from each of 64 equally probable parts: within a part of the quantiles
    for name, quantiles in (("uniform", levels), ("logit_normal", 1 / (1 + np.exp(-scipy.stats.norm.ppf(levels))))):
        parts = np.diff(quantiles, prepend=0, append=1)
        assert (np.abs(drawn[name] / 1000 - quantiles) <= np.maximum(parts[:-1], parts[1:]) + 1e-3).all()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("options", [{}, {"weighting": "min_snr"}, {"timesteps": "logit_normal", "location": 0.5}])
def test_every_combination_trains(prediction, options):
    schedule = NoiseSchedule(prediction=prediction, zero_snr=prediction != "epsilon")
    made = trainer(schedule=schedule, loss=LossConfig(**options))
    assert all(bool(finite) for _, finite in (made.step() for _ in range(2)))


def test_options_that_do_not_apply_are_refused():
    for options, named in (
        ({"gamma": 1.0}, "gamma"),
        ({"scale": 2.0}, "scale"),
        ({"location": 1.0}, "location"),
        ({"weighting": "min_snr", "gamma": 0.0}, "gamma"),
        ({"timesteps": "logit_normal", "scale": float("inf")}, "scale"),
        ({"timesteps": "logit_normal", "location": float("nan")}, "location"),
    ):
        with pytest.raises(ValueError, match=named):
            LossConfig(**options)
