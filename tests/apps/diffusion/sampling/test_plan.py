"""Sampling options: given options are used, budgets are spent exactly, and solvers agree."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from apps.diffusion.config import training as c
from apps.diffusion.config.sampling import OptionError, Sampler, SamplingOptions
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.pipeline_keywords import options_of
from apps.diffusion.sampling.plan import class_numbers
from apps.diffusion.sampling.plan import plan as translate
from apps.diffusion.sampling.sampler import sample
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import SAMPLERS, make_scheduler, same_noise, scheduler_of
from apps.diffusion.schedulers.timesteps import timesteps
from implicit import Anderson, AndersonGS, Broyden, Picard
from tests.apps.diffusion.helpers.small_models import randomized

CONFIG = c.Config(sampling=SamplingOptions(steps=4, iterations=(3,), sampler="ddpm", reuse="on", guidance=2.0))
SMALL: dict[str, Any] = {"input_size": 4, "in_channels": 2, "hidden_size": 32, "num_heads": 4, "num_classes": 10}


def fpdm(**change):
    model = randomized(FPDM(**SMALL | change))
    with torch.no_grad():
        model.block_fixed_point_projection_fc2.weight.mul_(0.4)
    return model


def plan(model, config, options):
    return translate(model, scheduler_of(config), options, defaults=config.sampling_options())


def draw(chosen, model, indices, labels, **options):
    return sample(model, indices, labels, plan=chosen, **options)


def samples(recipe, model=None, n=3):
    model = model or fpdm()
    return draw(plan(model, CONFIG, recipe), model, range(n), [1, 2, 3][:n], seed=0, chunk=4)


def test_what_is_left_out_is_the_runs_own():
    model = fpdm()
    own: Any = plan(model, CONFIG, SamplingOptions())
    assert own.timesteps == timesteps(4) and own.guidance.scale == 2.0 and own.solve.iterations == (3, 3, 3, 3)
    assert type(own.scheduler).__name__ == "DDPMScheduler" and own.solve.reuse == Reuse()
    other: Any = plan(
        model,
        CONFIG,
        SamplingOptions(
            sampler="dpm++",
            steps=5,
            spacing="linspace",
            guidance=1.5,
            guidance_channels=1,
            solver=Broyden(memory=7),
            reuse="blended",
            share=0.25,
            rtol=(0.1,),
            max_evals=9,
        ),
    )
    assert other.timesteps == timesteps(5, "linspace") and other.scheduler.config["timestep_spacing"] == "linspace"
    assert (other.guidance.scale, other.guidance.channels) == (1.5, 1)
    assert other.solve.solver == Broyden(memory=7) and other.solve.reuse == Reuse(share=0.25)
    assert [(s.rtol, s.atol, s.max_evals) for s in other.solve.stop] == [(0.1, 0.0, 9)] * 5
    for recipe, reuse, solver in (
        (SamplingOptions(reuse="extrapolated"), Reuse(extrapolation=1.0), Picard()),
        (SamplingOptions(reuse="off", solver=Anderson()), None, Anderson()),
    ):
        solve: Any = plan(model, CONFIG, recipe).solve
        assert (solve.reuse, solve.solver) == (reuse, solver)
    assert plan(model, CONFIG, SamplingOptions(timesteps=(999, 7))).timesteps == (999, 7)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("allocation", ["constant", "increasing", "decreasing"])
def test_a_budget_of_block_passes_is_spent_to_the_last_block(allocation, guidance):
    for budget in (50, 96):
        effort = samples(SamplingOptions(block_passes=budget, allocation=allocation, guidance=guidance)).effort
        assert effort.block_passes.tolist() == [budget] * 3
        assert effort.computed == budget * 4
        each = effort.evaluations[0].tolist()
        assert each == sorted(each, reverse=allocation == "decreasing") or allocation == "constant"


def test_a_budget_of_multiply_accumulates_leaves_less_than_one_iteration():
    model = fpdm()
    budget = 4 * model.macs(6) + 100
    effort = samples(SamplingOptions(macs=float(budget), guidance=1.0), model).effort
    assert 0 <= budget - int(effort.macs[0]) < model.macs(2) - model.macs(1)


def test_iterations_are_shared_out_or_listed():
    decreasing = samples(SamplingOptions(iterations=(4,), allocation="decreasing", guidance=1.0))
    each = decreasing.effort.evaluations[0].tolist()
    assert sum(each) == 16 and each == sorted(each, reverse=True) and each[0] > each[-1]
    listed = samples(SamplingOptions(iterations=(1, 5, 2, 4), guidance=1.0)).effort.evaluations
    assert listed.tolist() == [[1, 5, 2, 4]] * 3


@pytest.mark.parametrize("reuse", ["off", "on", "blended", "extrapolated"])
def test_no_tolerance_is_a_fixed_count(reuse):
    counted = samples(SamplingOptions(iterations=(3,), reuse=reuse))
    untold = samples(SamplingOptions(rtol=(0.0,), max_evals=3, reuse=reuse))
    assert torch.equal(counted.samples, untold.samples)
    assert torch.equal(counted.effort.evaluations, untold.effort.evaluations)
    assert not counted.samples.requires_grad


def test_the_solver_does_not_change_a_converged_sample():
    model = fpdm().double()

    def found(solver, reuse, **options):
        options = options or {"rtol": (1e-8,), "max_evals": 200}
        return samples(SamplingOptions(steps=3, solver=solver, reuse=reuse, guidance=1.0, **options), model, n=2)

    exact = found(Picard(), "off")
    assert exact.effort.residuals.max() <= 1.1e-8 and exact.samples.std() > 0.1
    assert (found(Picard(), "off", iterations=(1,)).samples - exact.samples).abs().max() > 1e-2
    for choice in ((Picard(), "on"), (Anderson(), "blended"), (AndersonGS(), "extrapolated"), (Broyden(), "on")):
        torch.testing.assert_close(found(*choice).samples, exact.samples, rtol=1e-5, atol=1e-5)


def test_a_tolerance_for_each_timestep_stops_each_sample_by_itself():
    tight = samples(SamplingOptions(rtol=(0.5, 0.1, 1e-2, 1e-3), guidance=1.0, reuse="off"))
    assert (tight.effort.residuals <= 1.001 * torch.tensor([0.5, 0.1, 1e-2, 1e-3])).all()
    evaluations = tight.effort.evaluations
    assert (evaluations.unique(dim=0).shape[0] > 1) and (evaluations[:, 0] < evaluations[:, 3]).all()
    held = 4 * (evaluations.amax(0).sum() + 2 * 4)  # a chunk of 4 rows; its fourth place may have needed more
    assert tight.effort.computed >= held > tight.effort.block_passes.sum()


def test_a_dit_spends_its_budget_in_steps():
    model = randomized(DiT(depth=3, **SMALL))
    effort = samples(SamplingOptions(block_passes=30, guidance=1.0), model).effort
    assert effort.evaluations.shape == (3, 10) and effort.block_passes.tolist() == [30] * 3
    with pytest.raises(ValueError, match="block_passes"):
        samples(SamplingOptions(block_passes=30 + 3), model)
    with pytest.raises(ValueError, match="steps"):
        samples(SamplingOptions(block_passes=30, steps=4, guidance=1.0), model)
    with pytest.raises(ValueError, match=r"iterations\b.*\bsolver"):
        samples(SamplingOptions(iterations=(3,), solver=Anderson()), model)


def test_guidance_needs_classes():
    model = fpdm(num_classes=0)
    with pytest.raises(ValueError, match="guidance"):
        plan(model, CONFIG, SamplingOptions(guidance=2.0))
    chosen = plan(model, CONFIG, SamplingOptions(guidance=1.0))
    assert draw(chosen, model, range(2), None, seed=0).labels is None


def test_an_interval_of_guidance_is_in_the_plan_and_excludes_what_it_would_change():
    model, scheduler = fpdm(), make_scheduler("ddim")
    given = SamplingOptions(guidance=3.0, guidance_interval=(200, 800))
    assert translate(model, scheduler, given).guidance == Guidance(scale=3.0, interval=(200, 800))
    # another scale of the caller replaces the interval of the run
    found = translate(model, scheduler, SamplingOptions(guidance=2.0), defaults=given)
    assert found.guidance == Guidance(scale=2.0)
    with pytest.raises(OptionError, match="guidance_interval"):
        translate(model, scheduler, SamplingOptions(guidance_interval=(0, 5)))
    others: list[dict[str, Any]] = [{"block_passes": 9}, {"macs": 1e9}, {"parallel": "picard"}]
    for options in (
        {"guidance_interval": (800, 200)},
        {"guidance_interval": (-1, 200)},
        *({"guidance_interval": (0, 9), **other} for other in others),
    ):
        with pytest.raises(OptionError, match="guidance_interval"):
            SamplingOptions(**options)
    with pytest.raises(ValueError, match="guidance_interval"):
        options_of(guidance_interval=(1, 2, 3))
    assert options_of(guidance_interval=torch.tensor([1, 2])).guidance_interval == (1, 2)


@pytest.mark.parametrize(
    "options", [{"guidance_channels": 3}, {"eta": 0.5, "sampler": "ddpm"}, {"timesteps": (999, 999)}], ids=str
)
def test_options_that_do_not_fit_are_refused_by_name(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        translate(fpdm(), make_scheduler("ddim"), SamplingOptions(**options))


def test_every_sampler_has_the_networks_noise():
    assert set(get_args(Sampler)) == {*SAMPLERS, "flow"}
    base = make_scheduler("ddpm", spacing="linspace", clip=1.0, learn_sigma=True)
    for name in ("ddim", "ddpm"):
        mine, direct = same_noise(base, name), make_scheduler(name, spacing="linspace", clip=1.0, learn_sigma=True)
        assert type(mine) is type(direct)
        assert all(mine.config[key] == value for key, value in direct.config.items() if key[0] != "_")
    bare = make_scheduler("ddpm", zero_snr=False, betas="scaled_linear", prediction="epsilon", train_steps=500)
    for name in SAMPLERS:
        other = same_noise(bare, name)
        assert torch.allclose(other.alphas_cumprod.double(), bare.alphas_cumprod.double(), rtol=1e-6), name
        assert (other.config["prediction_type"], other.config["num_train_timesteps"]) == ("epsilon", 500)
    with pytest.raises(ValueError, match="heun"):
        same_noise(base, "heun")


def test_a_sampler_changes_into_every_other_sampler():
    """Also from a class that has no option for zero terminal SNR, or none for a bound of x_0: then there is neither."""
    base = make_scheduler("ddpm", zero_snr=False, prediction="epsilon", spacing="linspace", clip=1.0)
    for one in SAMPLERS:
        for name in SAMPLERS:
            before = same_noise(base, one)
            other = same_noise(before, name)
            assert torch.equal(other.alphas_cumprod, base.alphas_cumprod), (one, name)
            assert other.config["timestep_spacing"] == "linspace", (one, name)
            if "clip_sample" in other.config:
                assert other.config["clip_sample"] == before.config.get("clip_sample", False), (one, name)
    single = same_noise(base, "dpm++-single")
    assert type(single).from_config(dict(single.config)).config["timestep_spacing"] == "linspace"


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_a_number_of_steps(name):
    """By name, and as the scheduler of a pipeline that was saved with this sampler."""
    base = make_scheduler("ddpm", zero_snr=False, prediction="epsilon")
    model, options = fpdm(num_classes=0), SamplingOptions(steps=4, iterations=(1,))
    for scheduler, given in ((base, replace(options, sampler=name)), (same_noise(base, name), options)):
        assert translate(model, scheduler, given).timesteps == (999, 749, 499, 249)
        assert draw(translate(model, scheduler, given), model, range(1), None, seed=0).samples.isfinite().all()
        if name != "unipc":  # it takes a number of steps only
            assert translate(model, scheduler, replace(given, spacing="linspace")).timesteps == (999, 666, 333, 0)


def test_recipes_are_checked():
    config = replace(CONFIG, schedule=c.NoiseSchedule(zero_snr=False))
    assert plan(fpdm(), config, SamplingOptions(spacing="leading")).timesteps == (750, 500, 250, 0)
    with pytest.raises(ValueError, match="UniPC"):
        plan(fpdm(), config, SamplingOptions(sampler="unipc", spacing="linspace"))
    bad: dict[str, Any]
    for bad in ({"eta": 2.0}, {"share": -1.0}, {"extrapolation": 1.5}, {"iterations": (0,)}, {"max_evals": 0}):
        with pytest.raises(ValueError):
            SamplingOptions(**bad)
    for bad in ({"share": 0.9}, {"share": 0.9, "reuse": "on"}, {"extrapolation": 0.5}, {"max_evals": 9}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingOptions(**bad)
    for bad in ({"seconds": 1.0}, {"window": 4}, {"parallel_rtol": 0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingOptions(**bad)
    for bad in ({"reuse": "on"}, {"allocation": "increasing"}, {"parallel_rtol": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingOptions(**{"parallel": "picard"} | bad)
    for macs in (float("nan"), float("inf"), 0.0):
        with pytest.raises(ValueError, match="macs"):
            plan(fpdm(), config, SamplingOptions(macs=macs))


def test_classes_by_number_and_by_name():
    """A name comes before a number; accents may be written as characters of their own."""
    names = ("10", "caf\u00e9", "re\u0301", "x")
    given = ["10", "cafe\u0301", "r\u00e9", "x", "2", 3, 4]
    assert class_numbers("--classes", given, 4, names) == [0, 1, 2, 3, 2, 3, 4]
    for wrong in ("y", "5", -1):
        with pytest.raises(ValueError, match="--classes"):
            class_numbers("--classes", [wrong], 4, names)
