"""A run folder of an earlier version can be sampled and resumed, and its data are found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.diffusion import sample, train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.open_network import open_run

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_it_is_sampled_as_then(tmp_path):
    assert sample.main([str(FIXTURES / "run"), "--num", "4", "--npz", "--out", str(tmp_path / "samples")]) == 0
    found, expected = (np.load(path) for path in (tmp_path / "samples" / "samples.npz", FIXTURES / "run_samples.npz"))
    assert np.array_equal(found["arr_1"], expected["arr_1"])
    # 8 bits: rounding of another machine may turn a level
    assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    out = tmp_path_factory.mktemp("earlier") / "run"
    shutil.copytree(FIXTURES / "run", out)
    assert train.main(["--resume", "--out", str(out), "--optimizer.images", "768", "--num-samples", "8"]) == 0
    return out


def test_it_is_resumed(resumed):
    before, after = checkpoint.newest(FIXTURES / "run"), checkpoint.newest(resumed)
    assert before.classes == () and before.progress.images == 640
    assert after.progress.images == 768 and after.progress.steps == before.progress.steps + 2
    assert after.classes == tuple(map(str, range(10))) == open_run(resumed).classes
    assert after.progress.history[: len(before.progress.history)] == before.progress.history
    assert all(torch.isfinite(value).all() for value in after.ema.values())
    data = json.loads((resumed / "data.json").read_text())
    assert data["class_names"] == list(map(str, range(10))) and data["sha256"]


def test_resuming_a_complete_run_writes_its_summary_again(resumed):
    first = json.loads((resumed / "metrics.json").read_text())["training"]
    (resumed / "metrics.json").unlink()
    assert train.main(["--resume", "--out", str(resumed)]) == 0
    again = json.loads((resumed / "metrics.json").read_text())["training"]
    assert again == first and first["last"]["loss"] > 0
