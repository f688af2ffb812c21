"""Studies: cells are trained once, kept, and never repeated."""

import json
from dataclasses import replace

import pytest

from benchmarks.experiments import common as base
from benchmarks.experiments import run as study


@pytest.mark.parametrize("name", study.NAMES)
def test_cells_are_distinguished_by_name(name):
    cells = study.study(name).cells("tiny")
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert len({way.name for way in cell.ways}) == len(cell.ways)


@pytest.fixture
def trained(monkeypatch):
    """How many networks were trained."""
    counts = []
    train = base.train
    monkeypatch.setattr(base, "train", lambda config: counts.append(config) or train(config))
    return counts


def run(tmp_path, name, *seeds):
    folders = ["--results", str(tmp_path), "--networks", str(tmp_path / "networks")]
    study.main([name, "--scale", "tiny", *folders, "--seeds", *seeds])
    return json.loads((tmp_path / f"experiment_{name}.json").read_text())


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, trained):
    layers = study.study("outer-blocks")
    monkeypatch.setattr(layers, "PAIRS", ((1, 1), (2, 1)))
    found = run(tmp_path, "outer-blocks", "0")
    assert list(found["cells"]) == ["pre=1 post=1, seed 0", "pre=2 post=1, seed 0"]
    first = found["cells"]["pre=1 post=1, seed 0"]
    assert first["samples"]["20 x 10"]["block_passes"] == 20 * (2 + 10)
    assert first["training"]["steps"] > 0 and found["real"]["held out"]["accuracy"] > 0.9
    again = run(tmp_path, "outer-blocks", "0", "1")["cells"]
    assert [c.seed for c in trained] == [0, 0, 1, 1]
    assert len(again) == 4 and again["pre=1 post=1, seed 0"] == first


def test_a_new_way_scores_the_network_that_was_kept(tmp_path, monkeypatch, trained):
    layers = study.study("outer-blocks")
    monkeypatch.setattr(layers, "PAIRS", ((1, 1),))
    first = run(tmp_path, "outer-blocks", "0")["cells"]["pre=1 post=1, seed 0"]
    twenty = layers.cells("tiny")[0]
    ways = (base.Way("5 x 2", 5, base.fixed(2)), *twenty.ways)
    monkeypatch.setattr(layers, "cells", lambda scale: [replace(twenty, ways=ways)])
    again = run(tmp_path, "outer-blocks", "0")["cells"]["pre=1 post=1, seed 0"]
    assert len(trained) == 1 and again["training"] == first["training"]
    assert again["samples"]["20 x 10"] == first["samples"]["20 x 10"]
    assert again["samples"]["5 x 2"]["block_passes"] == 5 * (2 + 2)
    kept = base.kept(tmp_path / "networks" / "tiny" / "outer-blocks" / "pre=1 post=1, seed 0.pt", twenty.config)
    assert kept is not None
    rescored = base.score(kept[0], twenty.config, twenty.ways[0], 20)
    assert rescored["frechet"] == pytest.approx(first["samples"]["20 x 10"]["frechet"], rel=1e-5)
    other = replace(twenty.config, seed=1)
    assert base.kept(tmp_path / "networks" / "tiny" / "outer-blocks" / "pre=1 post=1, seed 0.pt", other) is None
