"""Counts of work: two ways to the same number, kernels over those of a bare loop, and the roofline."""

from dataclasses import replace

import pytest
import torch

from benchmarks.diffusion import compute
from benchmarks.diffusion.steps import Scale

SMALL = Scale(hidden=64, heads=4, side=8, depth=3, batch=2)


def test_counted_multiply_accumulates_are_those_of_the_models_formulas():
    rows = compute.counted(replace(SMALL, batch=3))
    assert len(rows) == 12
    for row in rows:
        assert row["MACs"] == pytest.approx(row["MACs by formula"], rel=0.02), row["work"]


@pytest.mark.parametrize(("free", "tracked"), [(1, 0), (9, 0), (3, 1), (6, 7), (2, 3)])
def test_a_solve_adds_the_stated_kernels_to_a_bare_loop_and_the_host_reads_no_value(free, tracked):
    """On the meta device a read raises."""
    ours, loop = compute.kernels_over_a_bare_loop(SMALL, free, tracked)
    if tracked:
        constant, each_free, each_tracked = compute.TRAINING
        assert ours - loop == constant + each_free * free + each_tracked * tracked
    else:
        constant, each_free = compute.SOLVE
        assert ours - loop == constant + each_free * free


def test_a_read_by_the_host_does_not_pass_unseen():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(3, device="meta").sum().item()
    with pytest.raises(NotImplementedError):
        torch.zeros(3, device="meta").cpu()


def test_bytes_of_a_known_operator_and_the_roofline():
    x, w = (torch.empty(*shape, device="meta") for shape in ((4, 8), (8, 16)))
    with compute.Traffic() as traffic:
        (x @ w).view(-1)
    assert traffic.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    card = compute.Card("", half=4e9, single=1e9, bandwidth=1e9, source="")
    row = {"precision": "fp32", "MACs": 500_000_000, "bytes": 10}
    assert compute.roofline(card, row) == 1.0
    assert compute.roofline(card, {**row, "precision": "bf16"}) == 0.25
    assert compute.roofline(card, {**row, "bytes": 3_000_000_000}) == 3.0


def test_times_are_those_of_every_work_and_are_resumed():
    saved: list[dict] = []
    compute.timed(2, SMALL, saved.append, {})
    assert {row["work"] for row in saved[-1]["cpu"]} == {*compute.works(SMALL), compute.BARE}
    assert len(saved) == 3 and saved[-1]["beside a bare loop"]["median"] > 0
    compute.timed(2, SMALL, saved.append, saved[1])
    assert len(saved) == 4 and saved[3]["cpu"][:5] == saved[1]["cpu"]
    assert saved[3]["beside a bare loop"] == saved[1]["beside a bare loop"]
