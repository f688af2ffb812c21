"""Budgets of iterations are spent exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.diffusion.models import FPDM
from apps.diffusion.sampling.iteration_budget import Shape, spread, within_block_passes, within_macs

SHAPES: list[Shape] = ["constant", "increasing", "decreasing"]


def xl():
    with torch.device("meta"):
        return FPDM(input_size=32)


@given(st.integers(1, 60), st.integers(0, 2000), st.sampled_from(SHAPES))
def test_the_sum_is_the_total_each_gets_one_and_the_shape_is_kept(steps, spare, shape):
    shares = spread(steps + spare, steps, shape)
    assert sum(shares) == steps + spare and min(shares) >= 1 and len(shares) == steps
    if shape == "constant":
        assert max(shares) - min(shares) <= 1
    if shape == "increasing":
        assert list(shares) == sorted(shares)
        assert shares == spread(steps + spare, steps, "decreasing")[::-1]


def test_increasing_is_proportional():
    assert spread(4 + 100, 4, "increasing") == (11, 21, 31, 41)


@pytest.mark.parametrize("budget", [140, 280, 560])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_passes_are_spent_exactly(budget, shape):
    model = xl()
    iterations = within_block_passes(model, budget, 20, shape)
    assert sum(model.block_passes(k) for k in iterations) == budget
    guided = within_block_passes(model, budget, 20, shape, guided=True)
    assert 2 * sum(model.block_passes(k) for k in guided) == budget


@pytest.mark.parametrize("shape", SHAPES)
def test_macs_are_spent_to_the_last_whole_iteration(shape):
    model = xl()
    slope = model.macs(2) - model.macs(1)
    for rows in (1, 2):
        budget = 5 * 118.6e9
        iterations = within_macs(model, budget, 10, shape, guided=rows == 2)
        spent = rows * sum(model.macs(k) for k in iterations)
        assert spent <= budget < spent + rows * slope


def test_impossible_budgets_are_refused_with_what_is_needed():
    model = xl()
    with pytest.raises(ValueError, match="60"):
        within_block_passes(model, 59, 20)
    assert within_block_passes(model, 60, 20) == (1,) * 20
    with pytest.raises(ValueError, match="MACs"):
        within_macs(model, 20 * model.macs(1) - 1, 20)
    assert within_macs(model, 20 * model.macs(1), 20) == (1,) * 20
    with pytest.raises(ValueError, match="5"):
        spread(4, 5)
    with pytest.raises(ValueError, match="shape"):
        spread(10, 5, "bumpy")
