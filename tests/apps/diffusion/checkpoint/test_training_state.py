"""Checkpoints are written completely or not at all, and loading returns what was saved."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.training_state import Checkpoint, Progress, Unreadable
from apps.diffusion.files import hashing


def _state(images, value=1.0):
    weights = {"a.weight": torch.full((3, 2), value), "b": torch.arange(4)}
    return Checkpoint(
        network={"class": "DiT", "config": {"input_size": [8, 8]}},
        model=weights,
        ema={name: w + 1 for name, w in weights.items()},
        optimizer={
            0: {"step": torch.tensor(5.0), "exp_avg": torch.full((3, 2), 0.1)},
            1: {"step": torch.tensor(5.0)},
        },
        progress=Progress(
            images=images, steps=images // 2, skipped=1, seconds=2.5, history=[(64, 0.7), (128, 0.1 + 0.2)]
        ),
    )


def _equal(a, b):
    assert (a.network, a.progress) == (b.network, b.progress)
    for name in ("model", "ema"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    assert {i: set(e) for i, e in a.optimizer.items()} == {i: set(e) for i, e in b.optimizer.items()}
    assert all(torch.equal(a.optimizer[i][k], b.optimizer[i][k]) for i in a.optimizer for k in a.optimizer[i])


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    saved = _state(128)
    path = checkpoint.save(tmp_path, saved)
    _equal(checkpoint.load(path), saved)
    _equal(checkpoint.newest(tmp_path), saved)


def test_only_the_newest_are_kept_and_order_is_by_number(tmp_path):
    for images in (64, 9_999, 10_000, 100_000):
        checkpoint.save(tmp_path, _state(images, images), keep=2)
    assert [int(p.name) for p in checkpoint.all_of(tmp_path)] == [10_000, 100_000]
    assert checkpoint.newest(tmp_path).progress.images == 100_000


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
    older, newest = (checkpoint.save(tmp_path, _state(n), keep=2) for n in (64, 128))
    backup = shutil.copytree(older, older.with_name(f"{older.name}-backup"))
    assert checkpoint.all_of(tmp_path) == [older, newest]
    checkpoint.save(tmp_path, _state(192), keep=1)
    assert backup.exists() and not older.exists()


def test_what_a_killed_process_has_left_is_deleted(tmp_path):
    left = tmp_path / "checkpoints" / f".{64:012d}.abc.partial"
    left.mkdir(parents=True)
    checkpoint.save(tmp_path, _state(64), keep=2)
    assert not left.exists()


@pytest.mark.parametrize("fails_at", ["save_file", "replace", "fsync"])
def test_a_failed_write_leaves_the_one_before(tmp_path, monkeypatch, fails_at):
    checkpoint.save(tmp_path, _state(64))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    module = checkpoint.__name__ if fails_at == "save_file" else "apps.diffusion.files.atomic.os"
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{fails_at}", full)
        with pytest.raises(OSError) as failed:
            checkpoint.save(tmp_path, _state(128))
        assert failed.value.errno == 28
    _equal(checkpoint.newest(tmp_path), _state(64))
    checkpoint.save(tmp_path, _state(128))
    assert os.listdir(tmp_path / "checkpoints") == [f"{128:012d}"]


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "empty"])
def test_damage_is_named_and_the_one_before_is_offered(tmp_path, file, damage):
    older = checkpoint.save(tmp_path, _state(64), keep=2)
    path = checkpoint.save(tmp_path, _state(128), keep=2)
    content = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        (path / file).write_bytes({"truncated": content[:-3], "foreign": b'{"x": 1}', "empty": b""}[damage])
    with pytest.raises(Unreadable) as caught:
        checkpoint.newest(tmp_path)
    assert str(path) in str(caught.value) and str(older) in str(caught.value)


def test_files_have_the_permissions_of_new_files(tmp_path):
    path = checkpoint.save(tmp_path, _state(64))
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_checkpoint_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, _state(64))

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.hashing, "of_file", forbidden)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        checkpoint.newest(tmp_path)


def test_another_format_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(Unreadable, match=tmp_path.name):
        checkpoint.newest(tmp_path)
    path = checkpoint.save(tmp_path, _state(64))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(Unreadable, match="99"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_one_flipped_bit_anywhere_is_noticed_and_named(tmp_path, file):
    path = checkpoint.save(tmp_path, _state(64))
    whole = (path / file).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (path / file).write_bytes(bytes(flipped))
        with pytest.raises(Unreadable, match=file):
            checkpoint.load(path)
    (path / file).write_bytes(whole)
    _equal(checkpoint.load(path), _state(64))


def test_damage_to_a_file_that_is_not_read_does_not_count(tmp_path):
    path = checkpoint.save(tmp_path, _state(64))
    (path / "optimizer.safetensors").unlink()
    found = checkpoint.newest(tmp_path, tensors=("ema",))
    assert found.ema.keys() == _state(64).ema.keys() and not found.model and not found.optimizer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", "x"),
        ("seconds", -1),
        ("images", 1.5),
        ("steps", None),
        ("skipped", -2),
        ("history", [[1]]),
        ("history", 3),
    ],
)
def test_values_of_format_1_that_make_no_sense_are_refused(tmp_path, name, value):
    path = checkpoint.save(tmp_path, _state(64))
    state = json.loads((path / "state.json").read_text())
    del state["files"], state["sha256"], state["classes"]
    plain = state | {"format": 1}
    (path / "state.json").write_text(json.dumps(plain))
    _equal(checkpoint.load(path), dataclasses.replace(_state(64), classes=()))
    plain["progress"][name] = value
    (path / "state.json").write_text(json.dumps(plain))
    with pytest.raises(Unreadable, match=r"state\.json"):
        checkpoint.load(path)


def test_class_names_come_back(tmp_path):
    checkpoint.save(tmp_path, dataclasses.replace(_state(64), classes=("ant", "Bär")))
    assert checkpoint.newest(tmp_path).classes == ("ant", "Bär")


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    """Training deletes the checkpoint that sampling has begun to read."""
    checkpoint.save(tmp_path, _state(64))
    of_file, calls = hashing.of_file, []

    def replaced(path):
        calls.append(path)
        if len(calls) == 2:
            monkeypatch.setattr(hashing, "of_file", of_file)
            checkpoint.save(tmp_path, _state(128))
        return of_file(path)

    monkeypatch.setattr(hashing, "of_file", replaced)
    assert checkpoint.newest(tmp_path).progress.images == 128
