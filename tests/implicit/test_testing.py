"""The test problems have the stated solutions, spectra and counters."""

import pytest
import torch

from implicit.testing import jacobian, problem, problems

NAMES = [
    *("linear 0.5", "linear 0.9", "linear 0.99", "linear 0.999", "non-normal", "tanh layers", "repelling"),
    *("one hard of 16", "Bratu", "H 0.5", "H 0.99", "H 1-1e-6", "adaLN block", "cosine"),
]


def test_the_fourteen_problems():
    assert [p.name for p in problems()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_is_exact(name):
    p = problem(name)
    assert float(p.residual(p.solution).max()) < 1e-14
    step = torch.linalg.solve(
        torch.eye(p.z0.shape[1], dtype=torch.float64) - jacobian(p.map, p.solution, p.args),
        p.map(p.solution, *p.args) - p.solution,
    )
    assert float((step.norm(dim=1) / p.solution.norm(dim=1)).max()) < 1e-12  # an estimate of the error itself


@pytest.mark.parametrize("name", ["tanh layers", "adaLN block", "Bratu", "H 0.99"])
def test_the_spectral_radius_is_the_rate_of_plain_iteration(name):
    p = problem(name)
    v = torch.randn(p.z0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = torch.zeros(len(v), dtype=v.dtype)
    for i in range(300):  # power iteration by finite differences; growth over the last hundred
        v = (p.map(p.solution + 1e-7 * v, *p.args) - p.map(p.solution - 1e-7 * v, *p.args)) / 2e-7
        if i >= 200:
            logs = logs + v.norm(dim=1).log()
        v = v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close((logs / 100).exp(), p.radius, rtol=5e-2, atol=0)


@pytest.mark.parametrize(("name", "radius"), [("linear 0.5", 0.5), ("linear 0.999", 0.999), ("non-normal", 0.5)])
def test_linear_maps_have_the_radius_in_their_name(name, radius):
    assert float(problem(name).radius.max()) == pytest.approx(radius, abs=0.02)


def test_the_repelling_one_repels():
    assert 3.5 < float(problem("repelling").radius.min())


def test_calls_and_samples_are_counted_and_samples_are_independent():
    p = problem("one hard of 16")
    whole = p(p.z0, *p.args)
    part = p(p.z0[3:5], *(a[3:5] for a in p.args))
    torch.testing.assert_close(whole[3:5], part)
    assert (p.calls, p.samples) == (2, 18)
    assert (p.to(torch.float32).calls, p.to(torch.float32).z0.dtype) == (0, torch.float32)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="linear 2"):
        problem("linear 2")
