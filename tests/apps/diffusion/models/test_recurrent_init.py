"""The contractive initialization of the fixed-point layer changes a new network, and no loaded weights."""

import pytest
import torch

from apps.diffusion.config.training import ModelConfig
from apps.diffusion.models import build
from implicit.diagnostics import spectral_radius

FC1 = "block_fixed_point_projection_fc1.weight"


def network(factor, kind="fpdm"):
    config = ModelConfig(kind=kind, hidden=16, heads=2, patch=4, recurrent_init=factor)
    return build.network(config, (1, 8, 8), 10, iterations=3, seed=0)


def iteration(model):
    """f, and its argument at the start of a solve."""
    draws = torch.Generator().manual_seed(0)
    z, x, c = (torch.randn(*shape, generator=draws) for shape in ((2, 4, 16), (2, 4, 16), (2, 16)))
    with torch.no_grad():
        injected, modulation = model.prepare(x, c)
    return lambda z: model.iteration(z, injected, modulation), z


def test_only_the_columns_of_z_are_scaled():
    plain, scaled = network(1.0).state_dict(), network(0.25).state_dict()
    assert torch.equal(scaled[FC1][:, :16], 0.25 * plain[FC1][:, :16])
    assert torch.equal(scaled[FC1][:, 16:], plain[FC1][:, 16:])
    assert all(torch.equal(scaled[name], plain[name]) for name in plain if name != FC1)


def test_a_small_factor_makes_the_first_solve_a_strong_contraction():
    radius = {}
    for factor in (1.0, 0.1):
        f, z = iteration(network(factor))
        radius[factor] = float(spectral_radius(f, z).max())
    # df/dz = (...) A, and the block is the identity at the start: the radius is proportional to the factor up to the
    # curvature of gelu
    assert 0 < radius[0.1] < 0.2 * radius[1.0]


def test_zero_begins_without_z_and_its_weights_still_learn():
    model = network(0.0)
    f, z = iteration(model)
    with torch.no_grad():
        assert torch.equal(f(z), f(z + 1))
    f(z).square().sum().backward()
    columns = model.block_fixed_point_projection_fc1.weight.grad[:, :16]
    assert columns.abs().max() > 0


def test_weights_that_are_loaded_are_not_scaled():
    model = network(0.25)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    again = build.rebuild(build.describe(model))
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert build.describe(model) == build.describe(network(1.0))


def test_a_factor_out_of_range_is_refused():
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="recurrent-init"):
            ModelConfig(recurrent_init=wrong)
