"""The folder of a saved pipeline, or its repository on a hub, can be opened where this application is not installed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi

from apps.diffusion.checkpoint.readers import read_network
from apps.diffusion.checkpoint.single_file import single_file
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from implicit import Anderson
from tests.apps.diffusion.helpers import image_files
from tests.apps.diffusion.helpers.hub_server import hub
from tests.apps.diffusion.helpers.small_models import randomized

ROOT = Path(__file__).parents[3]
OPEN = """
import importlib.util, json, sys, warnings
import numpy
sys.modules["apps"] = None  # an installation for development finds it; importing it fails now
assert importlib.util.find_spec("implicit") is not None
from diffusers import DiffusionPipeline
for number, (source, call) in enumerate(json.loads(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    numpy.save(f"there-{number}.npy", pipe([1, 3], generator=5, output_type="np", **call).images)
    again = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)  # the code is executed again
    again.set_progress_bar_config(disable=True)
    again([1], generator=5)
    pipe.save_pretrained(f"again-{number}")
"""
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fpdm", {"reuse": "blended", "sampling": {"share": 0.25}}, {"macs": 2e6, "allocation": "increasing"}),
    ("fpdm", {}, {"sampler": "ddim", "iterations": 3, "parallel": "anderson"}),
    ("fpdm", {"sampling": {"solver": Anderson(memory=3), "rtol": (0.1,), "max_evals": 6}}, {}),
    ("dit", {}, {"sampler": "euler", "block_passes": 16}),
    ("flow", {"reuse": "on", "sampling": {"guidance_interval": (300, 800)}}, {"num_inference_steps": 4}),
]


def pipeline(kind="fpdm", **options) -> Any:
    sizes: dict[str, Any] = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 5}
    network = randomized(DiT(depth=2, **sizes) if kind == "dit" else FPDM(**sizes)).eval()
    scheduler = make_scheduler("flow" if kind == "flow" else "ddpm")
    pipe = FixedPointPipeline(network, scheduler, image_files.tiny_vae(), steps=3, guidance=2.0, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_alone(folder, orders, **environment):
    """Images of the pipelines in the sources of `orders` (source, options of the call), by one process that finds
    `implicit` and not `apps`.
    """
    (folder / "packages").mkdir()
    (folder / "packages" / "implicit").symlink_to(ROOT / "implicit")
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables |= {"HF_HOME": str(folder / "cache"), "PYTHONPATH": str(folder / "packages"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", OPEN, json.dumps([(str(source), call) for source, call in orders])],
        cwd=folder,
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.load(folder / f"there-{number}.npy") for number in range(len(orders))]


def files(folder: Path) -> dict[str, bytes]:
    """Contents by path; the configs of networks name the folder that they were read from."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(pipeline, its folder, images of the folder in a process of its own, the folder that this process saved)."""
    folder = tmp_path_factory.mktemp("alone")
    pipes = [pipeline(kind, **options) for kind, options, _ in CASES]
    saved = [folder / f"saved-{number}" for number in range(len(CASES))]
    for pipe, where in zip(pipes, saved, strict=True):
        pipe.save_pretrained(where)
    orders = [(where, call) for where, (_, _, call) in zip(saved, CASES, strict=True)]
    images = open_alone(folder, orders, HF_HUB_OFFLINE="1")
    return [(pipe, saved[n], images[n], folder / f"again-{n}") for n, pipe in enumerate(pipes)]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_folder_opens_without_this_application_and_gives_the_same_bits(opened, number):
    (pipe, saved, there, by_process), call = opened[number], CASES[number][2]
    assert there.shape == (2, 16, 16, 3)
    assert np.array_equal(pipe([1, 3], generator=5, output_type="np", **call).images, there)
    first, again = files(saved), files(by_process)
    assert {name for name in first if first[name] != again[name]} <= {"model/config.json", "vae/config.json"}
    ours: Any = FixedPointPipeline.from_pretrained(by_process)
    assert np.array_equal(ours([1, 3], generator=5, output_type="np", **call).images, there)


def test_a_pushed_repository_opens_without_this_application(tmp_path):
    pipe = pipeline()
    with hub() as (address, repositories):
        assert "me/digits" in pipe.push_to_hub("me/digits", api=HfApi(endpoint=address, token="hf_none"))
        pipe.save_pretrained(tmp_path / "saved")
        assert repositories["me/digits"] == files(tmp_path / "saved")
        (there,) = open_alone(tmp_path, [("me/digits", {})], HF_ENDPOINT=address)
    assert np.array_equal(pipe([1, 3], generator=5, output_type="np").images, there)


def test_the_folder_names_its_code_and_its_card_describes_the_network(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["fixed_point_pipeline", "SamplingPipeline"]
    assert index["model"] == ["modeling_fpdm", "FPDM"]
    card = (tmp_path / "README.md").read_text()
    assert f"{sum(p.numel() for p in pipe.model.parameters()):,} parameters" in card and "trust_remote_code" in card
    (tmp_path / "README.md").write_text("mine")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="push_to_hub"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [("sampling.standalone_pipeline", "SamplingPipeline"), ("models.fpdm", "FPDM"), ("models.dit", "DiT")],
)
def test_one_file_holds_all_that_a_class_uses_and_imports_nothing_of_this_application(module, name):
    tree = ast.parse(single_file(f"apps.diffusion.{module}", name))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "implicit" in imported or name == "DiT"
    assert not any(str(found).split(".")[0] in ("apps", "tyro") for found in imported)
    defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert name in defined and len(defined) == len(set(defined))


def test_two_definitions_of_one_name_in_one_file_are_refused(tmp_path, monkeypatch):
    from apps.diffusion.checkpoint import single_file as module

    package = tmp_path / "apps" / "diffusion"
    package.mkdir(parents=True)
    (package / "a.py").write_text("def size():\n    return 1\n\n\ndef left():\n    return size()\n")
    (package / "b.py").write_text(
        "from apps.diffusion.a import left\n\n\ndef size():\n    return 2\n\n\nclass B:\n    x = left() + size()\n"
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="size"):
        single_file("apps.diffusion.b", "B")


def _flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path, place):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.model.save_pretrained(tmp_path / "model")
    weights = "diffusion_pytorch_model.safetensors"
    for folder in (tmp_path / "pipe" / "model", tmp_path / "model"):
        for read in (FPDM.from_pretrained, read_network):
            assert isinstance(read(folder), FPDM)
        _flip(folder / weights, place)
        for read in (FPDM.from_pretrained, read_network):
            with pytest.raises(ValueError, match=rf"{weights} is damaged: its SHA-256"):
                read(folder)
    for opened in (tmp_path / "pipe", tmp_path / "model"):
        with pytest.raises(ValueError, match=rf"{weights} is damaged: its SHA-256"):
            FixedPointPipeline.from_pretrained(opened)


def test_checksums_are_those_of_what_is_saved_last(tmp_path):
    """A model that was read from a folder holds the checksums of that folder in its configuration."""
    pipeline().model.save_pretrained(tmp_path / "first")
    model = FPDM.from_pretrained(tmp_path / "first")
    model.final_layer.linear.bias.data += 1
    model.save_pretrained(tmp_path / "second")
    again = FPDM.from_pretrained(tmp_path / "second")
    assert all(map(np.array_equal, again.state_dict().values(), model.state_dict().values()))
