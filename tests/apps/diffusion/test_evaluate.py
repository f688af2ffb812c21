"""The evaluation command: images from all sources, statistics with their provenance, and errors."""

import json
import os
import sys

import numpy as np
import pytest
import torch

from apps.diffusion import evaluate
from apps.diffusion.data import digits
from apps.diffusion.evaluation import feature_extractors as features
from apps.diffusion.evaluation import feature_statistics as reference
from apps.diffusion.evaluation import image_sources as sources
from apps.diffusion.evaluation.metrics import Gaussian, frechet_distance
from apps.diffusion.evaluation.scores import compare
from apps.diffusion.files.images import to_pil
from tests.apps.diffusion.helpers import image_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The held-out digits as samples, and the same as an .npz file."""
    root = tmp_path_factory.mktemp("samples")
    held_out = digits("held-out")
    for i, (x, y) in enumerate(zip(held_out.x, held_out.y.tolist(), strict=True)):
        to_pil(x).save(root / f"{i:05d}-class-{y}.png")
    (root / "settings.json").write_text("{}")
    to_pil(held_out.x[0]).resize((64, 64)).save(root / "grid.png")
    gray = ((held_out.x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(root.parent / "held-out.npz", arr_0=gray.repeat(3, axis=3), arr_1=held_out.y.numpy())
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "implicit" / "statistics"


@pytest.fixture(scope="module")
def scorer():
    return features.digit_features(epochs=4)


@pytest.fixture
def quick(scorer, monkeypatch):
    """The command's scorer is this one, soon trained."""
    monkeypatch.setattr(features, "digit_features", lambda: scorer)
    return scorer


class Pixels:
    """Features that are the pixels, by a known matrix; verdicts by their sign."""

    name, digest = "pixels", "1"

    def __call__(self, images):
        x = images.float().flatten(1) / 127.5 - 1
        return features.Extracted(x, x[:, :3], 10 * x[:, :2])


def source(x, name="here", labels=None):
    return sources.Source(name, len(x), labels, f"{name} {float(x.double().sum())}", lambda: iter(x.split(50)))


