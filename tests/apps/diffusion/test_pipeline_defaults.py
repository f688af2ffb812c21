"""The sampling options of a training run are the defaults of its pipeline, before and after saving."""

import dataclasses
from typing import Any

import pytest

from apps.diffusion import pipeline as module
from apps.diffusion.checkpoint.open_network import OpenedNetwork, open_network
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.sampling.plan import plan
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from implicit import Broyden
from tests.apps.diffusion.helpers.small_models import randomized

SMALL: dict[str, Any] = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 5}
# each option by a value other than its default, and what it needs beside it; None: the scheduler has it
OPTIONS: dict[str, dict[str, Any] | None] = {
    "sampler": None,
    "spacing": None,
    "eta": {"eta": 0.5},
    "steps": {"steps": 4},
    "timesteps": {"timesteps": (999, 500, 20)},
    "guidance": {"guidance": 2.0},
    "guidance_channels": {"guidance_channels": 1, "guidance": 2.0},
    "guidance_interval": {"guidance_interval": (300, 800), "guidance": 2.0},
    "iterations": {"iterations": (5,)},
    "block_passes": {"block_passes": 250},
    "macs": {"macs": 2e7},
    "seconds": {"seconds": 1e9, "allocation": "measured", "steps": 3},
    "allocation": {"allocation": "decreasing", "iterations": (6,)},
    "rtol": {"rtol": (0.1,)},
    "max_evals": {"max_evals": 7, "rtol": (0.1,)},
    "solver": {"solver": Broyden(memory=7)},
    "reuse": {"reuse": "history"},
    "share": {"share": 0.25, "reuse": "blended"},
    "extrapolation": {"extrapolation": 0.25, "reuse": "extrapolated"},
    "parallel": {"parallel": "anderson"},
    "parallel_rtol": {"parallel_rtol": 0.01, "parallel": "picard"},
    "window": {"window": 3, "parallel": "picard"},
}


def opened(options, model=None) -> OpenedNetwork:
    model = model or randomized(FPDM(**SMALL)).eval()
    return OpenedNetwork(model=model, scheduler=make_scheduler("ddim"), options=options, decoder=lambda *_: None)


def described(found) -> dict[str, Any]:
    """The fields of a plan that compare by value."""
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return {name: value for name, value in fields.items() if name not in ("scheduler", "curves")}


def test_every_option_has_a_case():
    assert set(OPTIONS) == {f.name for f in dataclasses.fields(SamplingOptions)}


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options is not None])
def test_every_option_of_a_run_reaches_the_plan_of_its_pipeline(name, monkeypatch, tmp_path):
    run = opened(SamplingOptions(**OPTIONS[name]))
    monkeypatch.setattr(module, "open_network", lambda *_: run)
    pipe: Any = FixedPointPipeline.from_run(tmp_path)
    expected = described(plan(run.model, run.scheduler, run.options))
    without = SamplingOptions(**{other: value for other, value in OPTIONS[name].items() if other != name})
    assert expected != described(plan(run.model, run.scheduler, without))
    pipe.save_pretrained(tmp_path / "saved")
    again = open_network(tmp_path / "saved")
    for options in (SamplingOptions(), again.options):
        if name != "seconds":  # what a second is worth is measured each time
            assert described(pipe._plan(options, None, None)) == expected
    assert pipe.config["sampling"].keys() == again.options.given().keys() - {"steps", "iterations", "guidance", "reuse"}


def test_another_sampler_does_not_take_the_stochasticity_of_the_run(monkeypatch, tmp_path):
    run = opened(SamplingOptions(eta=0.5, steps=3))
    monkeypatch.setattr(module, "open_network", lambda *_: run)
    pipe: Any = FixedPointPipeline.from_run(tmp_path, sampler="unipc")
    assert pipe._plan(SamplingOptions(), None, None).eta == 0
    assert FixedPointPipeline.from_run(tmp_path).defaults["eta"] == 0.5


def test_a_dit_takes_no_default_of_a_fixed_point(monkeypatch, tmp_path):
    run = opened(SamplingOptions(iterations=(3,), solver=Broyden(), eta=0.5), randomized(DiT(depth=2, **SMALL)).eval())
    monkeypatch.setattr(module, "open_network", lambda *_: run)
    pipe: Any = FixedPointPipeline.from_run(tmp_path)
    assert (pipe.config["iterations"], pipe.config["sampling"]) == (None, {"eta": 0.5})
    assert pipe._plan(SamplingOptions(), None, None).eta == 0.5


def test_defaults_that_exclude_each_other_and_keywords_that_do_not_exist_are_refused():
    model, scheduler = opened(SamplingOptions()).model, make_scheduler("ddim")
    with pytest.raises(ValueError, match="iterations"):
        FixedPointPipeline(model, scheduler, iterations=3, sampling={"macs": 1e9})
    with pytest.raises(TypeError, match="unknown_option"):
        FixedPointPipeline(model, scheduler)(0, unknown_option=3)
