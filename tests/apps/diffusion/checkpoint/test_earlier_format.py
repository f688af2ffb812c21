"""A run folder of the format before the packages of apps/diffusion is sampled, resumed and found with its data."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from apps.diffusion import sample, train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.trained_run import open_run

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_it_is_sampled_as_then(tmp_path):
    assert sample.main([str(FIXTURES / "run"), "--num", "4", "--npz", "--out", str(tmp_path / "samples")]) == 0
    found, expected = (np.load(path) for path in (tmp_path / "samples" / "samples.npz", FIXTURES / "run_samples.npz"))
    assert np.array_equal(found["arr_1"], expected["arr_1"])
    # 8 bits: rounding of another machine may turn a level
    assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1


def test_it_is_resumed(tmp_path):
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "run", out)
    before = checkpoint.newest(out)
    assert before.classes == () and before.progress.images == 640
    assert train.main(["--resume", "--out", str(out), "--optimizer.images", "768"]) == 0
    after = checkpoint.newest(out)
    assert after.progress.images == 768 and after.progress.steps == before.progress.steps + 2
    assert after.classes == tuple(map(str, range(10))) == open_run(out).classes
    assert after.progress.history[: len(before.progress.history)] == before.progress.history
    assert all(torch.isfinite(value).all() for value in after.ema.values())
    data = json.loads((out / "data.json").read_text())
    assert data["class_names"] == list(map(str, range(10))) and data["sha256"]


def test_resuming_a_complete_run_writes_its_summary_again(tmp_path):
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "run", out)
    assert train.main(["--resume", "--out", str(out), "--optimizer.images", "768"]) == 0
    first = json.loads((out / "metrics.json").read_text())["training"]
    (out / "metrics.json").unlink()
    assert train.main(["--resume", "--out", str(out)]) == 0
    again = json.loads((out / "metrics.json").read_text())["training"]
    assert again == first and first["last"]["loss"] > 0
