"""A metric that is added to `METRICS` appears in the report and in the table of the evaluation command."""

import pytest
import torch
from PIL import Image

from apps.diffusion import evaluate as command
from apps.diffusion.evaluation import scores
from apps.diffusion.evaluation.feature_extractors import reference_features
from apps.diffusion.evaluation.image_sources import of_folder, open_source


def write(folder, n, seed, shift=0):
    """Colored images of a bright square whose position is random; `shift` moves its color."""
    folder.mkdir()
    draws = torch.Generator().manual_seed(seed)
    for i in range(n):
        x = torch.randint(0, 40, (12, 12, 3), generator=draws, dtype=torch.uint8)
        r, c = torch.randint(0, 6, (2,), generator=draws).tolist()
        x[r : r + 6, c : c + 6, shift] = 220
        Image.fromarray(x.numpy()).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / name, 64, seed, shift) for name, seed, shift in (("a", 0, 0), ("b", 1, 0), ("c", 2, 1))]


def test_own_images_are_scored_without_a_download(folders, tmp_path):
    real, like, unlike = folders
    found = [
        command.run(command.Request(samples=str(f), reference=str(real), features="trained", cache=tmp_path / "cache"))[
            "generated"
        ]["frechet"]
        for f in (like, unlike)
    ]
    assert 0 <= found[0] < found[1] / 3


def test_a_new_metric_shows_in_the_report_and_in_the_table(folders, tmp_path, monkeypatch, capsys):
    metric = scores.Metric("mean feature", "{:.2f}", lambda c: float(c.found.pooled.mean.mean()) * 0 + 42)
    monkeypatch.setitem(scores.METRICS, "mine", metric)
    argv = [
        str(folders[0]),
        "--reference",
        str(folders[1]),
        "--features",
        "trained",
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert command.main(argv) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "mean feature" in line] == [
        ["mean", "feature", "42.00"]
    ]
    source = open_source(str(folders[0]))
    extractor = reference_features(torch.cat(list(source.batches())), epochs=1)
    assert scores.evaluate(source, scores.measure(source, extractor), extractor)["mine"] == 42


def test_subfolders_of_a_folder_are_its_classes(tmp_path):
    """Numbered as in training, so that a classifier of the reference measures whether samples show their class."""
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(3 + k):
            Image.new("L", (4, 4), 100 * k).save(tmp_path / name / f"{i}.png")
    source = of_folder(tmp_path)
    assert source.labels is not None and source.labels.tolist() == [0] * 3 + [1] * 4
    assert [int(x.max()) // 100 for x in torch.cat(list(source.batches()))] == source.labels.tolist()
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    assert of_folder(tmp_path).labels is None and of_folder(tmp_path).count == 8


def test_samples_are_in_the_order_of_their_numbers(tmp_path):
    """Also from number 100000 on, whose names are longer."""
    numbers = (7, 99_999, 100_000, 100_001)
    for i, number in enumerate(numbers):
        Image.new("L", (4, 4), i).save(tmp_path / f"{number:05d}-class-{number % 4}.png")
    source = of_folder(tmp_path)
    assert source.labels is not None and source.labels.tolist() == [number % 4 for number in numbers]
    assert torch.cat(list(source.batches()))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
