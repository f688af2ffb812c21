"""Training on a folder of images and on VAE latents, end to end, and errors of the data."""

import dataclasses
import json
import shutil
from typing import Any

import pytest
import torch

from apps.diffusion import encode, train
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.trained_run import read_config
from apps.diffusion.config import training as c
from apps.diffusion.data import TensorDataset
from apps.diffusion.data import build as data_build
from apps.diffusion.files.images import sample_grid
from apps.diffusion.models import build
from apps.diffusion.models.autoencoder import decode
from apps.diffusion.schedulers.noise_schedule import scheduler_of
from apps.diffusion.training import run as run_module
from apps.diffusion.training import summary
from apps.diffusion.training.summary import draw_samples
from apps.diffusion.training.trainer import Trainer
from tests.apps.diffusion.helpers import image_files

TINY = (
    "--model.size tiny --model.hidden 16 --model.heads 2 --optimizer.batch 4 --optimizer.warmup 8 "
    "--optimizer.decay constant --sampling.steps 2 --sampling.iterations 2 --num-samples 6 --threads 1"
).split()


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_folder")
    image_files.tree(root, each=3)
    return root


@pytest.fixture(scope="module")
def latents(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("encoded")
    image_files.tiny_vae().save_pretrained(folder / "vae")
    command = [str(image_folder), "--vae", str(folder / "vae"), "--out", str(folder / "latents"), "--size", "16"]
    assert encode.main([*command, "--shard-size", "4", "--device", "cpu"]) == 0
    return folder


def call(preset, out, *options):
    return train.main([preset, *TINY, "--out", str(out), *map(str, options)])


def equal(a, b):
    x, y = checkpoint.newest(a), checkpoint.newest(b)
    for name in ("model", "ema"):
        assert all(torch.equal(w, getattr(y, name)[k]) for k, w in getattr(x, name).items()), name
    assert all(torch.equal(v, y.optimizer[i][k]) for i, e in x.optimizer.items() for k, v in e.items())
    assert x.progress.images == y.progress.images


def test_images_train_and_resume_bit_for_bit(image_folder, tmp_path, capsys):
    """Interrupted within the second epoch, at a moment that is no multiple of anything."""
    data = ("--data.path", image_folder, "--data.size", 16)
    assert call("folder", tmp_path / "whole", *data, "--optimizer.images", 24) == 0
    assert call("folder", tmp_path / "parts", *data, "--optimizer.images", 12) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "parts"), "--optimizer.images", "24"]) == 0
    equal(tmp_path / "whole", tmp_path / "parts")
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert "generated" not in metrics and metrics["sampling"]["images"] == 6
    assert (tmp_path / "whole" / "samples.png").exists()
    assert "3 classes" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(image_folder, tmp_path, capsys):
    data = ("--data.path", image_folder, "--data.size", 16, "--checkpoint-every", 4, "--keep", 2)
    assert call("folder", tmp_path / "whole", *data, "--optimizer.images", 16) == 0
    out = tmp_path / "run"
    assert call("folder", out, *data, "--optimizer.images", 12) == 0
    older, newest = checkpoint.all_of(out)
    assert (older.name, newest.name) == ("000000000008", "000000000012")
    image_files.truncate(newest / "ema.safetensors")
    again = ["--resume", "--out", str(out), "--optimizer.images", "16"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert train.main(again) == 2
    said = capsys.readouterr().err
    assert str(newest) in said and str(older) in said
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    shutil.rmtree(newest)
    assert train.main(again) == 0
    equal(tmp_path / "whole", out)


def test_resuming_on_other_images_is_refused(image_folder, tmp_path, capsys):
    out, copy = tmp_path / "run", tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    assert call("folder", out, "--data.path", copy, "--data.size", 16, "--optimizer.images", 4) == 0
    moved = copy.rename(tmp_path / "moved")  # the same images elsewhere are welcome
    again = ["--resume", "--out", str(out), "--data.path", str(moved), "--optimizer.images"]
    assert train.main([*again, "8"]) == 0
    (moved / "cat" / "0.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train.main([*again, "12"]) == 2
    assert "data.path" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_images_of_other_classes_are_refused_as_data_before_a_network_is_built(image_folder, tmp_path, capsys):
    data = ("--data.path", image_folder, "--data.size", 16, "--optimizer.images", 4)
    assert call("folder", tmp_path / "run", *data) == 0
    before = (tmp_path / "run" / "config.json").read_bytes()
    capsys.readouterr()
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--data.path", str(image_folder / "cat")]) == 2
    said = capsys.readouterr().err
    assert "classes was 3, now 0" in said and "--data.path" in said
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("flags", [("--data.size", 10), ("--data.size", 16, "--model.heads", 5)])
def test_a_network_that_cannot_be_names_its_flags(image_folder, tmp_path, capsys, flags):
    assert call("folder", tmp_path / "run", "--data.path", image_folder, *flags) == 2
    said = capsys.readouterr().err
    assert all(flag in said for flag in flags[::2])


def test_resuming_on_images_replaced_under_the_same_names_is_refused(image_folder, tmp_path, capsys):
    out, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(image_folder, images)
    assert call("folder", out, "--data.path", images, "--data.size", 16, "--optimizer.images", 4) == 0
    # runs of earlier versions have no checksum of the sizes: it is added
    record = json.loads((out / "data.json").read_text())
    sizes = record.pop("file_sizes_sha256")
    (out / "data.json").write_text(json.dumps(record))
    again = ["--resume", "--out", str(out), "--optimizer.images"]
    assert train.main([*again, "8"]) == 0
    assert json.loads((out / "data.json").read_text())["file_sizes_sha256"] == sizes
    # one image is replaced by another
    image_files.save(next(images.rglob("*.png")), image_files.random_image(77, 40, 41))
    capsys.readouterr()
    assert train.main([*again, "12"]) == 2
    said = capsys.readouterr().err
    assert "file_sizes" in said and str(images) in said and "--data.path" in said


def test_a_flipped_byte_in_a_shard_stops_training_at_its_start(latents, tmp_path, capsys):
    copy = tmp_path / "latents"
    shutil.copytree(latents / "latents", copy)
    shard = sorted((copy / "shards").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    assert call("latents", tmp_path / "run", "--data.path", copy, "--optimizer.images", 4) == 2
    assert str(shard) in capsys.readouterr().err


def test_latents_train_resume_and_decode(latents, tmp_path):
    data = ("--data.path", latents / "latents", "--optimizer.images")
    assert call("latents", tmp_path / "whole", *data, 24) == 0
    assert call("latents", tmp_path / "parts", *data, 12) == 0
    assert train.main(["--resume", "--out", str(tmp_path / "parts"), "--optimizer.images", "24"]) == 0
    equal(tmp_path / "whole", tmp_path / "parts")
    config = read_config(tmp_path / "whole")
    state = checkpoint.newest(tmp_path / "whole")
    model = build.rebuild(state.network)
    assert (model.num_classes, model.latent) == (3, (4, 4, 4))
    model.load_state_dict(state.ema)
    result = draw_samples(config, model.eval(), 3, 6)
    drawn = sample_grid(decode(image_files.tiny_vae(), result.samples), [0, 1, 2, 0, 1, 2], ("cat", "dog", "owl"))
    drawn.save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "whole" / "samples.png").read_bytes()
    assert not scheduler_of(config).config.clip_sample


def test_without_labels_the_model_is_unconditional(latents, image_folder, tmp_path):
    for source, options in (
        ("latents", ["--data.path", latents / "latents"]),
        ("folder", ["--data.path", image_folder]),
    ):
        out = tmp_path / source
        size = ["--data.size", 16] if source == "folder" else []
        options = [*options, *size, "--data.unconditional", "--optimizer.images", 4]
        assert call(source, out, *options) == 0
        assert build.rebuild(checkpoint.newest(out).network).null_class is None
    train_set, held_out = data_build.datasets(c.DataConfig(unconditional=True))
    assert held_out is not None and train_set.num_classes == held_out.num_classes == 0


def test_an_epoch_is_drawn_by_index_and_number():
    """Image k of the run is drawn as epoch k div n, whatever the batch."""
    seen = []

    class Spy(TensorDataset):
        def __getitem__(self, key: Any):
            seen.append((key[1], key[0]))
            return super().__getitem__(key)

    config = c.Config(
        model=c.ModelConfig(kind="dit", hidden=16, heads=2, depth=1), optimizer=c.OptimizerConfig(images=24, batch=4)
    )
    Trainer(config, Spy(torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.long), 1)).run(lambda state: None)
    assert [epoch for epoch, _ in seen] == [k // 5 for k in range(24)]
    assert all(sorted(i for e, i in seen if e == epoch) == list(range(5)) for epoch in range(4))


def test_the_vae_of_image_grids(latents, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(latents / "latents", moved)
    index = json.loads((moved / "index.json").read_text())
    index["vae"]["name"] = str(tmp_path / "gone")
    del index["digest"]  # as in an index of an earlier version
    (moved / "index.json").write_text(json.dumps(index))
    assert call("latents", tmp_path / "a", "--data.path", moved, "--optimizer.images", 4) == 0
    assert "--data.vae" in capsys.readouterr().err and not (tmp_path / "a" / "samples.png").exists()
    options = ["--data.path", moved, "--optimizer.images", 4, "--data.vae"]
    image_files.tiny_vae(1).save_pretrained(tmp_path / "other")
    assert call("latents", tmp_path / "b", *options, tmp_path / "other") == 2
    assert "--data.vae" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert call("latents", tmp_path / "b", *options, latents / "vae") == 0
    assert (tmp_path / "b" / "samples.png").exists()


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["folder", "--data.path", "nowhere"], "nowhere"),
        (["latents", "--data.path", "nowhere"], "apps.diffusion.encode"),
        (["--data.source", "latents"], "--data.path"),
        (["--data.size", "64"], "--data.size"),
        (["--data.mirror", "True"], "--data.mirror"),
        (["--data.unconditional", "--sampling.guidance", "2"], "guidance"),
        (["folder", "--data.size", "0"], "--data.size"),
    ],
)
def test_bad_data_is_refused_and_nothing_is_made(argv, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert train.main([*argv, "--out", str(tmp_path / "run")]) == 2
    except SystemExit as end:  # tyro's own way out, with the sentence in a box
        assert end.code == 2
    assert name in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_guidance_of_images_without_classes_is_refused(tmp_path, capsys):
    image_files.save(tmp_path / "flat" / "a.png", image_files.random_image(0))
    out = tmp_path / "run"
    options = ["--data.path", tmp_path / "flat", "--data.size", 16, "--sampling.guidance", 2]
    assert call("folder", out, *options) == 2
    assert "guidance" in capsys.readouterr().err and not out.exists()


def test_configurations_of_older_runs_still_load():
    text = json.loads(c.Config().to_json())
    text["data"] = {"type": "Data", "source": "digits"}
    assert c.Config.from_json(json.dumps(text)) == c.Config()
    tree = dataclasses.replace(c.Config(), data=c.DataConfig(source="latents", path=train.Path("x"), vae="y"))
    assert c.Config.from_json(tree.to_json()) == tree


def test_class_names_and_absolute_paths_are_kept_with_a_run(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    out = tmp_path / "run"
    assert call("folder", out, "--data.path", image_folder.name, "--data.size", 16, "--optimizer.images", 4) == 0
    assert json.loads((out / "data.json").read_text())["class_names"] == ["cat", "dog", "owl"]
    assert checkpoint.newest(out).classes == ("cat", "dog", "owl")
    monkeypatch.chdir(tmp_path)
    assert read_config(out).data.path == image_folder
    assert train.main(["--resume", "--out", "run", "--optimizer.images", "8"]) == 0


def test_relative_paths_of_earlier_runs_are_found_above_the_run(tmp_path, monkeypatch):
    out = tmp_path / "project" / "runs" / "a"
    out.mkdir(parents=True)
    (tmp_path / "project" / "images").mkdir()
    config = dataclasses.replace(c.Config(), data=c.DataConfig(source="folder", path=train.Path("images"), size=8))
    (out / "config.json").write_text(config.to_json())
    monkeypatch.chdir(tmp_path)
    assert read_config(out).data.path == tmp_path / "project" / "images"


def test_gray_images_train_a_network_of_one_channel(tmp_path):
    for i in range(4):
        image_files.save(tmp_path / "gray" / f"{i}.png", image_files.random_image(i, mode="L"))
    options = ["--data.path", tmp_path / "gray", "--data.size", 8, 16, "--optimizer.images", 4]
    assert call("folder", tmp_path / "run", *options) == 0
    assert build.rebuild(checkpoint.newest(tmp_path / "run").network).latent == (1, 8, 16)


def test_workers_train_the_same(image_folder, tmp_path):
    options = ["--data.path", image_folder, "--data.size", 16, "--optimizer.images", 12]
    assert call("folder", tmp_path / "a", *options) == 0
    assert call("folder", tmp_path / "b", *options, "--data.workers", 2) == 0
    equal(tmp_path / "a", tmp_path / "b")


def test_gray_runs_of_three_channels_are_resumed(tmp_path):
    """Earlier versions read gray images with three channels."""
    for i in range(4):
        image_files.save(tmp_path / "gray" / f"{i}.png", image_files.random_image(i, mode="L"))
    options = ["--data.path", tmp_path / "gray", "--data.size", 8, "--optimizer.images", 4, "--data.channels", 3]
    assert call("folder", tmp_path / "run", *options) == 0
    file = tmp_path / "run" / "config.json"
    saved = json.loads(file.read_text())
    del saved["data"]["channels"]
    file.write_text(json.dumps(saved))
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--optimizer.images", "8"]) == 0
    assert build.rebuild(checkpoint.newest(tmp_path / "run").network).latent == (3, 8, 8)


def test_sampling_for_the_summary_ends_with_its_time(tmp_path, capsys, monkeypatch):
    """Without a limit all images are sampled; where it ends within the first chunk, none."""
    config = dataclasses.replace(c.Config(), model=c.ModelConfig(hidden=16, heads=2))
    model = build.network(config.model, (1, 8, 8), 10, iterations=1, seed=0).eval()
    whole = draw_samples(config, model, 10, 20)
    assert len(whole.samples) == 20 and whole.labels.tolist() == [i % 10 for i in range(20)]
    assert draw_samples(config, model, 10, 20, limit=0.0) is None
    late = iter([*[0.0] * 21, *[2.0] * 30])  # the second chunk ends too late
    monkeypatch.setattr(summary.time, "monotonic", lambda: next(late))
    part = draw_samples(config, model, 10, 20, limit=1.0)
    monkeypatch.undo()
    assert torch.equal(part.samples, whole.samples[:16])
    monkeypatch.setattr(summary, "_time_limit", lambda config: 0.0)
    tiny = [*TINY, "--optimizer.images", "8", "--max-time", "60", "--out", str(tmp_path / "run")]
    assert train.main(tiny) == 0
    assert "0 of 6" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sampling"]["images"] == 0 and not (tmp_path / "run" / "samples.png").exists()


def test_other_values_of_images_in_memory_are_other_data(tmp_path):
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    run_module.write_data(tmp_path, data_build.fingerprint(TensorDataset(x, y)))
    x[3, 0, 1, 1] = 0.5
    with pytest.raises(ValueError, match="sha256"):
        run_module.write_data(tmp_path, data_build.fingerprint(TensorDataset(x, y)))
