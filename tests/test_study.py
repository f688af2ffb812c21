"""Studies: cells are trained once, kept, and never repeated."""

import json

import pytest

from benchmarks import study
from benchmarks.studies import base


@pytest.mark.parametrize("name", study.NAMES)
def test_cells_are_told_apart_by_name(name):
    cells = study.study(name).cells("tiny")
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert len({way.name for way in cell.ways}) == len(cell.ways)


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    layers = study.study("layers")
    monkeypatch.setattr(layers, "PAIRS", ((1, 1), (2, 1)))
    ran = []
    run = base.run
    monkeypatch.setattr(base, "run", lambda cell, seed, count: ran.append(cell.name) or run(cell, seed, count))
    arguments = ["layers", "--scale", "tiny", "--results", str(tmp_path), "--seeds", "0"]
    study.main(arguments)
    found = json.loads((tmp_path / "study_layers.json").read_text())
    assert list(found["cells"]) == ["pre=1 post=1, seed 0", "pre=2 post=1, seed 0"]
    first = found["cells"]["pre=1 post=1, seed 0"]
    assert first["samples"]["20 x 10"]["block_passes"] == 20 * (2 + 10)
    assert first["training"]["steps"] > 0 and found["real"]["held out"]["accuracy"] > 0.9
    study.main([*arguments, "1"])
    assert ran == ["pre=1 post=1", "pre=2 post=1"] * 2
    again = json.loads((tmp_path / "study_layers.json").read_text())["cells"]
    assert len(again) == 4 and again["pre=1 post=1, seed 0"] == first
