"""Runs of latents and runs without classes are sampled by the command and opened as pipelines; errors of such runs."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apps.diffusion import convert, sample, train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.open_network import open_run
from apps.diffusion.config import training as c
from apps.diffusion.files import hashing
from apps.diffusion.files.images import read
from apps.diffusion.models import FPDM, DiT, build
from apps.diffusion.models.autoencoder import digests
from apps.diffusion.pipeline import FixedPointPipeline
from tests.apps.diffusion.helpers import image_files
from tests.apps.diffusion.helpers.small_models import randomized
from tests.apps.diffusion.helpers.training_runs import barely_trained

SMALL: dict[str, Any] = {"in_channels": 4, "input_size": 4, "hidden_size": 16, "num_heads": 2, "depth": 1}


def write_run(folder: Path, data: c.DataConfig, num_classes: int, sampling: c.SamplingOptions, seed: int = 0) -> Path:
    """A run's folder, as training leaves it, with drawn weights."""
    config = c.Config(model=c.ModelConfig(kind="dit", depth=1), data=data, sampling=sampling, out=folder)
    model = randomized(DiT(num_classes=num_classes, **SMALL), seed)
    state = checkpoint.Checkpoint(
        network=build.describe(model),
        model=model.state_dict(),
        ema=model.state_dict(),
        optimizer={},
        progress=checkpoint.Progress(images=7),
    )
    checkpoint.save(folder, state)
    (folder / "config.json").write_text(config.to_json())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of latents: with classes, without, and one that starts from other weights; their VAE beside them."""
    root = tmp_path_factory.mktemp("runs")
    vae = image_files.tiny_vae()
    vae.save_pretrained(root / "vae")
    (root / "latents").mkdir()
    index = {"format": 1, "vae": {"name": str(root / "vae"), **digests(vae)}}
    (root / "latents" / "index.json").write_text(json.dumps(index))
    data = c.DataConfig(source="latents", path=root / "latents")
    quick = c.SamplingOptions(steps=2, sampler="ddpm", guidance=1.0)
    write_run(root / "classes", data, 5, c.SamplingOptions(steps=2, sampler="ddpm", guidance=2.0))
    write_run(root / "plain", data, 0, quick)
    write_run(root / "other", data, 5, c.SamplingOptions(steps=2, sampler="ddpm", guidance=2.0), seed=1)
    return root


def png_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("[0-9]*.png")}


@pytest.mark.parametrize("name", ["classes", "plain"])
def test_latents_become_images_and_the_pipeline_gives_the_same(runs, tmp_path, name):
    assert sample.main([str(runs / name), "--num", "3", "--out", str(tmp_path / "a"), "--npz"]) == 0
    expected = {f"0000{i}-class-{i}.png" if name == "classes" else f"0000{i}.png" for i in range(3)}
    assert set(png_files(tmp_path / "a")) == expected
    with np.load(tmp_path / "a" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3)
        assert ("arr_1" in archive.files) == (name == "classes")
    pipe: Any = FixedPointPipeline.from_pretrained(runs / name)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"class_labels": [0, 1, 2]} if name == "classes" else {"num_images": 3}
    images = pipe(**call, generator=0).images
    for file, image in zip(sorted(expected), images, strict=True):
        np.testing.assert_array_equal(np.asarray(read(tmp_path / "a" / file)), np.asarray(image))
    assert pipe(**call, generator=0, output_type="latent").images.shape == (3, 4, 4, 4)
    pipe.save_pretrained(tmp_path / "saved")
    again: Any = FixedPointPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.vae is not None and again.config["guidance"] == (2.0 if name == "classes" else 1.0)
    assert np.array_equal(np.asarray(again(**call, generator=0).images[1]), np.asarray(images[1]))


def test_the_vae_of_latents_that_moved(runs, tmp_path, monkeypatch):
    alone = shutil.copytree(runs / "plain", tmp_path / "alone")
    config = c.Config.from_json((alone / "config.json").read_text())
    moved = c.DataConfig(source="latents", path=Path("gone"))
    (alone / "config.json").write_text(config.to_json().replace(str(runs / "latents"), "gone"))
    trained = open_run(alone)
    assert trained.config is not None and trained.config.data == moved
    with pytest.raises(ValueError, match="gone"):
        trained.decoder(None, "cpu")
    found = trained.decoder(str(runs / "vae"), "cpu")
    assert found is not None and digests(found) == digests(image_files.tiny_vae())
    with pytest.warns(UserWarning, match="VAE"):
        pipe: Any = FixedPointPipeline.from_pretrained(alone)
    assert pipe.vae is None
    assert FixedPointPipeline.from_pretrained(alone, vae=runs / "vae").vae is not None


def test_every_sampler_of_a_run(runs):
    for sampler in ("ddim", "dpm++", "unipc", "euler"):
        pipe: Any = FixedPointPipeline.from_run(runs / "plain", sampler=sampler)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(num_images=1, generator=0, output_type="latent").images.isfinite().all()


def damaged(runs: Path, tmp_path: Path, what: str) -> list[str]:
    """The command's arguments in a situation where it must refuse."""
    run = shutil.copytree(runs / "classes", tmp_path / "run")
    (newest,) = (run / "checkpoints").iterdir()
    options: list[str] = []
    if what == "foreign weights":
        state = checkpoint.newest(run)
        wide = randomized(DiT(num_classes=5, **{**SMALL, "hidden_size": 32})).state_dict()
        shutil.rmtree(newest)
        checkpoint.save(run, checkpoint.Checkpoint(**{**vars(state), "ema": wide}))
    elif what == "truncated weights":
        image_files.truncate(newest / "ema.safetensors")
    elif what == "no checkpoint":
        shutil.rmtree(newest)
    elif what == "another network":
        state = json.loads((newest / "state.json").read_text().replace('"DiT"', '"UNet"'))
        del state["sha256"]
        (newest / "state.json").write_text(json.dumps(state | {"sha256": hashing.of_json(state)}))
    elif what == "unreadable vae":
        options = ["--vae", str(tmp_path / "vae")]
        shutil.copytree(runs / "vae", tmp_path / "vae")
        image_files.truncate(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    elif what == "another vae":
        image_files.tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
        options = ["--vae", str(tmp_path / "vae")]
    elif what == "wrong latent shape":
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace(str(runs / "latents"), "gone"))
        image_files.tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
        options = ["--vae", str(tmp_path / "vae")]
    elif what == "no vae":
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace(str(runs / "latents"), "gone"))
    elif what == "class out of range":
        options = ["--classes", "5"]
    elif what == "guidance without classes":
        run, options = runs / "plain", ["--guidance", "2"]
    elif what == "classes without classes":
        run, options = runs / "plain", ["--classes", "0"]
    elif what == "fixed point of a dit":
        options = ["--iterations", "5"]
    elif what == "no config":
        (run / "config.json").unlink()
    elif what == "a file":
        run = tmp_path / "dit.pt"
        run.touch()
    return [str(run), *options]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("foreign weights", "x_embedder"),
        ("truncated weights", "ema.safetensors"),
        ("no checkpoint", "apps.diffusion.train"),
        ("another network", "UNet"),
        ("unreadable vae", "AutoencoderKL"),
        ("another vae", "--vae"),
        ("wrong latent shape", "8"),
        ("no vae", "gone"),
        ("class out of range", "--classes"),
        ("guidance without classes", "--guidance"),
        ("classes without classes", "--classes"),
        ("fixed point of a dit", "--iterations"),
        ("no config", "config.json"),
        ("a file", "apps.diffusion.convert"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_nothing_is_written(runs, tmp_path, capsys, what, name):
    out = tmp_path / "out"
    assert sample.main([*damaged(runs, tmp_path, what), "--num", "2", "--out", str(out)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("sample: ") and name in printed
    assert not out.exists()


def test_a_folder_with_samples_of_another_run_is_left_as_it_is(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert sample.main([str(runs / "classes"), "--num", "2", "--out", str(out)]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    for options in ([str(runs / "other")], [str(runs / "classes"), "--steps", "3"], [str(runs / "plain")]):
        assert sample.main([*options, "--num", "4", "--out", str(out)]) == 2
        assert "--out" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    torch.save({}, tmp_path / "file")
    assert sample.main([str(runs / "classes"), "--out", str(tmp_path / "file")]) == 2
    (out / "settings.json").write_text("{")
    assert sample.main([str(runs / "classes"), "--num", "2", "--out", str(out)]) == 2


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, weights):
    """The checksums fit, because training wrote them so; NaN would become black images."""
    run = barely_trained(tmp_path / "run", 32)
    state = checkpoint.newest(run)
    spoilt = dict(getattr(state, weights))
    spoilt["final_layer.linear.bias"] = spoilt["final_layer.linear.bias"] * float("nan")
    progress = dataclasses.replace(state.progress, images=48)
    checkpoint.save(run, dataclasses.replace(state, progress=progress, **{weights: spoilt}))
    for command, argv in (
        (sample.main, [str(run), "--weights", weights, "--num", "1", "--out", str(tmp_path / "samples")]),
        (convert.main, [str(run), "--weights", weights, "--out", str(tmp_path / "converted")]),
        (train.main, ["--resume", "--out", str(run), "--optimizer.images", "64"]),
    ):
        assert command(argv) == 2
        assert "final_layer.linear.bias" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists() and not (tmp_path / "converted").exists()


def test_a_sample_that_is_not_a_number_is_no_black_image(tmp_path, capsys, monkeypatch):
    run = barely_trained(tmp_path / "run", 32)
    output = FPDM.output
    monkeypatch.setattr(FPDM, "output", lambda *args: output(*args) * float("nan"))
    assert sample.main([str(run), "--num", "2", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    assert "NaN" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))


def test_a_folder_without_a_run_has_a_remedy_that_works(tmp_path, capsys):
    """Training refuses a folder with files, and a checkpoint lies in its run."""
    run = barely_trained(tmp_path / "run", 32)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine.txt").touch()
    for folder, remedy in (
        (checkpoint.all_of(run)[0], str(run)),
        (run / "checkpoints", str(run)),
        (tmp_path / "files", "folder of a run"),
        (tmp_path / "new", "apps.diffusion.train --out"),
    ):
        assert sample.main([str(folder), "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert remedy in printed and (folder == tmp_path / "new") == ("apps.diffusion.train" in printed)
