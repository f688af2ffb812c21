"""One evaluation route: a metric that is added shows in the command's report and in its table."""

import pytest
import torch
from PIL import Image

from apps.diffusion import evaluate as command
from apps.diffusion.evaluation import scores
from apps.diffusion.evaluation.feature_extractors import TrainedFeatures
from apps.diffusion.evaluation.image_sources import open_source


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
    extractor = TrainedFeatures.of(torch.cat(list(source.batches())), epochs=1)
    assert scores.evaluate(source, scores.measure(source, extractor), extractor)["mine"] == 42
