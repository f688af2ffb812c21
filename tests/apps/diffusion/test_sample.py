"""The commands that sample and evaluate: files by (seed, i), kept if they exist, and bad input refused."""

import json
import os

import numpy as np
import pytest
import torch

from apps.diffusion import checkpoint, evaluate, sample
from apps.diffusion import config as c
from apps.diffusion.data import digits
from apps.diffusion.pictures import columns_by_class, grid, loss_curve, read, to_pil
from apps.diffusion.trainer import Trainer

QUICK = ["--steps", "2", "--iterations", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, barely trained."""
    folder = tmp_path_factory.mktemp("run")
    config = c.Config(
        model=c.Model(hidden=16, heads=2),
        optimisation=c.Optimisation(images=640, batch=16, lr=1e-2, warmup=0),
        out=folder,
    )
    Trainer(config, digits("train")).run(lambda state: checkpoint.save(folder, state))
    (folder / "config.json").write_text(config.to_json())
    return folder


def call(run, out, *options):
    return sample.main([str(run), *QUICK, "--out", str(out), *options])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("[0-9]*.png")}


def test_files_are_named_by_number_and_class_at_native_size(trained, tmp_path):
    assert call(trained, tmp_path / "a", "--num", "23") == 0
    names = sorted(contents(tmp_path / "a"))
    assert names == [f"{i:05d}-class-{i % 10}.png" for i in range(23)]
    assert all(read(tmp_path / "a" / n).size == (8, 8) for n in names)
    sheet = read(tmp_path / "a" / "grid.png")
    assert sheet.width >= 640
    assert call(trained, tmp_path / "b", "--num", "5", "--classes", "7", "3") == 0
    assert [n[-5] for n in sorted(contents(tmp_path / "b"))] == ["7", "3", "7", "3", "7"]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_depends_on_the_seed_and_its_number_alone(trained, tmp_path, sampler, monkeypatch):
    assert call(trained, tmp_path / "whole", "--num", "25", "--sampler", sampler) == 0
    monkeypatch.setattr(sample, "PART", 3)
    assert call(trained, tmp_path / "parts", "--num", "7", "--sampler", sampler) == 0
    assert call(trained, tmp_path / "parts", "--num", "25", "--sampler", sampler) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    assert call(trained, tmp_path / "other", "--num", "25", "--sampler", sampler, "--seed", "1") == 0
    other = contents(tmp_path / "other")
    assert all(other[name] != data for name, data in contents(tmp_path / "whole").items())


def test_files_that_exist_are_kept(trained, tmp_path, capsys):
    assert call(trained, tmp_path, "--num", "12") == 0
    first = contents(tmp_path)
    kept, lost = tmp_path / "00003-class-3.png", tmp_path / "00005-class-5.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    capsys.readouterr()
    assert call(trained, tmp_path, "--num", "12") == 0
    assert "1 new images, 11 kept" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before and contents(tmp_path) == first


def test_samples_made_otherwise_are_not_mixed(trained, tmp_path, capsys):
    assert call(trained, tmp_path / "a", "--num", "3") == 0
    before = contents(tmp_path / "a")
    assert call(trained, tmp_path / "a", "--num", "3", "--seed", "1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    assert call(trained, tmp_path / "b", "--num", "3") == 2
    assert os.listdir(tmp_path / "b") == ["letter.txt"]
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "classes 0 to 9"),
        (["--num", "0"], "--num"),
        (["--steps", "0"], "Sampling.steps"),
        (["--steps", "1001"], "1001"),
        (["--guidance", "-1"], "Sampling.guidance"),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(trained, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    try:
        code = sample.main([str(trained), "--out", str(out), *options])
    except SystemExit as end:  # tyro's own way out
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
    assert sample.main([str(tmp_path / "nothing"), "--out", str(out)]) == 2


def test_guidance_changes_images_and_one_does_not(trained, tmp_path):
    for name, scale in (("none", "1.0"), ("strong", "40.0")):
        assert call(trained, tmp_path / name, "--num", "2", "--guidance", scale) == 0
    assert call(trained, tmp_path / "default", "--num", "2") == 0
    none, strong, default = (contents(tmp_path / n) for n in ("none", "strong", "default"))
    assert none == default and none != strong


def test_evaluate_scores_what_was_written(tmp_path, capsys):
    held_out = digits("held-out")
    for i, (x, y) in enumerate(zip(held_out.x, held_out.y.tolist(), strict=True)):
        to_pil(x).save(tmp_path / f"{i:05d}-class-{y}.png")
    x, y = evaluate.read(tmp_path)
    assert torch.equal(y, held_out.y) and (x - held_out.x).abs().max() <= 1 / 255 + 1e-6
    assert evaluate.main([str(tmp_path), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["generated"]["accuracy"] == pytest.approx(scores["real_held_out"]["accuracy"], abs=0.004)
    assert scores["generated"]["frechet"] == pytest.approx(scores["real_held_out"]["frechet"], abs=0.01)
    assert evaluate.main([str(tmp_path / "nothing")]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_pictures_hold_their_pixels():
    x = torch.linspace(-1.2, 1.2, 16).view(1, 4, 4)
    image = to_pil(x)
    assert image.mode == "L" and image.getpixel((0, 0)) == 0 and image.getpixel((3, 3)) == 255
    sheet = grid([image, to_pil(-x), image], columns=2, enlarge=3)
    assert sheet.size == (33, 33)
    pixels = np.asarray(sheet)
    np.testing.assert_array_equal(pixels[3:15:3, 3:15:3], np.asarray(image))
    np.testing.assert_array_equal(pixels[3:15:3, 18:30:3], np.asarray(to_pil(-x)))
    assert to_pil(torch.zeros(3, 2, 2)).mode == "RGB"
    with pytest.raises(ValueError, match="4; decode"):
        to_pil(torch.zeros(4, 2, 2))


def test_columns_are_classes():
    labels = [2, 0, 0, 2, 1, 1, 2, 0]
    assert [labels[i] for i in columns_by_class(labels, rows=9)] == [0, 1, 2] * 2
    assert columns_by_class(labels, rows=1) == [1, 4, 0]


@pytest.mark.parametrize("points", [1, 3, 200])
def test_the_loss_curve_is_drawn_from_any_history(tmp_path, points):
    loss_curve([(100 * k, 1.0 / (k + 1)) for k in range(points)], tmp_path / "loss.png", "loss")
    assert read(tmp_path / "loss.png").width > 500
