"""Log entries by images seen, residuals of the solves, image grids."""

import dataclasses
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import implicit
from apps.diffusion import train
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.training import metric_logger as logbook
from apps.diffusion.training.trainer import Trainer

SMALL = c.Config(
    model=c.ModelConfig(hidden=16, heads=2),
    optimizer=c.OptimizerConfig(images=96, batch=16, warmup=0, decay="constant", lr=3e-4),
    grad=implicit.JFB(),
)


def entries(config, **options):
    found = []
    trainer = Trainer(dataclasses.replace(config, **options), digits("train"))
    trainer.run(lambda state: None, lambda entry, images: found.append((images, dict(entry))))
    return trainer, found


def test_an_entry_has_the_means_of_its_steps():
    losses = []
    trainer = Trainer(dataclasses.replace(SMALL, checkpoint_every=48), digits("train"))
    step, found = trainer.step, []
    trainer.step = lambda: losses.append(step()) or losses[-1]
    trainer.run(lambda state: None, lambda entry, images: found.append((images, dict(entry))))
    assert [images for images, _ in found] == [48, 96]  # with every checkpoint
    for k, (images, entry) in enumerate(found):
        part = [float(loss) for loss, _ in losses[3 * k : 3 * k + 3]]
        assert entry["loss"] == pytest.approx(sum(part) / 3)
        assert (images, entry["loss"]) in trainer.progress.history
        assert entry["learning_rate"] == pytest.approx(3e-4) and entry["skipped"] == 0
        assert entry["images_per_second"] > 0


def test_the_residual_is_that_of_the_solve():
    """By another route: f applied once more to what the solve returned."""
    config = dataclasses.replace(SMALL, stop=implicit.Stop(rtol=0.0, max_evals=3))
    trainer = Trainer(config, digits("train"))
    with torch.no_grad():  # a new block is the identity: make it do something
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.sin(torch.arange(p.numel()).view(p.shape)))
    x, y, noise = trainer._batch()
    seen = []
    trainer.model.iteration = lambda *args, f=trainer.model.iteration: seen.append((args[0], f(*args))) or seen[-1][1]
    trainer.metrics.add_solve(trainer._loss(x, y, noise).solution)
    trainer.metrics.add_step(torch.tensor(1.0), 16)
    entry = trainer.metrics.entry()
    z, fz = (s.detach().flatten(1) for s in seen[-1])
    relative = (fz - z).norm(dim=1) / fz.norm(dim=1)
    assert len(seen) == entry["iterations"] == 4  # three, and the one with a graph
    assert entry["residual/mean"] == pytest.approx(float(relative.mean()), rel=1e-4)
    assert entry["residual/max"] == pytest.approx(float(relative.max()), rel=1e-4)
    assert entry["residual/max"] > entry["residual/mean"] > 0


def test_a_network_without_a_fixed_point_has_no_residual():
    _, found = entries(SMALL, model=c.ModelConfig(kind="dit", depth=1, hidden=16, heads=2))
    assert found and all("residual/mean" not in entry for _, entry in found)


TINY = (
    "--model.hidden 16 --model.heads 2 --model.patch 4 --optimizer.images 64 --optimizer.batch 16 "
    "--optimizer.decay constant --sampling.steps 2 --sampling.iterations 2 --num-samples 20 "
    "--checkpoint-every 32 --sample-every 32 --data.unconditional --max-time None"
).split()


def test_tensorboard_has_entries_and_grids(tmp_path):
    out = tmp_path / "run"
    assert train.main([*TINY, "--out", str(out)]) == 0
    assert train.main(["--resume", "--out", str(out), "--optimizer.images", "96"]) == 0
    events = EventAccumulator(str(out / "logs" / "run"), size_guidance={"images": 0}).Reload()
    names = {"loss", "learning_rate", "residual/mean", "residual/max", "iterations", "images_per_second", "skipped"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [32, 64, 96]
    assert [event.step for event in events.Images("samples")] == [32, 64, 96]
    assert [p.name for p in sorted((out / "grids").iterdir())] == [f"{n:012d}.png" for n in (32, 64, 96)]


def test_grids_on_the_way_change_nothing_and_take_no_training_time():
    config = dataclasses.replace(SMALL, sample_every=32)
    plain, shown = Trainer(SMALL, digits("train")), Trainer(config, digits("train"))
    plain.run(lambda state: None)
    seen = []

    def show(network):
        seen.append(shown.progress.images)
        torch.randn(5)
        network.eval()
        time.sleep(1.0)

    shown.run(lambda state: None, None, show)
    assert seen == [32, 64, 96]
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), shown.model.parameters(), strict=True))
    assert shown.progress.seconds < 2.0 + plain.progress.seconds  # the pauses are 3 s


def test_a_tracker_that_is_not_there_is_refused(tmp_path, capsys):
    assert logbook.tracker("auto") == "tensorboard" and logbook.tracker("none") is None
    assert train.main(["--track", "aim", "--out", str(tmp_path / "run")]) == 2
    assert "aim" in capsys.readouterr().err and not (tmp_path / "run").exists()
