"""Functions that the commands share: one sentence for a missing package, and devices by name."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apps.diffusion import convert, diagnose, encode, sample, train
from apps.diffusion.cli import device_of, run_command
from tests.apps.diffusion.helpers import image_files

ROOT = Path(__file__).parents[3]
# find_spec finds none of these, as where the extra is not installed
HIDDEN = """
import importlib.util
_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("tyro", "diffusers") else _find(name, *rest)
"""


@pytest.mark.parametrize("arguments", [["-m", "apps.diffusion.train", "--help"], ["-c", "import apps.diffusion.rng"]])
def test_a_missing_extra_is_named_with_its_installation(tmp_path, arguments):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    ended = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    last = ended.stderr.strip().split("\n")[-1]
    assert ended.returncode == (2 if arguments[0] == "-m" else 1)
    assert "tyro" in last and "diffusers" in last and "implicit-fixed-points[diffusion]" in last
    if arguments[0] == "-m":
        assert ended.stderr.count("\n") == 1


def test_names_that_are_no_text_are_printed_escaped(monkeypatch):
    written = io.BytesIO()
    out = io.TextIOWrapper(written, "utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    assert run_command("encode", lambda _: print(os.fsdecode(b"caf\xe9")), []) == 0
    out.flush()
    assert written.getvalue() == b"caf\\udce9\n"


def test_an_interruption_is_one_whatever_error_it_becomes(capsys):
    def command(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("The checkpoint cannot be read; delete it.") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    try:
        assert run_command("convert", command, [], after="Nothing was written.") == 130
        assert capsys.readouterr().err == "convert: interrupted. Nothing was written.\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_device_by_its_name(monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device_of("auto") == device_of("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    assert device_of("auto") == "cpu"
    # an accelerator that is found, and on which nothing can be computed, is named
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda"):
            device_of("auto")


@pytest.mark.parametrize(("rank", "world"), [("5", None), ("1", "1"), ("0", "0"), ("x", None), ("0", "many")])
def test_a_process_that_cannot_be_touches_no_run(tmp_path, monkeypatch, capsys, rank, world):
    """RANK left over from another program: the process would take itself for the second of one."""
    monkeypatch.setenv("RANK", rank)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    (tmp_path / "config.json").write_text("{}")
    for name, command in {"train": train.main, "sample": sample.main}.items():
        argv = ["mnist-fpdm", "--out", str(tmp_path)] if name == "sample" else ["--out", str(tmp_path)]
        assert command(argv) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"{name}: ") and ("RANK" in printed or "WORLD_SIZE" in printed)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be made or opened for writing below this folder."""
    real = {"mkdir": os.mkdir, "open": os.open}

    def protect(folder):
        def inside(path):
            return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

        def mkdir(path, *arguments, **options):
            if inside(path) and not os.path.exists(path):
                raise OSError(30, "Read-only file system", str(path))
            return real["mkdir"](path, *arguments, **options)

        def opened(path, flags, *arguments, **options):
            if inside(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(30, "Read-only file system", str(path))
            return real["open"](path, flags, *arguments, **options)

        monkeypatch.setattr(os, "mkdir", mkdir)
        monkeypatch.setattr(os, "open", opened)

    return protect


COMMANDS = [train, sample, convert, encode, diagnose]


@pytest.mark.parametrize(
    ("command", "name"), [*((command, "new") for command in COMMANDS), (train, "there"), (convert, "there")]
)
def test_a_read_only_place_names_the_flag(tmp_path, read_only, capsys, command, name):
    place = tmp_path / "place"
    (place / "there").mkdir(parents=True)
    argv = {
        train: ["--optimizer.images", "64"],
        sample: ["mnist-fpdm", "--num", "1", "--steps", "1"],
        convert: ["mnist-fpdm"],
        encode: [str(tmp_path / "images"), "--vae", str(tmp_path / "vae"), "--size", "8"],
        diagnose: ["mnist-fpdm", "--num", "1", "--steps", "1", "--budget", "10"],
    }[command]
    image_files.tree(tmp_path / "images", each=1)
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    read_only(place)
    assert command.main([*argv, "--out", str(place / name)]) in (1, 2)
    printed = capsys.readouterr().err
    assert "--out" in printed and "Read-only" in printed


@pytest.mark.parametrize("name", ["a file", "n" * 300])
def test_a_place_that_cannot_be_a_folder_names_the_flag(tmp_path, capsys, name):
    (tmp_path / "a file").touch()
    out = str(tmp_path / name / "below")
    for command in (train.main, lambda argv: convert.main(["mnist-fpdm", *argv])):
        assert command(["--out", out]) == 2
        assert "--out" in capsys.readouterr().err
