"""A disk that fails at any write: one sentence, good files stay as they are, and the remedy of the message works."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apps.diffusion import convert, diagnose, encode, evaluate, train
from apps.diffusion.config.training import Config
from apps.diffusion.training.run import start_of
from tests.apps.diffusion.helpers import image_files

FULL = OSError(28, "No space left on device")


@pytest.fixture
def fail_at(monkeypatch):
    """fail_at(k): the k-th renaming of a finished file fails, and all after it; None: the disk has space again."""
    rename = os.replace

    def fail_at(k: int | None) -> None:
        calls = iter(range(1, 1000))

        def replace(*paths: Path) -> None:
            if k is not None and next(calls) >= k:
                raise FULL
            rename(*paths)

        monkeypatch.setattr(os, "replace", replace)

    return fail_at


def one_line(capsys, name):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: ")]
    assert len(lines) == 1 and "Errno 28" in lines[0]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_encoding_goes_on_after_each_write(tmp_path, fail_at, capsys, k):
    image_files.tree(tmp_path / "images", each=2)
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    command = [str(tmp_path / "images"), "--vae", str(tmp_path / "vae"), "--size", "16", "--out", str(tmp_path / "out")]
    fail_at(k)
    assert encode.main(command) == 1
    one_line(capsys, "encode")
    fail_at(None)
    assert encode.main(command) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_run_that_could_not_begin_is_started_again_or_resumed(tmp_path, fail_at, capsys, k):
    out = str(tmp_path / "run")
    options = "--model.hidden 16 --model.heads 2 --optimizer.images 64 --optimizer.batch 32 --sampling.steps 2 "
    options += "--sampling.iterations 2 --num-samples 4 --track none"
    fail_at(k)
    assert train.main([*options.split(), "--out", out]) == 1
    one_line(capsys, "train")
    fail_at(None)
    begun = (tmp_path / "run" / "config.json").exists()
    assert begun == (k > 1)
    assert train.main(["--resume", "--out", out] if begun else [*options.split(), "--out", out]) == 0


def test_what_a_killed_process_leaves_does_not_hinder_a_run(tmp_path):
    (tmp_path / ".config.json.a1b2c3d4.partial").mkdir()
    assert start_of(Config(out=tmp_path), resume=False) is None
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="--out") as refused:
        start_of(Config(out=tmp_path), resume=False)
    assert "--resume" not in str(refused.value)


def test_a_figure_is_whole_or_not_there_and_the_command_can_be_given_again(tmp_path, fail_at, capsys):
    draw = np.random.default_rng(0)
    for i in range(64):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"images/{'ab'[i % 2]}/{i}.png")
    options = ["--steps", "2", "--num", "1", "--budget", "50", "--tolerance", "0.1", "--out", str(tmp_path / "out")]
    fail_at(3)
    assert diagnose.main(["mnist-fpdm", *options]) == 1
    one_line(capsys, "diagnose")
    scored = [str(tmp_path / "images"), "--reference", str(tmp_path / "images"), "--features", "trained"]
    fail_at(2)
    cache = ["--cache", str(tmp_path / "cache")]
    assert evaluate.main([*scored, *cache, "--neighbors", str(tmp_path / "near.png")]) == 1
    one_line(capsys, "evaluate")
    assert not (tmp_path / "near.png").exists() and not list((tmp_path / "out").iterdir())
    fail_at(None)
    assert diagnose.main(["mnist-fpdm", *options]) == 0
    assert evaluate.main([*scored, *cache, "--neighbors", str(tmp_path / "near.png")]) == 0


@pytest.mark.parametrize("message", ["basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:1]"])
def test_a_failure_of_torch_save_is_one_of_the_disk(tmp_path, monkeypatch, capsys, message):
    def failing(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "save", failing)
    assert convert.main(["mnist-fpdm", "--to", "fpdm", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
