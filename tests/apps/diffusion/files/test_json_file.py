"""Damaged JSON files of every folder that a command reads: one sentence that names the file."""

import json
import shutil
from pathlib import Path

import pytest

from apps.diffusion import convert, sample
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.readers import read_model_folder
from apps.diffusion.data.latents import read_index
from apps.diffusion.files.json_file import read_object, write_or_compare
from apps.diffusion.models import DiT

RUN = Path(__file__).parents[1] / "fixtures" / "run"
DAMAGED = {
    "empty": b"",
    "no UTF-8": b'{"a\x80": 1}',
    "cut off": b'{"a": ',
    "nested too deeply": b"[" * 100_000,
    "a list": b"[1]",
    "a text": b'"scheduler"',
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and what `convert` writes from it in the layouts pipeline and fpdm."""
    root = tmp_path_factory.mktemp("json")
    shutil.copytree(RUN, root / "run")
    for layout in ("pipeline", "fpdm"):
        assert convert.main([str(RUN), "--out", str(root / layout), "--to", layout]) == 0
    shutil.copytree(root / "pipeline", root / "no record")
    (root / "no record" / "training.json").unlink()
    DiT(input_size=4, in_channels=1, hidden_size=8, num_heads=2, num_classes=3).save_pretrained(root / "model")
    (root / "latents").mkdir()
    return root


CASES = [
    ("run/config.json", open_network),
    ("pipeline/training.json", open_network),
    ("pipeline/model_index.json", open_network),
    ("no record/model_index.json", open_network),
    ("no record/model/config.json", open_network),
    ("no record/scheduler/scheduler_config.json", open_network),
    ("fpdm/conversion.json", read_model_folder),
    ("model/config.json", read_model_folder),
    ("latents/index.json", read_index),
    ("latents/settings.json", lambda folder: write_or_compare(folder / "settings.json", {}, "give another folder.")),
]


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize(("file", "opened"), CASES, ids=[file for file, _ in CASES])
def test_a_damaged_file_is_named(folders, file, opened, damage):
    path = folders / file
    whole = path.read_bytes() if path.exists() else None
    path.write_bytes(DAMAGED[damage])
    try:
        with pytest.raises(ValueError, match=path.name if file != "model/config.json" else "model") as error:
            opened(folders / file.split("/")[0])
        assert len(str(error.value)) < 600
    finally:
        path.write_bytes(whole) if whole is not None else path.unlink()


def test_an_object_is_read(tmp_path):
    (tmp_path / "x.json").write_text('{"é": [1]}', encoding="utf-8")
    assert read_object(tmp_path / "x.json") == {"é": [1]}
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "y.json")


VALUES = [
    ("model_index.json", "steps", [1]),
    ("model_index.json", "reuse", {}),
    ("model_index.json", "sampling", {"solver": 1}),
    ("model_index.json", "classes", [1, None]),
    ("model_index.json", "classes", 3),
    ("scheduler/scheduler_config.json", "beta_schedule", "x"),
    ("scheduler/scheduler_config.json", "num_train_timesteps", None),
    ("scheduler/scheduler_config.json", "trained_betas", []),
    ("model/config.json", "mlp_ratio", float("inf")),
    ("model/config.json", "hidden_size", "x"),
]


@pytest.mark.parametrize(("file", "key", "value"), VALUES, ids=[f"{k}={v!r}" for _, k, v in VALUES])
def test_a_value_of_another_type_is_refused_by_the_command(folders, tmp_path, capsys, file, key, value):
    shutil.copytree(folders / "no record", tmp_path / "pipe")
    path = tmp_path / "pipe" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert sample.main([str(tmp_path / "pipe"), "--num", "1", "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(tmp_path / "pipe") in lines[0]
    assert not (tmp_path / "out").exists()
