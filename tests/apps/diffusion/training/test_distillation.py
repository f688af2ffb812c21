"""Distillation of a DiT into an FPDM: the loss, the configuration, and a run of the command."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apps.diffusion import distill, train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.open_network import open_run
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.training import run as training_run
from apps.diffusion.training.distillation import open_teacher, student_config
from apps.diffusion.training.loss import TrainingNoise, TrainingSolve, loss
from apps.diffusion.training.trainer import Trainer
from implicit import Picard, Stop, Unrolled
from tests.apps.diffusion.helpers.small_models import randomized
from tests.apps.diffusion.helpers.training_runs import barely_trained

DIGITS = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a DiT on digits, barely trained."""
    return barely_trained(tmp_path_factory.mktemp("dit"), 640, {"kind": "dit", "depth": 3, "patch": 4})


def noise(shape, timesteps=1000):
    source = torch.Generator().manual_seed(1)
    t = torch.randint(timesteps, shape[:1], generator=source)
    dropped = torch.arange(shape[0]) == 1
    return TrainingNoise(noise=torch.randn(shape, generator=source), t=t, dropped=dropped)


def test_the_loss_is_the_distance_of_the_predictions():
    options = {"input_size": 8, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 4}
    teacher = randomized(DiT(depth=2, learn_sigma=True, **options)).eval()
    student = randomized(FPDM(learn_sigma=True, **options))
    x, y, scheduler = torch.rand(3, 2, 8, 8) * 2 - 1, torch.tensor([0, 1, 2]), make_scheduler("ddpm")
    drawn = noise(x.shape)
    common = {"scheduler": scheduler, "null_class": 4}
    solve = TrainingSolve(solver=Picard(), grad=Unrolled(), stop=Stop(rtol=0.0, atol=0.0, max_evals=3))
    found = loss(student, x, y, drawn, **common, solve=solve, teacher=teacher)
    abar = scheduler.alphas_cumprod[drawn.t].view(-1, 1, 1, 1)
    noisy, labels = abar.sqrt() * x + (1 - abar).sqrt() * drawn.noise, torch.tensor([0, 4, 2])
    difference = student(noisy, drawn.t, labels, iterations=3) - teacher(noisy, drawn.t, labels)
    torch.testing.assert_close(found.total, difference.square().mean(), rtol=1e-4, atol=1e-6)
    found.total.backward()
    assert student.block_fixed_point.mlp.fc1.weight.grad.norm() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert float(loss(teacher, x, y, drawn, **common, teacher=teacher).error.max()) < 1e-10


def test_the_configuration_is_that_of_the_teacher(run, tmp_path):
    config = student_config(run)
    assert (config.model.kind, config.model.hidden, config.model.patch, config.data.source) == ("fpdm", 16, 4, "digits")
    assert config.init == config.teacher == run and config.schedule == c.NoiseSchedule()
    shipped = student_config(Path("mnist-dit"))
    assert (shipped.model.hidden, shipped.data.source) == (128, "mnist")
    state = {
        k: v.contiguous() for k, v in DiT(depth=1, input_size=4, hidden_size=384, num_heads=6).state_dict().items()
    }
    save_file(state, tmp_path / "published.safetensors")
    published = student_config(tmp_path / "published.safetensors")
    assert (published.model.heads, published.data.source) == (6, "latents")
    assert (published.schedule.prediction, published.schedule.zero_snr) == ("epsilon", False)
    with pytest.raises(ValueError, match="FPDM"):
        student_config(Path("mnist-fpdm"))
    with pytest.raises(ValueError, match=r"--loss\.weighting"):
        dataclasses.replace(config, loss=c.LossConfig(weighting="min_snr"))
    with pytest.raises(ValueError, match="--teacher"):
        open_teacher(run, (1, 28, 28), 10, torch.device("cpu"))


def test_the_command_learns_from_the_teacher(run, tmp_path, capsys):
    out = tmp_path / "student"
    flags = (
        "--optimizer.images 960 --optimizer.batch 16 --optimizer.lr 3e-3 --num-samples 12 --sampling.steps 2".split()
    )
    assert distill.main([str(run), "--out", str(out), *flags, "--track", "none"]) == 0
    state = checkpoint.newest(out)
    losses = [value for _, value in state.progress.history]
    assert losses[-1] < 0.7 * losses[0]
    assert isinstance(open_run(out).model, FPDM)
    assert distill.main([str(run), "--resume", "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert distill.main(["--out", str(tmp_path / "other")]) == 2


def test_a_network_of_other_data_is_no_teacher(tmp_path):
    DiT(depth=1, **{**DIGITS, "num_classes": 3}).save_pretrained(tmp_path / "other")
    config = dataclasses.replace(c.Config(), model=c.ModelConfig(hidden=16, heads=2), teacher=tmp_path / "other")
    with pytest.raises(ValueError, match="--teacher"):
        Trainer(config, digits("train"))


def test_a_run_goes_on_with_its_own_teacher_alone(run, tmp_path, capsys, monkeypatch):
    """The teacher may be moved, and is refused after it was trained on."""
    monkeypatch.setattr(training_run, "summarize", lambda *_: None)
    shutil.copytree(run, tmp_path / "dit")
    out = ["--out", str(tmp_path / "student")]
    flags = "--optimizer.images 64 --optimizer.batch 16 --track none".split()
    assert distill.main([str(tmp_path / "dit"), *out, *flags]) == 0
    (tmp_path / "dit").rename(tmp_path / "moved")
    more = ["--resume", *out, "--optimizer.images"]
    assert train.main([*more, "96"]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert train.main([*more, "96", "--teacher", str(tmp_path / "moved")]) == 0
    state = checkpoint.newest(tmp_path / "moved")
    changed = {name: value + 1 for name, value in state.ema.items()}
    progress = dataclasses.replace(state.progress, images=state.progress.images + 16)
    checkpoint.save(tmp_path / "moved", dataclasses.replace(state, ema=changed, progress=progress))
    capsys.readouterr()
    assert train.main([*more, "128", "--teacher", str(tmp_path / "moved")]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "student").progress.images == 96
