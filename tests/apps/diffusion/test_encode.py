"""The encoding command: latents equal the VAE's, on any number of processes, after interruptions; bad input raises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apps.diffusion import encode
from apps.diffusion.data import latent_writer, preprocessing
from apps.diffusion.data.dataset import all_images
from apps.diffusion.data.latent_writer import LatentWriter
from apps.diffusion.data.latents import LatentDataset, read_index
from apps.diffusion.files.hashing import of_file as sha256
from apps.diffusion.models import autoencoder as vae
from tests.apps.diffusion.helpers import image_files

SMALL = ["--size", "16", "--batch", "3", "--shard-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    image_files.tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    image_files.tree(tmp_path / "images")
    return tmp_path / "images"


def call(images, vae_folder, out, *options):
    return encode.main([str(images), "--vae", str(vae_folder), "--out", str(out), *SMALL, *options])


def contents(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_mean_and_deviation_of_both_sides_are_the_vaes(images, vae_folder, tmp_path):
    assert call(images, vae_folder, tmp_path / "out") == 0
    latents = LatentDataset(tmp_path / "out")
    model: Any = image_files.tiny_vae()
    assert (len(latents), latents.num_classes, latents.shape) == (15, 3, (4, 4, 4))
    assert latents.y.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and latents.classes == ("cat", "dog", "owl")
    files = sorted(p.relative_to(images) for p in images.rglob("*.*"))
    for i in (0, 7, 14):
        pixels = torch.from_numpy(preprocessing.read(images / files[i], 16, 1).copy()).float() / 127.5 - 1
        for side, x in enumerate((pixels, pixels.flip(2))):
            with torch.no_grad():
                mean, logvar = model.quant_conv(model.encoder(x[None])).chunk(2, dim=1)
            mean_found, std_found = (moment[side] for moment in latents.moments(i))
            torch.testing.assert_close(mean_found, mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std_found, (0.5 * logvar[0]).exp(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*latents.moments(0)[0])


def test_the_index_names_where_the_latents_come_from(images, vae_folder, tmp_path):
    bad = image_files.damage(images)
    assert call(images, vae_folder, tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["images"] == 15 and index["source"]["listed"] == 19 and index["class_counts"] == [5, 5, 5]
    assert {entry["file"] for entry in index["skipped"]} == bad
    assert (index["scaling_factor"], index["shift_factor"]) == (0.5, 0.25)
    assert index["vae"]["name"] == str(vae_folder) and index["vae"] == {
        "name": str(vae_folder),
        **vae.digests(image_files.tiny_vae()),
    }
    assert vae.digests(image_files.tiny_vae(1))["weights_sha256"] != index["vae"]["weights_sha256"]
    assert index["preprocessing"] == {
        "version": 2,
        "size": 16,
        "crop": "center",
        "least_side": 4,
        "range": [-1, 1],
    }
    assert [shard["images"] for shard in index["shards"]] == [4, 3, 3, 3, 2]
    for shard in index["shards"]:
        assert sha256(tmp_path / "out" / shard["file"]) == shard["sha256"]
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]
    LatentDataset(tmp_path / "out").verify()


def test_bad_files_are_named_as_they_come_and_at_the_end(images, vae_folder, tmp_path, capsys):
    bad = image_files.damage(images)
    assert call(images, vae_folder, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert re.search(r"\b4\b.*\b19\b", out)
    assert all(name in out and f"skipped {name}" in err for name in bad)


def test_a_shard_of_bad_files_alone(images, vae_folder, tmp_path):
    for i in range(8):
        (images / "cat" / f"a{i}.png").write_text("no image")
    assert call(images, vae_folder, tmp_path / "out") == 0
    latents = LatentDataset(tmp_path / "out")
    assert len(latents) == 15 and 0 in [shard["images"] for shard in latents.index["shards"]]
    assert all_images(latents)[0].shape == (15, 4, 4, 4)
    assert torch.bincount(latents.y).tolist() == [5, 5, 5]


def test_an_interrupted_run_goes_on(images, vae_folder, tmp_path, monkeypatch, capsys):
    assert call(images, vae_folder, tmp_path / "whole") == 0
    write, written = LatentWriter.write, []

    def interrupted(writer, k, *rest):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(k)
        write(writer, k, *rest)

    monkeypatch.setattr(LatentWriter, "write", interrupted)
    assert call(images, vae_folder, tmp_path / "out") == 1
    assert "Errno 28" in capsys.readouterr().err
    with pytest.raises(ValueError, match=str(tmp_path / "out")):
        LatentDataset(tmp_path / "out")
    monkeypatch.undo()
    first = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    image_files.truncate(tmp_path / "out" / "shards" / "00001.safetensors")  # as by a crash of the machine
    assert call(images, vae_folder, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    kept = tmp_path / "out" / "shards" / "00000.safetensors"
    assert kept.stat().st_mtime_ns == first["shards/00000.safetensors"]


def test_a_failed_write_leaves_no_half_file(images, vae_folder, tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latent_writer, "save_file", half)
    assert call(images, vae_folder, tmp_path / "out") == 1
    assert set(contents(tmp_path / "out")) == {"settings.json"}


def test_several_processes_share_the_work_and_write_the_same(forks, images, vae_folder, tmp_path):
    assert call(images, vae_folder, tmp_path / "whole") == 0
    arguments = [str(images), "--vae", str(vae_folder), "--out", str(tmp_path / "shared"), *SMALL]
    assert forks.run("apps.diffusion.encode:main", arguments, processes=2) == 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_a_process_takes_its_own_shards_only(images, vae_folder, tmp_path, capsys):
    def names():
        return sorted(p.name for p in (tmp_path / "out" / "shards").glob("*.safetensors"))

    assert call(images, vae_folder, tmp_path / "out", "--rank", "1", "--world", "3") == 0
    assert names() == ["00001.safetensors"] and "1 of 4" in capsys.readouterr().out
    assert call(images, vae_folder, tmp_path / "out", "--rank", "0", "--world", "3") == 0
    assert names() == ["00000.safetensors", "00001.safetensors", "00003.safetensors"]
    assert not (tmp_path / "out" / "index.json").exists()
    assert call(images, vae_folder, tmp_path / "out", "--rank", "2", "--world", "3") == 0
    assert len(LatentDataset(tmp_path / "out")) == 15
    assert call(images, vae_folder, tmp_path / "out", "--rank", "3", "--world", "3") == 2


def test_half_precision_and_images_of_no_class(vae_folder, tmp_path):
    for i in range(5):
        image_files.save(tmp_path / "images" / f"{i}.png", image_files.random_image(i))
    assert call(tmp_path / "images", vae_folder, tmp_path / "full") == 0
    assert call(tmp_path / "images", vae_folder, tmp_path / "half", "--dtype", "float16") == 0
    full, half = LatentDataset(tmp_path / "full"), LatentDataset(tmp_path / "half")
    assert (full.num_classes, len(full)) == (0, 5)
    assert load_file(tmp_path / "half" / "shards" / "00000.safetensors")["mean"].dtype == torch.float16
    low, high = (all_images(LatentDataset(tmp_path / name, sample=False))[0] for name in ("half", "full"))
    torch.testing.assert_close(low, high, rtol=2e-3, atol=2e-3)
    assert half[0][0].dtype == torch.float32


def test_latents_made_otherwise_are_not_mixed(images, vae_folder, tmp_path, capsys):
    assert call(images, vae_folder, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    other = tmp_path / "other-vae"
    image_files.tiny_vae(1).save_pretrained(other)
    for vae_used, options, what in (
        (other, [], "vae"),
        (vae_folder, ["--size", "32"], "preprocessing"),
        (vae_folder, ["--shard-size", "5"], "stored"),
    ):
        assert call(images, vae_used, tmp_path / "out", *options) == 2
        assert what in capsys.readouterr().err
    image_files.save(images / "cat" / "new.png", image_files.random_image(77))
    assert call(images, vae_folder, tmp_path / "out") == 2
    assert "images" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_an_unreadable_vae_is_refused(images, tmp_path, capsys):
    image_files.tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    capsys.readouterr()
    assert call(images, tmp_path / "vae", tmp_path / "out") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encode: ")]
    assert len(error) == 1 and "AutoencoderKL" in error[0]
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused(images, vae_folder, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    for folder, out, options, name in (
        (tmp_path / "missing", "a", [], "missing"),
        (tmp_path / "other", "a", [], "other"),
        (images, "other", [], "--out"),
        (images, "other/mine.txt", [], "mine.txt"),
        (images, "a", ["--size", "18"], "--size 18"),
        (images, "a", ["--rank", "-1"], "--rank"),
    ):
        assert call(folder, vae_folder, tmp_path / out, *options) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and len(contents(tmp_path / "other")) == 1
    with pytest.raises(SystemExit) as stopped:
        call(images, vae_folder, tmp_path / "a", "--batch", "0")
    assert stopped.value.code == 2


def test_a_vae_in_the_folder_of_a_pipeline(images, tmp_path):
    image_files.tiny_vae().save_pretrained(tmp_path / "pipeline" / "vae")
    assert call(images, tmp_path / "pipeline", tmp_path / "out") == 0
    assert LatentDataset(tmp_path / "out").index["vae"]["name"].endswith("pipeline/vae")


def test_only_bad_files(vae_folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no image")
    assert call(tmp_path / "images", vae_folder, tmp_path / "out") == 2
    assert "a.png" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()


def test_latents_that_are_not_finite_are_named_and_left_out(images, vae_folder, tmp_path, capsys, monkeypatch):
    whole, seen = vae.moments, []

    def spoilt(model, x):
        mean, std = whole(model, x)
        mean[0, 1, 0, 0, 0] = torch.inf if not seen else 1e6  # the second is finite in single precision
        seen.append(1)
        return mean, std

    monkeypatch.setattr(vae, "moments", spoilt)
    assert call(images, vae_folder, tmp_path / "out", "--batch", "10", "--shard-size", "15", "--dtype", "float16") == 0
    printed = capsys.readouterr()
    latents = LatentDataset(tmp_path / "out")
    assert len(latents) == 13 and latents.y.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    assert all_images(latents)[0].isfinite().all()
    assert "2 of 15" in printed.out and "float16" in printed.out
    assert "cat/0.png" in printed.err and "owl/0.png" in printed.err


def test_a_shard_is_made_again_where_it_or_its_images_are_others(images, vae_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(images, vae_folder, out) == 0
    before = contents(out)
    shards = [out / "shards" / f"{k:05d}.safetensors" for k in range(4)]
    damaged = bytearray(shards[0].read_bytes())
    damaged[-5] ^= 255
    shards[0].write_bytes(damaged)
    (out / "shards" / "00001.json").write_text("{")
    record, index = out / "shards" / "00002.json", out / "index.json"
    record.write_text(record.read_text().replace("skipped", "skIpped"))
    index.write_text(index.read_text().replace('"scaling_factor": ', '"scaling_factor": 1'))
    with pytest.raises(ValueError, match="digest"):
        read_index(out)
    kept = shards[3].stat().st_mtime_ns
    assert call(images, vae_folder, out) == 0
    assert contents(out) == before and shards[3].stat().st_mtime_ns == kept
    image_files.save(
        images / "owl" / "4.webp", image_files.random_image(1234, 50, 50)
    )  # another image by the same name
    assert call(images, vae_folder, out) == 0
    changed = {name for name, held in contents(out).items() if held != before[name]}
    assert changed == {"index.json", "shards/00003.json", "shards/00003.safetensors"}
    (out / "settings.json").write_text("[1]")
    assert call(images, vae_folder, out) == 2
    assert "settings.json" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_or_a_folder_that_cannot_be_is_refused(images, vae_folder, tmp_path, capsys, device):
    assert call(images, vae_folder, tmp_path / "out", "--device", device) == 2
    assert f"--device {device} " in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    assert call(images, vae_folder, tmp_path / "file" / "sub") == 2
    assert "--out" in capsys.readouterr().err


def test_help_is_quick():
    code = (
        "import sys; from apps.diffusion import encode\n"
        "try: encode.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("False")


def test_pixels_reach_the_vae_between_minus_one_and_one(images, vae_folder, tmp_path, monkeypatch):
    seen = []

    def spy(model, x):
        seen.append(x)
        return torch.zeros(len(x), 2, 4, 4, 4), torch.ones(len(x), 2, 4, 4, 4)

    monkeypatch.setattr(vae, "moments", spy)
    assert call(images, vae_folder, tmp_path / "out") == 0
    x = torch.cat(seen)
    assert -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1 and max(len(part) for part in seen) == 3
    assert np.allclose((x + 1) * 127.5, ((x + 1) * 127.5).round(), atol=1e-3)


def test_statistics_by_channel_of_the_vae_are_honored(images, tmp_path):
    model: Any = image_files.tiny_vae()
    mean, std = [-1.0, 2.0, 0.5, 3.0], [5.0, 6.0, 7.0, 8.0]
    model.register_to_config(latents_mean=mean, latents_std=std)
    model.save_pretrained(tmp_path / "vae")
    assert call(images, tmp_path / "vae", tmp_path / "out") == 0
    latents = LatentDataset(tmp_path / "out", sample=False)
    assert latents.index["latents_mean"] == mean and latents.index["latents_std"] == std
    file = images / sorted(p.relative_to(images) for p in images.rglob("*.*"))[3]
    x = torch.from_numpy(preprocessing.read(file, 16)).float() / 127.5 - 1
    with torch.no_grad():
        raw = model.encode(x[None]).latent_dist.mean[0]
    # as the pipelines of diffusers that know these fields: (z - mean) scaling / std
    expected = (raw - torch.tensor(mean)[:, None, None]) * 0.5 / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(latents[3][0], expected, rtol=1e-4, atol=1e-5)


def test_latents_can_be_used_from_another_folder(images, vae_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(vae_folder.parent)
    assert call(images, Path(vae_folder.name), tmp_path / "out") == 0
    monkeypatch.chdir(tmp_path)
    assert vae.open_decoder(read_index(tmp_path / "out")).config["scaling_factor"] == 0.5


def test_an_interrupt_is_one_line_and_code_130(images, vae_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LatentWriter, "write", interrupted)
    assert call(images, vae_folder, tmp_path / "out") == 130
    said = capsys.readouterr().err.rstrip().split("\n")[-1]
    assert said.startswith("encode: ") and "Traceback" not in said


def test_images_that_change_meanwhile_are_no_success(images, vae_folder, tmp_path, monkeypatch, capsys):
    """The shard is incomplete, and no other process will write it."""
    write = LatentWriter._write_shard

    def change(self, *arguments):
        os.utime(images / "dog" / "1.jpg", ns=(0, 0))
        write(self, *arguments)

    monkeypatch.setattr(LatentWriter, "_write_shard", change)
    command = [str(images), "--vae", str(vae_folder), "--size", "16", "--out", str(tmp_path / "out")]
    assert encode.main(command) == 2
    assert "same command" in capsys.readouterr().err and not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setattr(LatentWriter, "_write_shard", write)
    assert encode.main(command) == 0
