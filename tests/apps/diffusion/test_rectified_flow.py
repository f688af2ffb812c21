"""A rectified flow keeps its objective from the flags of training to the pipeline folder."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.config import training as c
from apps.diffusion.config.command_line import parse_flags
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.data import digits
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.sampling.plan import plan
from apps.diffusion.sampling.sampler import sample
from apps.diffusion.schedulers.noise_levels import is_flow
from apps.diffusion.training.distillation import student_config
from apps.diffusion.training.trainer import Trainer
from implicit import StochasticJFB

FLOW = c.NoiseSchedule(kind="rectified_flow", shift=2.0)


def config_of(out, kind="fpdm"):
    return c.Config(
        model=c.ModelConfig(kind=kind, hidden=16, heads=2, patch=4, **({"depth": 2} if kind == "dit" else {})),
        schedule=FLOW,
        loss=c.LossConfig(timesteps="logit_normal", weighting="min_snr"),
        optimizer=c.OptimizerConfig(images=96, batch=16, lr=1e-2, warmup=0),
        grad=StochasticJFB(N=1, M=2),
        sampling=SamplingOptions(steps=4, sampler="flow" if kind == "fpdm" else None),
        checkpoint_every=48,
        track="none",
        out=out,
    )


def trained(config, start=None):
    Trainer(config, digits("train"), start).run(lambda state: checkpoint.save(config.out, state, keep=9))
    (config.out / "config.json").write_text(config.to_json())
    return checkpoint.newest(config.out)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_a_run_resumes_to_the_bit_and_its_folders_sample_alike(tmp_path, kind):
    config = config_of(tmp_path / "run", kind)
    whole = trained(config)
    part = replace(config, out=tmp_path / "part")
    middle = checkpoint.load(checkpoint.all_of(config.out)[0])
    assert middle.progress.images == 48
    resumed = trained(part, middle)
    for name, value in whole.ema.items():
        assert torch.equal(value, resumed.ema[name]), name
    assert c.Config.from_json(config.to_json()) == config

    opened = open_network(config.out)
    assert is_flow(opened.scheduler) and opened.options.sampler == "flow"
    chosen = plan(opened.model, opened.scheduler, SamplingOptions(), defaults=opened.options)
    expected = sample(opened.model, [0, 1], [3, 5], plan=chosen, seed=7, reproducible=False).samples
    pipe: Any = FixedPointPipeline.from_pretrained(config.out)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe([3, 5], generator=7, output_type="latent").images, expected)
    pipe.save_pretrained(tmp_path / "saved")
    saved = open_network(tmp_path / "saved")
    assert saved.options.sampler == "flow" and saved.scheduler.config["shift"] == 2.0
    again: Any = FixedPointPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    images = again([3, 5], generator=7, output_type="latent").images
    np.testing.assert_array_equal(images, expected)
    with pytest.raises(ValueError, match="sampler"):
        again([3], sampler="ddim")
    if kind == "dit":
        assert student_config(config.out).schedule == FLOW


def test_flags_describe_it_and_combinations_without_meaning_are_refused(tmp_path):
    flags = "--schedule.kind rectified_flow --sampling.sampler flow --loss.timesteps logit_normal".split()
    found, _ = parse_flags("train", flags, PRESETS["digits"]())
    assert found.schedule.kind == "rectified_flow" and found.sampling_options().sampler == "flow"
    plain = config_of(tmp_path)
    for changes, named in (
        ({"sampling": SamplingOptions(sampler="ddpm")}, "sampler"),
        ({"sampling": SamplingOptions(spacing="linspace")}, "spacing"),
        ({"model": c.ModelConfig(learn_sigma=True)}, "learn-sigma"),
        ({"schedule": c.NoiseSchedule()}, "sampler"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(plain, **changes)
    for options, named in (
        ({"kind": "rectified_flow", "prediction": "sample"}, "prediction"),
        ({"kind": "rectified_flow", "betas": "scaled_linear"}, "betas"),
        ({"kind": "rectified_flow", "zero_snr": False}, "zero-snr"),
        ({"shift": 2.0}, "shift"),
        ({"kind": "rectified_flow", "shift": 0.0}, "shift"),
    ):
        with pytest.raises(ValueError, match=named):
            c.NoiseSchedule(**options)