def test_samples_are_scored_against_real_digits(folder, quick, capsys):
    """As a folder, as an archive, and as the data themselves: the same images, the same scores."""
    assert evaluate.main([str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    generated, real = report["generated"], report["real_held_out"]
    assert generated == real and generated["images"] == 300
    assert generated["accuracy"] > 0.9 and generated["frechet"] < 0.3 and generated["sfid"] < 2
    assert 0.8 < generated["precision"] <= 1 and 0.8 < generated["recall"] <= 1
    assert 4 < generated["inception_score"] <= 10 and abs(generated["kid"]) < 0.2
    assert report["reference"]["data"]["images"] == 1497 and len(report["reference"]["features"]["sha256"]) == 64
    assert evaluate.main([str(folder.parent / "held-out.npz"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["generated"]
    assert all(again[name] == pytest.approx(value, rel=1e-4) for name, value in generated.items())


def test_a_table_of_spoilt_samples(folder, quick, capsys, tmp_path):
    held_out = digits("held-out")
    noise = torch.randn(held_out.x.shape, generator=torch.Generator().manual_seed(0))
    for i, x in enumerate(held_out.x + 0.7 * noise):
        to_pil(x).save(tmp_path / f"{i:05d}.png")  # without classes
    assert evaluate.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("1497", "digits (train)"))
    row = next(line for line in printed.splitlines() if line.startswith("Fréchet"))
    assert float(row.split()[-2]) > 3 * float(row.split()[-1])
    assert next(line for line in printed.splitlines() if line.startswith("right")).split()[2] == "-"


def test_statistics_are_kept_by_the_checksum_of_data_and_network(folder, quick, cache, monkeypatch):
    there = sources.open_source(str(folder))
    first = reference.cached(there, quick)
    (file,) = cache.iterdir()
    monkeypatch.setattr(reference, "measure", lambda *a: pytest.fail("measured again"))
    again = reference.cached(sources.open_source(str(folder)), quick)
    assert again.provenance == first.provenance and again.features is not None and again.spatial is not None
    assert torch.equal(again.pooled.cov, first.pooled.cov)
    assert first.features is not None and torch.equal(again.features, first.features)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    image_files.truncate(file)
    assert torch.equal(reference.cached(there, quick).pooled.mean, first.pooled.mean)
    reference.cached(there, Pixels())
    reference.cached(sources.of_named("digits", "held-out", 50), quick)
    assert len(list(cache.iterdir())) == 3


def test_an_image_that_changes_is_other_data(tmp_path):
    image_files.tree(tmp_path)
    first = sources.open_source(str(tmp_path), size=16)
    assert sources.open_source(str(tmp_path), size=16).digest == first.digest and first.count == 15
    assert [tuple(b.shape) for b in first.batches()] == [(15, 3, 16, 16)]
    assert first.labels is not None and first.labels.bincount().tolist() == [5, 5, 5]  # one class a subfolder
    assert sources.open_source(str(tmp_path), size=8).digest != first.digest
    image_files.save(tmp_path / "cat" / "0.png", image_files.random_image(123))
    assert sources.open_source(str(tmp_path), size=16).digest != first.digest


def test_moments_are_those_of_all_rows():
    rows = 1e3 + torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 0.1, 5.0])
    moments = reference.Moments()
    for part in rows.split(13):
        moments.add(part)
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean.numpy(), rows.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9)


def test_known_gaussians_have_their_known_distance():
    """Features drawn from two normal distributions in one corner of the pixels' range, 8 bits fine."""
    g = torch.Generator().manual_seed(0)
    means, stds = torch.tensor([[0.0, 0.1, 0.0, -0.2], [0.3, 0.0, 0.1, 0.2]]), torch.tensor([0.1, 0.25])
    x = [m + s * torch.randn(5_000, 4, generator=g) for m, s in zip(means, stds, strict=True)]
    bytes_ = [((a.clamp(-1, 1) + 1) * 127.5).round().byte().view(-1, 1, 2, 2) for a in x]
    a, b = (reference.measure(source(v, str(i)), Pixels(), kept=500) for i, v in enumerate(bytes_))
    expected = float(((means[0] - means[1]) ** 2).sum()) + 4 * 0.15**2
    assert frechet_distance(a.pooled, b.pooled) == pytest.approx(expected, rel=0.05)
    scores = compare(source(bytes_[0]), a, b, Pixels())
    assert scores["frechet"] == frechet_distance(a.pooled, b.pooled) and scores["images"] == 5_000
    assert scores["sfid"] == pytest.approx(0.09 + 0.01 + 0.01 + 3 * 0.15**2, rel=0.05)
    assert a.features is not None and a.features.shape == (500, 4) and scores["accuracy"] is None


def test_saved_statistics_and_published_ones(folder, quick, tmp_path, capsys):
    kept = tmp_path / "real.safetensors"
    assert evaluate.main([str(folder), "--reference", "digits", "--save", str(kept), "--json"]) == 0
    direct = json.loads(capsys.readouterr().out)
    assert evaluate.main([str(folder), "--reference", str(kept), "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded == {name: direct[name] for name in ("generated", "reference")}
    (tmp_path / "mine.png").write_bytes(b"an image of the user")
    for flag, file in (("--save", kept), ("--neighbors", tmp_path / "mine.png")):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([str(folder), flag, str(file)])
    assert (tmp_path / "mine.png").read_bytes() == b"an image of the user"
    held = reference.load(kept, quick)
    published = tmp_path / "published.npz"
    np.savez(published, mu=held.pooled.mean.numpy(), sigma=held.pooled.cov.numpy(), arr_0=np.zeros((2, 8, 8, 3), "u1"))
    capsys.readouterr()
    assert evaluate.main([str(folder), "--reference", str(published), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["generated"]
    assert scores["frechet"] == pytest.approx(direct["generated"]["frechet"]) and scores["kid"] is None
    changed = reference.Statistics(
        {**held.provenance, "features": {"name": "digits", "sha256": "0"}}, held.pooled, None, None
    )
    reference.save(changed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="--features"):
        reference.load(tmp_path / "other.safetensors", quick)


def arrange(what, folder, root) -> list[str]:
    """Arguments that the command must refuse."""
    if what == "nowhere":
        return [str(root / "nowhere")]
    if what in ("empty", "one"):
        (root / "a").mkdir()
        if what == "one":
            to_pil(torch.zeros(1, 8, 8)).save(root / "a" / "00000.png")
        return [str(root / "a")]
    if what == "sizes":
        image_files.tree(root / "a")
        return [str(root / "a")]
    if what == "large":
        image_files.tree(root / "a")
        return [str(root / "a"), "--size", "16"]
    if what == "cut":
        for i in range(3):
            to_pil(torch.zeros(1, 8, 8)).save(root / f"0000{i}.png")
        image_files.truncate(root / "00001.png", 0.6)
        return [str(root)]
    if what == "classes":
        for i in range(3):
            to_pil(torch.zeros(1, 8, 8)).save(root / f"0000{i}-class-11.png")
        return [str(root)]
    if what == "latents":
        (root / "index.json").write_text("{}")
        return [str(folder), "--reference", str(root)]
    if what == "archive":
        np.savez(root / "a.npz", arr_0=np.zeros((3, 8, 8)))
        return [str(root / "a.npz")]
    if what in ("column", "negative", "halves"):
        found = {"column": np.zeros((3, 1), "i8"), "negative": np.array([0, -1, 2]), "halves": np.full(3, 0.5)}
        np.savez(root / "a.npz", arr_0=np.zeros((3, 8, 8, 1), "u1"), arr_1=found[what])
        return [str(root / "a.npz")]
    if what in ("narrow", "nan", "spatial"):
        sigma = {"narrow": np.eye(5), "nan": np.full((32, 32), np.nan), "spatial": np.eye(32)}[what]
        np.savez(root / "a.npz", mu=np.zeros(32), sigma=sigma, mu_s=np.zeros(7), sigma_s=np.zeros(7))
        return [str(folder), "--reference", str(root / "a.npz")]
    if what in ("negative variance", "asymmetric", "complex"):
        sigma = {"negative variance": -np.eye(32), "asymmetric": np.tri(32), "complex": np.eye(32) * 1j}[what]
        np.savez(root / "a.npz", mu=np.zeros(32), sigma=sigma)
        return [str(folder), "--reference", str(root / "a.npz")]
    if what == "huge class":
        to_pil(torch.zeros(1, 8, 8)).save(root / f"00000-class-{9**30}.png")
        return [str(root)]
    if what == "pickle":
        np.savez(root / "a.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2))
        return [str(folder), "--reference", str(root / "a.npz")]
    if what == "statistics":
        (root / "a.safetensors").write_bytes(b"not tensors")
        return [str(folder), "--reference", str(root / "a.safetensors")]
    if what == "features":
        np.savez(root / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        return [str(folder), "--reference", str(root / "a.npz")]
    return [str(folder), "--features", "inception"]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("nowhere", "/nowhere"),
        ("empty", "/a"),
        ("one", "1"),
        ("sizes", "--size"),
        ("large", "--features digits"),
        ("cut", "00001.png"),
        ("classes", "--features"),
        ("latents", "latents"),
        ("archive", "arr_0"),
        ("column", "(3, 1)"),
        ("negative", "arr_1"),
        ("halves", "float64"),
        ("narrow", "(5, 5)"),
        ("nan", "a.npz"),
        ("negative variance", "a.npz"),
        ("asymmetric", "a.npz"),
        ("complex", "complex128"),
        ("huge class", f"{9**30}"),
        ("spatial", "(7,)"),
        ("pickle", "a.npz"),
        ("statistics", "a.safetensors"),
        ("features", "2048"),
        ("inception", "[inception]"),
    ],
)
def test_what_cannot_be_scored_is_refused(what, name, folder, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    assert evaluate.main(arrange(what, folder, tmp_path)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("evaluate: ") and name in printed


@pytest.mark.parametrize("place", [0, 30, 3000, -300, None])
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_archives_are_refused_by_name(write, place, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    write(tmp_path / "a.npz", arr_0=pixels, arr_1=np.arange(70))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    if place is None:
        content = content[:2000]
    else:
        content[place] ^= 4
    (tmp_path / "a.npz").write_bytes(content)
    assert not reference.is_statistics(tmp_path / "a.npz")
    try:
        assert (
            torch.cat(list(sources.of_npz(tmp_path / "a.npz").batches())).numpy() == pixels.transpose(0, 3, 1, 2)
        ).all()
    except ValueError as error:
        assert "a.npz" in str(error)


def test_statistics_of_another_checksum_are_measured_again(tmp_path):
    x = torch.randint(256, (9, 1, 2, 2), dtype=torch.uint8)
    first = reference.cached(source(x), Pixels(), tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        reference.load(file, Pixels())
    assert torch.equal(reference.cached(source(x), Pixels(), tmp_path).pooled.cov, first.pooled.cov)


def test_a_link_to_nothing_and_a_named_pipe_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png"):
        sources.open_source(str(tmp_path))
    (tmp_path / "pipe.png").unlink()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png"):
        sources.open_source(str(tmp_path))


def test_what_cannot_be_kept_is_refused_early_or_a_warning(folder, quick, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(folder), "--save", str(tmp_path / "nowhere" / "a.safetensors")])
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.warns(UserWarning, match="statistics"):
        assert evaluate.main([str(folder), "--cache", str(tmp_path / "file" / "x")]) == 0
    assert "1497" in capsys.readouterr().out


def test_images_that_are_left_out_are_counted(folder, quick, tmp_path, capsys):
    for i in range(5):
        to_pil(torch.zeros(1, 8, 8)).save(tmp_path / f"{i:05d}.png")
    assert evaluate.main([str(tmp_path), "--json"]) == 0
    assert not capsys.readouterr().err
    for i in range(20):
        to_pil(torch.zeros(1, 8, 8)).save(tmp_path / f"mine-{i}.png")
    assert evaluate.main([str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["generated"]["images"] == 5
    assert all(name in printed.err for name in ("5", "20", "mine-0.png"))
    for i in range(5):
        (tmp_path / f"{i:05d}.png").unlink()
    (tmp_path / "notes.heic").write_text("?")
    assert evaluate.main([str(tmp_path), "--json"]) == 0
    assert "1 with .heic" in capsys.readouterr().err


def test_equal_gaussians_of_few_images():
    x = torch.randint(256, (9, 1, 2, 2), dtype=torch.uint8)
    same = reference.measure(source(x), Pixels())
    scores = compare(source(x), same, same, Pixels())
    assert scores["frechet"] == pytest.approx(0, abs=1e-9) and (scores["precision"], scores["recall"]) == (1, 1)
    few = reference.measure(source(x[:3]), Pixels())
    assert compare(source(x[:3]), few, same, Pixels())["precision"] is None
    assert isinstance(same.pooled, Gaussian)


def test_batch_and_precision_of_the_extractor(folder, quick, tmp_path, capsys):
    """Another batch changes rounding alone; bf16 has features of its own name, near the others."""

    def scores(*options):
        assert evaluate.main([str(folder), "--json", "--reference", "digits:held-out", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["generated"], found["reference"]["features"]["name"]

    plain, name = scores()
    batched, _ = scores("--batch", "7", "--device", "auto")
    half, other = scores("--precision", "bf16")
    assert (name, other) == ("digits", "digits-bf16")
    assert batched["frechet"] == pytest.approx(plain["frechet"], abs=1e-3)
    assert abs(half["accuracy"] - plain["accuracy"]) < 0.03 and half["frechet"] < 0.1
    for wrong in (["--batch", "0"], ["--compile", "aot_eager"], ["--device", "bogus"], ["--weights", "x.pth"]):
        with pytest.raises(SystemExit, match="2"):
            scores(*wrong)
