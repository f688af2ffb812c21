"""Functions that the commands share: one sentence for a missing package, and devices by name."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apps.diffusion.cli import device_of, run_command

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
