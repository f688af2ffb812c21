"""Presets of the published settings: exact numbers of parameters, numbers of steps, and changes that raise."""

import dataclasses

import pytest
import torch

import implicit
from apps.diffusion import train
from apps.diffusion.config import training as c
from apps.diffusion.config.presets import PRESETS
from apps.diffusion.models import build
from apps.diffusion.schedulers.noise_schedule import scheduler_of

SETS = ("imagenet", "celebahq", "ffhq", "lsun-church")
COUNTS = {"fpdm": (86_500_256, 86_481_808), "dit": (674_834_720, 674_816_272)}  # with and without a learned sigma


def parameters(model, num_classes):
    with torch.device("meta"):
        network = build.network(model, (4, 32, 32), num_classes, iterations=10, seed=0)
    assert all(p.is_meta for p in network.parameters())
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_published_sizes_and_lengths(name, kind):
    config = PRESETS[name if kind == "fpdm" else f"{name}-dit"]()
    classes = 0 if config.data.unconditional else 1000
    labels = 0 if classes else 1001 * 1152  # of ImageNet's label table, with the null class
    assert (name == "imagenet") == bool(classes)
    assert parameters(config.model, classes) == COUNTS[kind][0] - labels
    plain = dataclasses.replace(config.model, learn_sigma=False)
    assert parameters(plain, classes) == COUNTS[kind][1] - labels
    o = config.optimizer
    assert o.images == (400_000 if name == "imagenet" else 100_000) * 512
    assert (o.batch, o.lr, o.weight_decay, o.warmup, o.decay) == (512, 1e-4, 0.0, 0, "constant")
    assert (config.ema.decay, o.label_dropout) == (0.9999, 0.1 if classes else 0.0)
    assert config.sampling.value("guidance") == 1
    assert config.grad == implicit.StochasticJFB(N=12, M=12)
    betas = scheduler_of(
        dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, zero_snr=False))
    ).betas
    assert (len(betas), float(betas[0]), float(betas[-1])) == (1000, pytest.approx(1e-4), pytest.approx(0.02))
    assert scheduler_of(config).betas[-1] == 1


@pytest.mark.parametrize("name", [*SETS, "mnist"])
def test_both_train_under_the_same_settings(name):
    """All that a fair comparison keeps equal is."""
    ours, baseline = PRESETS[name](), PRESETS[f"{name}-dit"]()
    same = dataclasses.replace(ours, model=baseline.model, out=baseline.out)
    assert same == baseline


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--schedule.prediction", "epsilon"], "epsilon"),
        (["--sampling.spacing", "leading"], "leading"),
        (["--schedule.beta-start", "0.5"], "--schedule.beta-start"),
        (["--schedule.timesteps", "10"], "--sampling.steps"),
        (["--model.depth", "3"], "--model.depth"),
    ],
)
def test_impossible_changes_end_with_code_2(options, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert train.main(["imagenet", *options]) == 2
    except SystemExit as end:
        assert end.code == 2
    assert name in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_learned_variance_trains_and_samples():
    from apps.diffusion.data import digits
    from apps.diffusion.training.summary import draw_samples
    from apps.diffusion.training.trainer import Trainer

    config = c.Config(
        model=c.ModelConfig(kind="dit", depth=1, hidden=16, heads=2, learn_sigma=True),
        optimizer=c.OptimizerConfig(images=32, batch=16, clip=None),
        sampling=c.SamplingOptions(sampler="ddpm", steps=3),
    )
    trainer = Trainer(config, digits("train"))
    before = trainer.model.final_layer.linear.weight.detach().clone()
    trainer.run(lambda state: None)
    rows = (trainer.model.final_layer.linear.weight.detach() != before).any(1).view(4, 2)
    assert rows.all()  # the means and the variances of all four pixels of a patch have learned
    samples = draw_samples(config, trainer.ema.module.eval(), 10, 2).samples
    assert samples.shape == (2, 1, 8, 8) and samples.isfinite().all()


def test_the_networks_of_mnist_fit_their_folders():
    """Six megabytes in float32 each, and the DiT is the larger one."""
    sizes = []
    for name in ("mnist", "mnist-dit"):
        network = build.network(PRESETS[name]().model, (1, 28, 28), 10, iterations=5, seed=0)
        sizes.append(sum(value.numel() * 4 for value in network.state_dict().values()))
    assert sizes[0] < sizes[1] < 6e6 and sizes[1] / sizes[0] == pytest.approx(1.16, abs=0.01)


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (["--sampling.block-passes", "240"], "iterations"),
        (["--sampling.macs=5e9"], "iterations"),
        (["--sampling.seconds", "1", "--sampling.allocation", "measured"], "iterations"),
        (["--sampling.rtol", "0.1", "--sampling.max_evals", "9"], "iterations"),
        (["--sampling.timesteps", "900", "300"], "steps"),
    ],
)
def test_an_option_replaces_those_of_the_preset_that_it_excludes(given, gone):
    preset = PRESETS["mnist"]().sampling
    found = train.parse(["mnist", *given])[0].sampling
    assert getattr(preset, gone) not in ((), None) and getattr(found, gone) in ((), None)
    assert (found.sampler, found.guidance) == (preset.sampler, preset.guidance)
    assert len(found.given()) == len(preset.given()) - 1 + sum(word.startswith("--") for word in given)
