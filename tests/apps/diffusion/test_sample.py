"""The sampling and the evaluation command: file i depends on (seed, i), existing files are kept, bad input raises."""

import json
import os
from typing import Any

import numpy as np
import pytest
import torch

from apps.diffusion import sample
from apps.diffusion.checkpoint.open_network import open_run
from apps.diffusion.files.images import columns_by_class, grid, read, sample_grid, to_pil
from apps.diffusion.files.plots import loss_curve
from tests.apps.diffusion.helpers.training_runs import barely_trained

QUICK = ["--steps", "2", "--iterations", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return barely_trained(tmp_path_factory.mktemp("run"), images=640)


def call(run, out, *options):
    return sample.main([str(run), *QUICK, "--out", str(out), *options])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.glob("[0-9]*.png")}


def test_files_are_named_by_number_and_class_at_native_size(trained, tmp_path):
    assert call(trained, tmp_path / "a", "--num", "23") == 0
    names = sorted(contents(tmp_path / "a"))
    assert names == [f"{i:05d}-class-{i % 10}.png" for i in range(23)]
    assert all(read(tmp_path / "a" / n).size == (8, 8) for n in names)
    drawn = read(tmp_path / "a" / "grid.png")
    assert drawn.width >= 640
    assert call(trained, tmp_path / "b", "--num", "5", "--classes", "7", "3") == 0
    assert [n[-5] for n in sorted(contents(tmp_path / "b"))] == ["7", "3", "7", "3", "7"]


@pytest.mark.parametrize(
    "options",
    [
        ["--sampler", "ddim", "--steps", "2"],
        ["--sampler", "ddpm", "--guidance", "3", "--steps", "3", "--iterations", "2", "--reuse", "extrapolated"],
        ["--sampler", "dpm++", "--steps", "3", "--rtol", "0.1", "--reuse", "on", "solver:anderson"],
    ],
)
def test_an_image_depends_on_the_seed_and_its_number_alone(trained, tmp_path, options):
    def images(name, *more):
        assert sample.main([str(trained), "--out", str(tmp_path / name), *more, *options]) == 0
        return contents(tmp_path / name)

    whole = images("whole", "--num", "37")
    assert len(set(whole.values())) == 37
    images("parts", "--num", "7", "--batch", "3")
    assert images("parts", "--num", "37", "--batch", "16") == whole
    other = images("other", "--num", "37", "--seed", "1")
    assert all(other[name] != data for name, data in whole.items())


SHARED = ["--steps", "2", "--rtol", "0.1", "--num", "41", "--npz", "--guidance", "2"]


