"""A run that was killed, stopped or ended by a full disk continues with equal bits; two processes train like one."""

import os
import random
import re
import shutil
import signal
import time

import pytest
import torch

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.files.hashing import of_tensors as digest

EVERY, IMAGES = 32, 384
TINY = (
    f"--model.hidden 16 --model.heads 2 --optimizer.images {IMAGES} --optimizer.batch 16 --max-time None "
    f"--checkpoint-every {EVERY} --keep 2"
).split()


class Runs:
    """Training runs in processes of their own."""

    def __init__(self, forks, log):
        self.forks, self.log = forks, log

    def start(self, *argv, **how):
        """Start a run; the id of its first process."""
        self.log.write_text("")
        call = "tests.apps.diffusion.helpers.training_alone:main"
        return self.forks.start(call, [*TINY, *argv], log=self.log, **how)

    def end(self):
        """The exit code of the run, when it has ended."""
        return self.forks.end()


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory):
    return Runs(forks, tmp_path_factory.mktemp("log") / "log.txt")


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The last checkpoint of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    runs.start("--out", str(out))
    assert runs.end() == 0, runs.log.read_text()
    return checkpoint.newest(out)


def images_of(out):
    found = checkpoint.all_of(out)
    return int(found[-1].name) if found else 0


def interrupt(runs, out, at, number, delay, *argv, **how):
    """Go on with the run in `out`, and send it a signal `delay` seconds after its checkpoint at `at` images."""
    pid = runs.start("--out", str(out), *(["--resume"] if out.exists() else []), *argv, **how)
    patience = time.monotonic() + 120
    while images_of(out) < at and time.monotonic() < patience:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(pid, number)
    return runs.end()


def assert_same(a, b):
    assert (a.progress.images, a.progress.steps) == (b.progress.images, b.progress.steps) == (IMAGES, IMAGES // 16)
    for name in ("model", "ema"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert a.optimizer.keys() == b.optimizer.keys()
    for number, entry in a.optimizer.items():
        assert all(torch.equal(entry[k], b.optimizer[number][k]) for k in entry | b.optimizer[number])


def test_killed_five_times_and_resumed(runs, whole, tmp_path):
    draw = random.Random(0)
    out, reached = tmp_path / "run", []
    for at in sorted(draw.sample(range(EVERY, IMAGES // 2, EVERY), 5)):
        code = interrupt(runs, out, at, signal.SIGKILL, draw.uniform(0, 0.1))
        assert code == -signal.SIGKILL, runs.log.read_text()
        reached.append(images_of(out))
    assert reached == sorted(reached) and 0 < reached[0] and reached[-1] < IMAGES
    runs.start("--out", str(out), "--resume")
    assert runs.end() == 0, runs.log.read_text()
    assert_same(checkpoint.newest(out), whole)
    assert whole.progress.history == checkpoint.newest(out).progress.history


def test_sigterm_writes_a_checkpoint_first(runs, whole, tmp_path):
    out = tmp_path / "run"
    assert interrupt(runs, out, EVERY, signal.SIGTERM, 0.03) == 128 + signal.SIGTERM, runs.log.read_text()
    said = runs.log.read_text()
    assert re.search(rf"\b{images_of(out)}\b", said) and "--resume" in said
    runs.start("--out", str(out), "--resume")
    assert runs.end() == 0, runs.log.read_text()
    assert_same(checkpoint.newest(out), whole)


def test_a_full_disk_leaves_the_checkpoint_before(runs, whole, tmp_path):
    out = tmp_path / "run"
    interrupt(runs, out, 2 * EVERY, signal.SIGKILL, 0)
    before = {p: p.read_bytes() for kept in checkpoint.all_of(out) for p in kept.iterdir()}
    smallest = min(len(content) for path, content in before.items() if path.suffix == ".safetensors")
    runs.start("--out", str(out), "--resume", largest=smallest // 2)
    assert runs.end() == 1
    said = runs.log.read_text()
    assert str(out / "checkpoints") in said and "--resume" in said
    assert "Traceback" not in said
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()} == before
    runs.start("--out", str(out), "--resume")
    assert runs.end() == 0, runs.log.read_text()
    assert_same(checkpoint.newest(out), whole)


def test_two_processes_train_as_one_with_twice_the_batch(runs, whole, tmp_path):
    """Gloo; the batch of TINY is shared by the two."""
    out = tmp_path / "run"
    runs.start("--out", str(out), processes=2)
    assert runs.end() == 0, runs.log.read_text()
    assert runs.log.read_text().count("Training FPDM") == 1
    assert_close(checkpoint.newest(out), whole)


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch --use_fsdp` sets


def test_weights_shared_out_learn_the_same_and_checkpoints_are_whole(runs, whole, tmp_path):
    """FSDP, and from its checkpoint on FSDP again and one process. Two processes hold uneven shares of some tensors."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    options = ["--optimizer.accumulate", "2", "--optimizer.checkpointing"]
    code = interrupt(runs, out, IMAGES // 4, signal.SIGTERM, 0, *options, processes=2, environment=FSDP)
    assert code == 128 + signal.SIGTERM, runs.log.read_text()
    assert IMAGES // 4 <= images_of(out) < IMAGES
    shutil.copytree(out, alone)
    for folder, how in ((out, {"processes": 2, "environment": FSDP}), (alone, {})):
        runs.start("--out", str(folder), "--resume", *options, **how)
        assert runs.end() == 0, runs.log.read_text()
        assert_close(checkpoint.newest(folder), whole, IMAGES // 4)
        assert f"averaged: {digest(checkpoint.newest(folder).ema)}" in runs.log.read_text()


def test_weights_are_float32_under_bf16_and_fsdp(runs, whole, tmp_path):
    """Shards of weights, averages and moments are updated in float32, not in what autocast computes with."""
    out = tmp_path / "run"
    runs.start("--out", str(out), "--optimizer.precision", "bf16", processes=2, environment=FSDP)
    assert runs.end() == 0, runs.log.read_text()
    found = checkpoint.newest(out)
    moments = {f"{i}.{k}": v for i, entry in found.optimizer.items() for k, v in entry.items()}
    for tensors in (found.model, found.ema, moments):
        assert all(value.dtype == torch.float32 for value in tensors.values())
    for tensors in (found.model, found.ema):
        weight = tensors["block_fixed_point.mlp.fc1.weight"]
        assert (weight.bfloat16().float() != weight).double().mean() > 0.9
    assert found.progress.history[-1][1] == pytest.approx(whole.progress.history[-1][1], rel=0.1)


def assert_close(run, whole, until=IMAGES // 2):
    """The same loss curve, until a run was stopped, and weights, to float tolerance."""
    curve, expected = (dict(r.progress.history) for r in (run, whole))
    at = [images for images in curve if images <= until and images in expected]
    assert len(at) == until // EVERY
    if len(curve) == len(expected):  # a run that was stopped has an entry there, and a shorter one behind it
        at = list(expected)
    for images in at:
        assert curve[images] == pytest.approx(expected[images], rel=2e-5)
    for name in ("model", "ema"):
        one, other = getattr(run, name), getattr(whole, name)
        assert one.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-3, atol=2e-5)
    for number, entry in whole.optimizer.items():
        for key, value in entry.items():
            torch.testing.assert_close(run.optimizer[number][key], value, rtol=1e-3, atol=1e-5)
