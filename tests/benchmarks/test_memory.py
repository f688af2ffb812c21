"""Memory on fake tensors beside the storages of real steps, and the batch that fits a card."""

import pytest

from benchmarks.diffusion import memory

SMALL = memory.Size(hidden=64, heads=4, depth=3, side=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        memory.Case("DiT", 2),
        memory.Case("DiT", 2, checkpointed=True),
        memory.Case("FPDM", 2, "S-JFB (6, 6), near the expected draw"),
        memory.Case("FPDM", 2, "S-JFB (0, 1)", precision="bf16"),
        memory.Case("diffusers' DiT", 2),
    ],
    ids=lambda case: ", ".join(filter(None, case.row)),
)
def test_fake_tensors_predict_the_peak_of_a_real_step(case):
    assert memory.fake_peak(case, SMALL) == pytest.approx(memory.real_peak(case, SMALL), rel=0.05)


def test_more_tracked_iterations_take_more_memory_than_fewer():
    few, many = (
        memory.fake_peak(memory.Case("FPDM", 16, name), memory.Size(hidden=64, heads=4, depth=3, side=16))
        for name in ("S-JFB (0, 1)", "S-JFB (12, 12), the worst draw")
    )
    assert many > 1.5 * few


def test_the_largest_batch_is_where_the_line_meets_the_capacity():
    assert memory.largest_batch({8: 10 + 8 * 2, 64: 10 + 64 * 2}, 50) == 20
    assert memory.largest_batch({8: 26, 64: 138}, 5) == 0
