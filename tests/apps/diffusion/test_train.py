"""Training: every random number is a function of the seed, resuming is exact, the budget is kept, and the output folder
is never overwritten.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import implicit
from apps.diffusion import train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.config import training as c
from apps.diffusion.data import TensorDataset, digits
from apps.diffusion.models.build import rebuild
from apps.diffusion.training import run as run_module
from apps.diffusion.training import trainer as trainer_module
from apps.diffusion.training.optimizer import decay_at, learning_rate
from apps.diffusion.training.trainer import Diverged, Trainer

SMALL = c.Config(
    model=c.ModelConfig(hidden=16, heads=2),
    optimizer=c.OptimizerConfig(images=160, batch=16, warmup=32),
    grad=implicit.StochasticJFB(N=2, M=2),
    checkpoint_every=64,
)


def run(config, images=None, start=None, until=None):
    """Train; returns the trainer and every checkpoint that it wrote."""
    saved = []
    trainer = Trainer(config, images or digits("train"), start)
    if until is not None:
        trainer.images = _StopAt(trainer, until)

    def save(state):
        copy = {name: {k: v.clone() for k, v in getattr(state, name).items()} for name in ("model", "ema")}
        optimizer = {i: {k: v.clone() for k, v in e.items()} for i, e in state.optimizer.items()}
        progress = dataclasses.replace(state.progress, history=list(state.progress.history))
        saved.append(dataclasses.replace(state, **copy, optimizer=optimizer, progress=progress))

    trainer.run(save)
    return trainer, saved


class _StopAt:
    """Images that have their trainer stop when it has seen `until`."""

    def __init__(self, trainer, until):
        self.trainer, self.until, self.images = trainer, until, trainer.images
        self.shape, self.num_classes = trainer.images.shape, trainer.images.num_classes

        self.classes = trainer.images.classes

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        self.trainer.stop_requested = self.trainer.progress.images + 16 >= self.until
        return self.images[key]


def same(a, b):
    for name in ("model", "ema"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    for i, entry in a.optimizer.items():
        assert all(torch.equal(entry[k], b.optimizer[i][k]) for k in entry)
    assert (a.progress.images, a.progress.steps, a.progress.skipped) == (
        b.progress.images,
        b.progress.steps,
        b.progress.skipped,
    )


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    model = dataclasses.replace(SMALL.model, kind=kind, depth=2 if kind == "dit" else None)
    config = dataclasses.replace(SMALL, model=model)
    _, whole = run(config)
    assert [s.progress.images for s in whole] == [64, 128, 160]
    _, first = run(config, until=80)
    assert first[-1].progress.images == 80
    checkpoint.save(tmp_path, first[-1])
    torch.randn(7)  # the global generator is nobody's business
    _, rest = run(config, start=checkpoint.newest(tmp_path))
    same(rest[-1], whole[-1])


def test_the_seed_is_all_randomness_there_is():
    short = dataclasses.replace(SMALL, optimizer=dataclasses.replace(SMALL.optimizer, images=48))
    before = torch.get_rng_state()
    (_, a), (_, b) = run(short), run(short)
    assert torch.equal(torch.get_rng_state(), before)
    same(a[-1], b[-1])
    _, other = run(dataclasses.replace(short, seed=1))
    assert not torch.equal(other[-1].model["x_embedder.proj.weight"], a[-1].model["x_embedder.proj.weight"])


def test_training_lowers_the_loss():
    config = dataclasses.replace(SMALL, optimizer=c.OptimizerConfig(images=64 * 60, batch=64, lr=3e-3, warmup=640))
    trainer, _ = run(config)
    history = trainer.progress.history
    assert history[-1][1] < 0.8 * history[0][1]
    assert history[-1][0] == trainer.progress.images == 3840


def test_the_average_is_the_documented_recursion():
    config = dataclasses.replace(SMALL, ema=c.EMAConfig(decay=0.5), checkpoint_every=16)
    _, saved = run(config)
    average = saved[0].model["x_embedder.proj.weight"]
    for step, state in enumerate(saved[1:], start=1):
        d = min(0.5, (1 + step) / (10 + step))
        average = d * average + (1 - d) * state.model["x_embedder.proj.weight"]
    torch.testing.assert_close(saved[-1].ema["x_embedder.proj.weight"], average)
    assert [float(decay_at(0.9, torch.tensor(k))) for k in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.9])


def test_steps_without_a_finite_gradient_are_counted_and_leave_no_trace():
    images = digits("train")
    spoilt = torch.full_like(images.x, float("nan"))
    trainer = Trainer(SMALL, TensorDataset(spoilt, images.y, 10))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for _ in range(3):
        loss, finite = trainer.step()
        assert not finite and loss != loss
    assert trainer.synchronize() == 3
    assert (trainer.progress.skipped, trainer.progress.steps, trainer.progress.images) == (3, 0, 48)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    trainer.images, trainer._batches = images, None
    assert trainer.step()[1] and trainer.synchronize() == 0 and trainer.progress.steps == 1
    long = dataclasses.replace(SMALL, optimizer=dataclasses.replace(SMALL.optimizer, images=10**6))
    with pytest.raises(Diverged, match=r"--optimizer\.lr"):
        run(long, images=TensorDataset(spoilt, images.y, 10))


def test_the_learning_rate_follows_images_or_time_whichever_is_further():
    config = c.OptimizerConfig(images=1000, batch=10, lr=2.0, warmup=100)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2, rel=1e-2)
    assert learning_rate(config, 500, 0.0) == pytest.approx(1.0)
    assert learning_rate(config, 500, 0.75) == learning_rate(config, 750, 0.0) < 0.3
    assert learning_rate(config, 1000, 0.0) == 0
    constant = dataclasses.replace(config, decay="constant")
    assert learning_rate(constant, 990, 0.99) == 2.0


def test_time_ends_a_run():
    config = dataclasses.replace(SMALL, max_time=0.5, optimizer=dataclasses.replace(SMALL.optimizer, images=10**9))
    began = time.monotonic()
    trainer, saved = run(config)
    assert 0.5 <= trainer.progress.seconds < 5 and time.monotonic() - began < 20
    assert saved[-1].progress.images == trainer.progress.images > 0


def test_a_checkpoint_of_another_network_is_refused():
    _, saved = run(SMALL, until=16)
    with pytest.raises(ValueError, match="FPDM"):
        Trainer(dataclasses.replace(SMALL, model=c.ModelConfig(hidden=32, heads=2)), digits("train"), saved[-1])


def test_weights_or_moments_of_another_network_are_refused():
    _, saved = run(SMALL, until=16)
    _, wider = run(dataclasses.replace(SMALL, model=c.ModelConfig(hidden=32, heads=2)), until=16)
    state, other = saved[-1], wider[-1]
    few = {k: v for k, v in state.model.items() if "x_embedder" not in k}
    for foreign, name in (
        ({"model": other.model}, "x_embedder"),
        ({"ema": few}, "x_embedder"),
        ({"optimizer": other.optimizer}, "parameter 0"),
        ({"optimizer": {999: state.optimizer[0]}}, "parameter 999"),
    ):
        with pytest.raises(ValueError, match=name):
            Trainer(SMALL, digits("train"), dataclasses.replace(state, **foreign))


def test_a_signal_takes_effect_at_the_agreed_step_alone():
    """Whatever a process is doing when the signal comes, it stops at the same step as the others."""
    trainer = Trainer(SMALL, digits("train"))
    trainer.accelerator = SimpleNamespace(**{"num_processes": 2, "device": "cpu"})  # pyright: ignore
    others = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "gather", lambda mine: torch.cat([mine, torch.tensor(others)]))
        with run_module.stop_on_signals(trainer):
            signal.raise_signal(signal.SIGTERM)
        assert trainer.stop_requested and not trainer.stopping
        others[:] = [[3.0, 0.0]]
        assert trainer._agree(2.0) == 3.0 and trainer.stopping
        trainer.stop_requested, others[:] = False, [[1.0, 1.0]]
        assert trainer._agree(2.0) == 0.0 and trainer.stopping  # the time of the next agreement has not come
        assert trainer._agree(2.0, now=True) == 2.0 and trainer.stopping and not trainer.stop_requested


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_during_a_save_is_not_lost(number):
    trainer = Trainer(SMALL, digits("train"))
    saved = []

    def save(state):
        saved.append(state.progress.images)
        trainer.stop_requested = len(saved) > number

    trainer.run(save)
    assert trainer.stopping and trainer.progress.images == [80, 144][number]


def test_training_without_one_finite_step_fails(tmp_path, capsys, monkeypatch):
    images = digits("train")
    spoilt = TensorDataset(torch.full_like(images.x, float("nan")), images.y, 10)
    with pytest.raises(Diverged, match=r"--optimizer\.lr"):
        run(SMALL, images=spoilt)
    monkeypatch.setattr(run_module, "load_images", lambda config: (spoilt, None))
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 1
    assert "--optimizer.lr" in capsys.readouterr().err


def test_two_processes_do_not_train_into_one_folder(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        for options in ([], ["--resume"]):
            if options:
                (out / "config.json").write_text(SMALL.to_json())
            assert train.main([*options, "--out", str(out)]) == 2
            assert str(out) in capsys.readouterr().err
        other.kill()
    (out / "config.json").unlink()
    missing = ["--data.source", "folder", "--data.path", str(tmp_path / "none"), "--data.size", "16"]
    assert train.main([*TINY, *missing, "--out", str(tmp_path / "deep" / "down")]) == 2
    uneven = ["--sampling.steps", "3", "--sampling.iterations", "1", "2"]  # found before training, not after it
    assert train.main([*TINY, *uneven, "--out", str(tmp_path / "deep" / "down")]) == 2
    assert "--sampling.iterations" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["new"]  # bad input leaves nothing
    assert train.main([*TINY, "--out", str(out)]) == 0  # the lock of a dead process holds nobody up


HOLD = "import sys, pathlib, time; from apps.diffusion.files.atomic import exclusive\n"
HOLD += "with exclusive(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"


TINY = (
    "--model.hidden 16 --model.heads 2 --optimizer.images 192 --optimizer.batch 32 --sampling.steps 2 "
    "--sampling.iterations 2 --num-samples 30"
).split()


def test_the_command_leaves_a_whole_run_and_never_overwrites_it(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main([*TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "data.json",
        "logs",
        "loss.png",
        "metrics.json",
        "samples.png",
    ]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["training"]["images"] == 192
    assert metrics["generated"]["images"] == metrics["real_held_out"]["images"] == 30
    assert metrics["real_held_out"]["accuracy"] > 0.9
    assert f"python -m apps.diffusion.sample {out}" in printed
    state = checkpoint.newest(out)
    rebuild(state.network).load_state_dict(state.ema)

    stamp = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}
    assert train.main([*TINY, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")} == stamp

    assert train.main(["--resume", "--out", str(out), "--model.hidden", "32"]) == 2
    assert "config.json" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(out), "--optimizer.images", "256"]) == 0
    assert json.loads((out / "metrics.json").read_text())["training"]["images"] == 256
    assert train.main(["--resume", "--out", str(tmp_path / "nothing")]) == 2


def test_an_interrupt_outside_of_the_training_loop_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "summarize", interrupted)
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.rstrip().split("\n")[-1].startswith("train: ")
    monkeypatch.undo()
    assert train.main(["--resume", "--out", str(tmp_path / "run")]) == 0


def test_a_step_reads_nothing_from_the_device(monkeypatch):
    """A number is read by `Tensor.item`, `tolist`, `__bool__`, `__float__` or `__int__`; a step calls none of them on
    the counts, or on a tensor with a graph.
    """
    trainer = Trainer(SMALL, digits("train"))
    trainer.step()
    counts, read = [trainer.counts], []

    def spy(name):
        method = getattr(torch.Tensor, name)

        def call(self, *arguments):
            if self.requires_grad or any(self is known for known in counts):
                read.append(name)
            return method(self, *arguments)

        return call

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    for _ in range(3):
        trainer.step()
        counts.append(trainer.counts)
    assert not read
    trainer.synchronize()
    assert read == ["tolist"]
