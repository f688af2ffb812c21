"""One reverse step: the next timestep is the next entry of the array, for every array."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.schedulers.reverse_step import Reverse, fresh_noise
from apps.diffusion.schedulers.timesteps import timesteps

ARRAYS = [timesteps(20), timesteps(30), timesteps(7, "linspace"), (999, 998, 500, 3, 2, 0), (999,)]


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def image_and_noise(shape=(3, 2, 4, 4), dtype=torch.float64):
    source = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=source).to(dtype), torch.randn(shape, generator=source).to(dtype)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize(("kind", "tolerance"), [("ddim", 1e-12), ("dpm++", 2e-3)])
def test_with_a_perfect_prediction_every_step_lands_on_the_path_at_the_next_timestep(kind, array, tolerance):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for one image and one noise, at every t of the array.

    DPM-Solver++ in diffusers is float32 and starts from abar = 2^-24 instead of 0.
    """
    scheduler = make_scheduler(kind)
    abar = scheduler.alphas_cumprod.double()
    x0, eps = image_and_noise()
    reverse = Reverse(scheduler, array)
    assert reverse.previous == (*array[1:], -1)
    x = abar[array[0]].sqrt() * x0 + (1 - abar[array[0]]).sqrt() * eps
    for k, t in enumerate(array):
        v = abar[t].sqrt() * eps - (1 - abar[t]).sqrt() * x0
        x = reverse.step(k, v, x, generators(3)).double()
        a = abar[array[k + 1]] if k + 1 < len(array) else torch.ones(())
        torch.testing.assert_close(x, a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=0, atol=tolerance)


def test_diffusers_own_ddim_misses_the_path_where_its_previous_timestep_is_wrong():
    """Why the step is made here: for 30 trailing steps diffusers goes from 999 to 966, but then to 933, not 932."""
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(30)
    abar = scheduler.alphas_cumprod.double()
    x0, eps = image_and_noise()
    t, s = scheduler.timesteps[1:3].tolist()
    x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
    v = abar[t].sqrt() * eps - (1 - abar[t]).sqrt() * x0
    on_path = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    theirs = scheduler.step(v, t, x).prev_sample
    ours = Reverse(scheduler, scheduler.timesteps.tolist()).step(1, v, x, generators(3))
    assert (theirs - on_path).abs().max() > 1e-4 > 1e-6 > (ours - on_path).abs().max()


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "epsilon"])
def test_ddim_is_diffusers_ddim_where_that_is_right(eta, prediction):
    scheduler = make_scheduler("ddim", prediction=prediction, zero_snr=prediction != "epsilon")
    array = timesteps(20)
    reverse = Reverse(scheduler, array, eta=eta)
    scheduler.set_timesteps(20)
    x, out = image_and_noise(dtype=torch.float32)
    for k in range(20):
        noise = fresh_noise(x, generators(3, seed=k))
        extra = {"variance_noise": noise} if eta else {}
        theirs = scheduler.step(out, array[k], x, eta=eta, **extra).prev_sample
        if k == 19:  # into the image diffusers' variance is 0 as well
            assert scheduler._get_variance(array[k], -1) == 0
        ours = reverse.step(k, out, x, generators(3, seed=k))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_is_diffusers_ddpm_with_the_same_array(array, learn_sigma, clip):
    scheduler = make_scheduler("ddpm", learn_sigma=learn_sigma, clip=clip)
    reverse = Reverse(scheduler, array)
    scheduler.set_timesteps(timesteps=list(array))
    x, out = image_and_noise(dtype=torch.float32)
    if learn_sigma:
        out = torch.cat([out, x.flip(0).tanh()], dim=1)
    for k, t in enumerate(array[:-1]):
        ours = reverse.step(k, out, x, generators(3, seed=k))
        theirs = scheduler.step(out, t, x, generator=generators(3, seed=k)).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    last = len(array) - 1
    final = reverse.step(last, out, x, generators(3))
    clean = reverse.scheduler.step(out, array[-1], x).pred_original_sample
    torch.testing.assert_close(final, clean, rtol=1e-4, atol=2e-5)  # no noise on the image itself


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy 2 on diffusers' own code
def test_other_diffusers_schedulers_step_themselves_over_the_array():
    """Euler, from its own starting scale and with its own scaling of the input, finds a perfect predictor's image."""
    scheduler = EulerDiscreteScheduler(beta_start=1e-4, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    reverse = Reverse(scheduler, timesteps(30))
    abar = scheduler.alphas_cumprod.double()
    x0, eps = image_and_noise(dtype=torch.float32)
    x = reverse.start(eps)
    for k, t in enumerate(reverse.timesteps):
        shown = reverse.input(k, x).double()
        noise = (shown - abar[t].sqrt() * x0) / (1 - abar[t]).sqrt()
        v = abar[t].sqrt() * noise - (1 - abar[t]).sqrt() * x0
        x = reverse.step(k, v.float(), x, generators(3))
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-2)


def test_the_scheduler_is_left_as_it_was_and_each_walk_has_its_own_memory():
    scheduler = make_scheduler("dpm++")
    before = dict(scheduler.__dict__)
    x, out = image_and_noise(dtype=torch.float32)
    results = []
    for _ in range(2):
        reverse, y = Reverse(scheduler, timesteps(5)), x
        for k in range(5):
            y = reverse.step(k, out * (k + 1), y, generators(3))
        results.append(y)
    assert torch.equal(*results)
    assert scheduler.num_inference_steps is None and scheduler.__dict__.keys() == before.keys()


def test_noise_of_a_sample_is_its_generators_alone():
    many = fresh_noise(torch.empty(5, 2, 3, 3), generators(5))
    one = fresh_noise(torch.empty(1, 2, 3, 3), generators(5)[3:4])
    assert torch.equal(many[3:4], one)
    assert fresh_noise(torch.empty(1, 2, dtype=torch.float64), generators(1)).dtype == torch.float64


@pytest.mark.parametrize("array", [(), (5, 5), (3, 10), (1000, 1), (5, -1)])
def test_impossible_arrays_are_refused(array):
    with pytest.raises(ValueError, match="timesteps"):
        Reverse(make_scheduler("ddim"), array)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy 2 on diffusers' own code
def test_impossible_pairs_are_refused():
    with pytest.raises(ValueError, match="eta"):
        Reverse(make_scheduler("ddpm"), timesteps(5), eta=0.5)
    with pytest.raises(ValueError, match="eta"):
        Reverse(make_scheduler("ddim"), timesteps(5), eta=1.5)
    for scheduler in (PNDMScheduler(), HeunDiscreteScheduler()):
        with pytest.raises(ValueError, match=type(scheduler).__name__):
            Reverse(scheduler, timesteps(5))
    x, out = image_and_noise()
    with pytest.raises(ValueError, match="learn_sigma"):
        Reverse(make_scheduler("ddpm", learn_sigma=True), timesteps(5)).step(1, out, x, generators(3))
