"""Memory on fake tensors beside the storages of real steps, and the batch that fits a card."""

import pytest

from benchmarks.diffusion import largest_batch, memory, memory_tables

SMALL = memory.Size(hidden=64, heads=4, depth=3, side=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        largest_batch.Case("DiT", 2),
        largest_batch.Case("DiT", 2, checkpointed=True),
        largest_batch.Case("FPDM", 2, "S-JFB (6, 6), near the expected draw"),
        largest_batch.Case("FPDM", 2, "S-JFB (0, 1)", precision="bf16"),
        largest_batch.Case("FPDM", 2, "IFT"),
        largest_batch.Case("FPDM", 2, "Reversible"),
        largest_batch.Case("diffusers' DiT", 2),
        largest_batch.Case("diffusers' DiT", 2, checkpointed=True),
    ],
    ids=lambda case: ", ".join(filter(None, case.row)),
)
def test_fake_tensors_predict_the_peak_of_a_real_step(case):
    assert memory.fake_peak(case, SMALL) == pytest.approx(memory.real_peak(case, SMALL), rel=0.05)


def test_more_tracked_iterations_take_more_memory_than_fewer():
    few, many = (
        memory.fake_peak(largest_batch.Case("FPDM", 16, name), memory.Size(hidden=64, heads=4, depth=3, side=16))
        for name in ("S-JFB (0, 1)", "S-JFB (12, 12), the worst draw")
    )
    assert many > 1.5 * few


def test_the_largest_batch_is_where_the_line_of_the_two_largest_batches_meets_the_capacity():
    assert largest_batch.largest_batch({1: 40, 8: 10 + 8 * 2, 64: 10 + 64 * 2}, 50) == 20
    assert largest_batch.largest_batch({8: 26, 64: 138}, 5) == 0


def test_a_card_of_the_predicted_size_takes_the_largest_batch_and_no_larger():
    size = memory.Size(hidden=64, heads=4, depth=3, side=16)

    def peak(batch):
        return memory.fake_peak(largest_batch.Case("DiT", batch), size)

    capacity = peak(24) + 1000
    found = largest_batch.largest_batch({8: peak(8), 16: peak(16)}, capacity)
    assert peak(found) <= capacity < peak(found + 1)


def test_the_search_finds_the_largest_batch_of_a_convex_peak():
    calls = []

    def peak(batch):
        calls.append(batch)
        return max(100 + batch, 40 + 3 * batch, 10 * batch - 500)

    known = {8: peak(8), 64: peak(64)}
    for capacity in (90, 105, 120, 200, 232, 233, 400, 1000):
        calls.clear()
        found, shown = largest_batch.searched(known, capacity, peak)
        assert shown.keys() == {found, found + 1}
        assert (found == 0 or peak(found) <= capacity) and capacity < peak(found + 1)
        assert len(calls) < 12
    row = ("FPDM", "JFB", "checkpointed", "fp32")
    line = {8: 10, 64: 64 * 10**9}
    assert memory_tables.fits(row, line, "16 GB", []).startswith("at least")
    assert memory_tables.fits(row, line, "80 GB", []).startswith("at most")
    case = {"network": "FPDM", "batch": 0, "estimator": "JFB", "checkpointed": True, "precision": "fp32"}
    assert memory_tables.fits(row, line, "80 GB", [{"case": case, "largest": {"80 GB": {"batch": 70}}}]) == "70"


def test_every_estimator_has_a_row_and_the_file_is_resumed(tmp_path):
    rows = {case.row for case in memory.cases((8,))}
    assert len(rows) == 4 * (2 + len(memory.ESTIMATORS))
    calls: list[largest_batch.Case] = []

    def peak(case):
        calls.append(case)
        return {"peak bytes": 7}

    result = {"peaks": []}
    for _ in range(2):
        memory.measure(result, tmp_path / "m.json", "peaks", memory.cases((1, 2)), peak)
    assert len(calls) == len(result["peaks"]) == 2 * len(rows)
    assert memory.read_result(tmp_path / "m.json") == result