def test_two_processes_write_what_one_does(forks, trained, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert sample.main([str(trained), *SHARED, "--out", str(one)]) == 0
    assert forks.run("apps.diffusion.sample:main", [str(trained), *SHARED, "--out", str(two)], processes=2) == 0
    assert {p.name for p in two.glob(".effort*")} == {".effort-0.jsonl", ".effort-1.jsonl"}
    names = {p.name for p in one.iterdir() if not p.name.startswith(".")}
    assert len(names) == 41 + 4 and names == {p.name for p in two.iterdir() if not p.name.startswith(".")}
    for name in names - {"effort.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    here, there = (json.loads((folder / "effort.json").read_text()) for folder in (one, two))
    assert there["images"] == here["images"] == 41 and there["per_image"] == here["per_image"]


def test_a_share_of_the_work_is_that_share_of_the_files(trained, tmp_path, capsys):
    for rank in (1, 0):
        assert call(trained, tmp_path, "--num", "40", "--rank", str(rank), "--world", "2", "--chunk", "8") == 0
        numbers = {int(name[:5]) for name in contents(tmp_path)}
        assert numbers == {i for i in range(40) if rank == 0 or i // 8 % 2 == 1}
        assert (tmp_path / "grid.png").exists() == (rank == 0)
    assert "24 of 40" in capsys.readouterr().out
    assert sample.main([str(trained), "--rank", "2", "--world", "2", "--out", str(tmp_path / "no")]) == 2


def test_the_archive_is_what_the_evaluation_suite_reads(trained, tmp_path):
    assert call(trained, tmp_path, "--num", "11", "--npz") == 0
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {"arr_0", "arr_1"}
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [*range(10), 0]
    for i in range(11):
        gray = np.asarray(read(tmp_path / f"{i:05d}-class-{i % 10}.png"))
        np.testing.assert_array_equal(images[i], np.repeat(gray[:, :, None], 3, axis=2))


def test_a_measured_allocation_is_kept_in_the_folder(trained, tmp_path):
    options = ["--steps", "4", "--block-passes", "40", "--allocation", "measured"]
    assert sample.main([str(trained), *options, "--num", "3", "--out", str(tmp_path)]) == 0
    kept = json.loads((tmp_path / "allocation.json").read_text())
    effort = json.loads((tmp_path / "effort.json").read_text())
    assert effort["by_timestep"]["evaluations"] == kept["iterations"] and sum(kept["iterations"]) <= 40 - 4 * 2
    assert len(kept["residuals"]) == 4 and kept["images"] >= 1
    kept["residuals"][0] = [1.0] * len(kept["residuals"][0])  # another measurement: no other images in one folder
    (tmp_path / "allocation.json").write_text(json.dumps(kept))
    assert sample.main([str(trained), *options, "--num", "5", "--out", str(tmp_path)]) == 2
    timed = ["--steps", "2", "--seconds", "5", "--allocation", "measured", "--num", "1", "--chunk", "1"]
    assert sample.main([str(trained), *timed, "--out", str(tmp_path / "timed")]) == 0


def test_parallel_sampling_reports_its_rounds(trained, tmp_path, capsys):
    options = ["--steps", "6", "--num", "4", "--iterations", "3", "--sampler", "ddpm"]
    assert sample.main([str(trained), *options, "--out", str(tmp_path / "one")]) == 0
    assert "rounds" not in capsys.readouterr().out
    parallel = ["--parallel", "picard", "--parallel-rtol", "1e-5"]
    assert sample.main([str(trained), *options, *parallel, "--out", str(tmp_path / "all")]) == 0
    rounds = json.loads((tmp_path / "all" / "effort.json").read_text())["per_image"]["rounds"]
    assert 1 < rounds <= 7 and f"{rounds:.1f} rounds" in capsys.readouterr().out
    one = contents(tmp_path / "one")
    for name in one:
        here, there = (np.asarray(read(tmp_path / folder / name)).astype(int) for folder in ("one", "all"))
        assert np.abs(here - there).max() <= 1


def test_the_report_names_what_was_spent(trained, tmp_path, capsys):
    options = ["--steps", "4", "--block-passes", "50", "--allocation", "increasing"]
    assert sample.main([str(trained), *options, "--num", "3", "--out", str(tmp_path)]) == 0
    assert "50.0" in capsys.readouterr().out
    assert sample.main([str(trained), *options, "--num", "20", "--out", str(tmp_path)]) == 0
    effort = json.loads((tmp_path / "effort.json").read_text())
    model: Any = open_run(trained).model
    counts = (5, 9, 12, 16)  # 1 + 38 (0.1, 0.2, 0.3, 0.4), rounded by largest remainder
    assert effort["by_timestep"]["evaluations"] == list(counts) and effort["by_timestep"]["timestep"][0] == 999
    assert effort["images"] == 20 and effort["per_image"]["block_passes"] == 50
    assert effort["per_image"]["macs"] == sum(model.macs(k) for k in counts)
    assert effort["block_passes_computed"] == 50 * 16 * 3  # a chunk for three images, then two for the others
    residuals = effort["by_timestep"]
    assert all(0 < m <= w for m, w in zip(residuals["residual_mean"], residuals["residual_max"], strict=True))
    assert effort["seconds"] > 0


def test_files_that_exist_are_kept(trained, tmp_path, capsys):
    assert call(trained, tmp_path, "--num", "12") == 0
    first = contents(tmp_path)
    kept, lost = tmp_path / "00003-class-3.png", tmp_path / "00005-class-5.png"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    capsys.readouterr()
    assert call(trained, tmp_path, "--num", "12") == 0
    printed = capsys.readouterr().out
    assert "1 new" in printed and "11 existing" in printed
    assert kept.stat().st_mtime_ns == before and contents(tmp_path) == first


def test_a_record_that_was_cut_off_spoils_no_other(trained, tmp_path):
    assert call(trained, tmp_path, "--num", "16") == 0
    (tmp_path / ".effort-0.jsonl").write_bytes(b'5\n\xff\n{"evaluations": [1]}\n{"images": 16, "blo')
    assert call(trained, tmp_path, "--num", "32") == 0
    assert json.loads((tmp_path / "effort.json").read_text())["images"] == 16


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_or_a_folder_that_cannot_be_is_refused(trained, tmp_path, capsys, device):
    assert call(trained, tmp_path / "out", "--device", device) == 2
    assert f"--device {device}" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("mine")
    assert call(trained, tmp_path / "file" / "sub") == 2
    assert "--out" in capsys.readouterr().err


def test_samples_made_otherwise_are_not_mixed(trained, tmp_path, capsys):
    assert call(trained, tmp_path / "a", "--num", "3") == 0
    before = contents(tmp_path / "a")
    assert call(trained, tmp_path / "a", "--num", "3", "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    assert call(trained, tmp_path / "b", "--num", "3") == 2
    assert os.listdir(tmp_path / "b") == ["letter.txt"]
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--classes", "10"], "--classes"),
        (["--num", "0"], "--num"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1001"], "1001"),
        (["--guidance", "-1"], "guidance"),
        (["--batch", "0"], "--batch"),
        (["--iterations", "3", "--rtol", "0.1"], "--rtol"),
        (["--iterations", "3", "2"], "--iterations"),
        (["--rtol", "0.1", "0.2"], "--rtol"),
        (["--block-passes", "59"], "59"),
        (["--block-passes", "141", "--guidance", "2"], "141"),
        (["--macs", "10"], "MACs"),
        (["--timesteps", "500", "10"], "999"),
        (["--timesteps", "999", "10", "50"], "timesteps"),
        (["--timesteps", "999", "--steps", "3"], "steps"),
        (["--spacing", "leading"], "leading"),
        (["--sampler", "lms"], "lms"),
        (["--eta", "0.5", "--sampler", "ddpm"], "eta"),
        (["--max-evals", "3"], "rtol"),
        (["--rtol", "2"], "rtol"),
        (["--vae", "no/such/vae"], "no/such/vae"),
        (["--parallel", "picard", "--sampler", "unipc"], "--parallel"),
        (["--parallel", "picard", "--steps", "3", "--iterations", "1", "2", "3"], "iterations"),
        (["--steps", "3", "--iterations", "1", "2"], "--iterations"),
        (["--steps", "5000"], "--steps"),
        (["--rtol", "0.1", "--allocation", "increasing"], "allocation"),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(trained, tmp_path, capsys, options, name):
    out = tmp_path / "out"
    try:
        code = sample.main([str(trained), "--out", str(out), *options])
    except SystemExit as end:  # tyro's own way out
        code = end.code
    assert code == 2
    assert name in capsys.readouterr().err
    assert not out.exists()
    assert sample.main([str(tmp_path / "nothing"), "--out", str(out)]) == 2


def test_guidance_changes_images_and_one_does_not(trained, tmp_path):
    for name, scale in (("none", "1.0"), ("strong", "40.0")):
        assert call(trained, tmp_path / name, "--num", "2", "--guidance", scale) == 0
    assert call(trained, tmp_path / "default", "--num", "2") == 0
    none, strong, default = (contents(tmp_path / n) for n in ("none", "strong", "default"))
    assert none == default and none != strong


def test_images_hold_their_pixels():
    x = torch.linspace(-1.2, 1.2, 16).view(1, 4, 4)
    image = to_pil(x)
    assert image.mode == "L" and image.getpixel((0, 0)) == 0 and image.getpixel((3, 3)) == 255
    drawn = grid([image, to_pil(-x), image], columns=2, enlarge=3)
    assert drawn.size == (33, 33)
    pixels = np.asarray(drawn)
    np.testing.assert_array_equal(pixels[3:15:3, 3:15:3], np.asarray(image))
    np.testing.assert_array_equal(pixels[3:15:3, 18:30:3], np.asarray(to_pil(-x)))
    assert to_pil(torch.zeros(3, 2, 2)).mode == "RGB"
    with pytest.raises(ValueError, match="4"):
        to_pil(torch.zeros(4, 2, 2))


@pytest.mark.parametrize("name", ["two\nlines", "", "x" * 255, "\udcff", "\u05e2\u05d1\u05e8", "\0"])
@pytest.mark.parametrize("side", [2, 8])
def test_a_grid_has_any_class_names(name, side):
    page = sample_grid(torch.zeros(4, 3, side, side), [0, 0, 1, 1], ["a", name])
    assert page.width >= 2 * side


def test_columns_are_classes():
    labels = [2, 0, 0, 2, 1, 1, 2, 0]
    assert [labels[i] for i in columns_by_class(labels, rows=9)] == [0, 1, 2] * 2
    assert columns_by_class(labels, rows=1) == [1, 4, 0]


@pytest.mark.parametrize("points", [1, 3, 200])
def test_the_loss_curve_is_drawn_from_any_history(tmp_path, points):
    loss_curve([(100 * k, 1.0 / (k + 1)) for k in range(points)], tmp_path / "loss.png", "loss")
    assert read(tmp_path / "loss.png").width > 500


def test_without_reproducibility_the_network_gets_whole_batches(trained, tmp_path):
    """Equal to rounding, which 8 bits of a value may show; and the folder accepts no other precision afterwards."""
    assert call(trained, tmp_path / "whole", "--num", "21") == 0
    assert call(trained, tmp_path / "free", "--num", "21", "--no-reproducible", "--batch", "7") == 0
    whole, free = contents(tmp_path / "whole"), contents(tmp_path / "free")
    assert whole.keys() == free.keys()
    for name in whole:
        a, b = (np.asarray(read(tmp_path / kind / name)).astype(int) for kind in ("whole", "free"))
        assert np.abs(a - b).max() <= 1
    effort = json.loads((tmp_path / "free" / "effort.json").read_text())
    assert effort["block_passes_computed"] == 21 * effort["per_image"]["block_passes"]
    for change in (["--precision", "bf16"], ["--compile", "eager"], []):
        options = [*change, "--no-reproducible"] if change else []
        assert call(trained, tmp_path / "free", "--num", "22", *options) == 2


def test_bf16_and_compilation_sample_nearly_the_same(trained, tmp_path):
    kinds = {"plain": [], "half": ["--precision", "bf16"], "compiled": ["--compile", "eager", "--device", "auto"]}
    images = {}
    for name, options in kinds.items():
        assert call(trained, tmp_path / name, "--num", "10", *options) == 0
        names = sorted(contents(tmp_path / name))
        images[name] = np.stack([np.asarray(read(tmp_path / name / file)).astype(int) for file in names])
    assert np.abs(images["compiled"] - images["plain"]).max() <= 1
    assert 0 < np.abs(images["half"] - images["plain"]).mean() < 5
