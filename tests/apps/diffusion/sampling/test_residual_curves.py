"""Allocation by measured residual curves, and solver states carried from timestep to timestep."""

import itertools
import json

import numpy as np
import pytest
import torch

from apps.diffusion.models import FPDM
from apps.diffusion.sampling.residual_curves import ResidualCurves, measure
from apps.diffusion.sampling.sampler import SamplingPlan, Solve
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.schedulers.timesteps import timesteps
from implicit import Anderson, Picard
from tests.apps.diffusion.helpers.small_models import randomized, sample_by


def curves(table, seconds=(1.0, 0.5)):
    return ResidualCurves(timesteps=tuple(range(len(table)))[::-1], residuals=table, seconds=seconds, images=1)


def network():
    model = randomized(FPDM(input_size=4, in_channels=2, hidden_size=32, num_heads=4, num_classes=10))
    with torch.no_grad():
        model.block_fixed_point_projection_fc2.weight.mul_(0.4)
    return model


def test_the_allocation_has_the_smallest_sum_of_all():
    source = np.random.default_rng(0)
    for _ in range(5):
        table = source.random((4, 5))  # neither convex nor falling
        found = curves(tuple(map(tuple, table)))
        for total in range(4, 21):
            chosen = found.allocate(total)
            best = min(
                sum(table[k, j - 1] for k, j in enumerate(each))
                for each in itertools.product(range(1, 6), repeat=4)
                if sum(each) <= total
            )
            assert sum(chosen) <= total
            assert sum(table[k, j - 1] for k, j in enumerate(chosen)) == pytest.approx(best)


def test_convex_curves_are_allocated_greedily():
    table = tuple(tuple(a**j for j in range(1, 30)) for a in (0.1, 0.5, 0.8))
    chosen = curves(table).allocate(24)
    greedy = [1, 1, 1]
    for _ in range(24 - 3):
        gains = [table[k][j - 1] - table[k][j] for k, j in enumerate(greedy)]
        greedy[int(np.argmax(gains))] += 1
    assert chosen == tuple(greedy) and chosen[0] < chosen[1] < chosen[2]


def test_budgets_are_checked():
    found = curves(((0.5, 0.1), (0.4, 0.2)))
    assert found.allocate(100) == (2, 2)
    assert found.within_seconds(2.0) == 4
    with pytest.raises(ValueError, match="timesteps"):
        found.allocate(1)
    with pytest.raises(ValueError, match="seconds"):
        found.within_seconds(1.2)


def test_curves_are_the_residuals_of_sampling(tmp_path):
    model = network()
    options = {"scheduler": make_scheduler("ddim"), "timesteps": timesteps(3), "chunk": 4}
    plan = SamplingPlan(scheduler=make_scheduler("ddim"), timesteps=timesteps(3), solve=Solve(solver=Picard()))
    found = measure(model, plan, iterations=5, images=4, chunk=4)
    effort = sample_by(model, range(4), [0, 1, 2, 3], seed=0, solve=Solve(iterations=5), **options).effort
    assert np.shape(found.residuals) == (3, 5) and found.timesteps == timesteps(3)
    np.testing.assert_allclose([curve[-1] for curve in found.residuals], effort.residuals.mean(0), rtol=1e-4)
    assert all(a > b for curve in found.residuals for a, b in itertools.pairwise(curve))
    assert min(found.seconds) >= 0
    assert ResidualCurves.from_json(json.loads(json.dumps(vars(found)))) == found


def test_history_is_carried_from_timestep_to_timestep():
    model = network()
    options = {"seed": 0, "scheduler": make_scheduler("ddim"), "timesteps": timesteps(20), "chunk": 4}

    def residual(reuse, solver):
        solve = Solve(iterations=3, solver=solver, reuse=reuse)
        return float(sample_by(model, range(4), [0, 1, 2, 3], solve=solve, **options).effort.residuals[:, 1:].mean())

    value, history = residual(Reuse(), Anderson(3)), residual(Reuse(history=True), Anderson(3))
    assert history < value
    assert residual(Reuse(history=True), Picard()) == residual(Reuse(), Picard())
