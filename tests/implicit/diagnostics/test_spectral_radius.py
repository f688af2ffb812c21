import math

import pytest
import torch

from implicit.diagnostics import spectral_radius, spectrum
from implicit.testing import problem
from tests.layers import RADII, dense_solution, jacobian, layer

F64 = torch.float64


def turn(degrees, size=0.9):
    a = math.radians(degrees)
    return size * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=F64)


@pytest.mark.parametrize(
    ("matrix", "radius"),
    [
        (turn(60), 0.9),
        (turn(90), 0.9),
        (torch.diag(torch.tensor([0.9, -0.9, 0.1], dtype=F64)), 0.9),
        (torch.diag(torch.tensor([-1.7, 0.3], dtype=F64)), 1.7),
        (torch.zeros(4, 4, dtype=F64), 0.0),
        (0.7 * torch.eye(5, dtype=F64), 0.7),
    ],
)
def test_closed_forms(matrix, radius):
    z = torch.ones(3, len(matrix), dtype=F64)
    found = spectral_radius(lambda z: z @ matrix.T, z)
    assert found.tolist() == pytest.approx([radius] * 3, abs=1e-12)


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
def test_dense_eigenvalues_of_layers(name):
    f, x = layer(name)
    z = dense_solution(f, x)
    dense = torch.linalg.eigvals(jacobian(f, z, x)).abs().amax(dim=1)
    torch.testing.assert_close(spectral_radius(f, z, x, tol=1e-9), dense, rtol=1e-8, atol=0)
    assert float(dense.max()) == pytest.approx(RADII[name], abs=0.1)


@pytest.mark.parametrize("name", ["linear 0.9", "repelling", "Bratu", "one hard of 16", "cosine"])
def test_problems_with_a_known_spectrum(name):
    p = problem(name)
    found = spectral_radius(p, p.solution, *p.args, tol=1e-6, products=200)
    torch.testing.assert_close(found, p.radius, rtol=1e-5, atol=1e-12)


def test_it_is_cheap_on_a_large_map_and_states_its_error():
    rng = torch.Generator().manual_seed(0)
    size = 2000
    d = torch.linspace(-0.5, 0.5, size)
    d[0] = 0.95
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return z * d

    found = spectrum(f, torch.randn(2, size, generator=rng))
    assert calls == 1 and found.values.shape[1] <= 30
    torch.testing.assert_close(found.radius, torch.full((2,), 0.95, dtype=F64), rtol=1e-3, atol=0)
    assert (found.error <= 1e-3).all()
    with pytest.warns(RuntimeWarning, match="products"):
        spectral_radius(f, torch.ones(2, size), products=3)


def test_nothing_is_left_behind():
    f, x = layer("easy")
    z = dense_solution(f, x)
    for p in f.parameters():
        p.requires_grad_(False)
    spectral_radius(f, z, x)
    assert not z.requires_grad and z.grad is None and not x.requires_grad
    assert not any(p.requires_grad for p in f.parameters())
    for p in f.parameters():
        p.requires_grad_(True)
    with torch.inference_mode():
        inside = spectral_radius(f, z, x)
    with torch.no_grad():
        torch.testing.assert_close(inside, spectral_radius(f, z, x))
    assert all(p.grad is None for p in f.parameters())


def test_samples_are_independent_and_bad_ones_alone_are_nan():
    p = problem("one hard of 16")
    together = spectral_radius(p, p.solution, *p.args)
    alone = [spectral_radius(p, p.solution[b : b + 1], *(a[b : b + 1] for a in p.args)) for b in (0, 8)]
    torch.testing.assert_close(together[[0, 8]], torch.cat(alone), rtol=1e-10, atol=0)
    d = torch.stack((torch.linspace(0, 0.5, 200, dtype=F64), torch.linspace(0, 0.5, 200, dtype=F64)))
    d[0, 0] = 0.9  # found at once; the other row takes longer
    z = torch.ones(2, 200, dtype=F64)
    both, one = spectrum(lambda z: z * d, z, tol=1e-2), spectrum(lambda z: z * d[:1], z[:1], tol=1e-2)
    assert both.values.shape[1] > one.values.shape[1]
    torch.testing.assert_close(both.radius[:1], one.radius, rtol=1e-12, atol=0)
    z = p.solution.clone()
    scale = torch.ones(16, 1, dtype=F64)
    scale[3] = torch.nan
    with pytest.warns(RuntimeWarning, match=r"\b1\b.*\b16\b"):
        spoilt = spectral_radius(lambda z: p(z, *p.args) * scale, z)
    assert spoilt.isnan().nonzero().flatten().tolist() == [3]
    kept = [b for b in range(16) if b != 3]
    torch.testing.assert_close(spoilt[kept], together[kept])


def test_states_nested_complex_and_as_one_system():
    w = turn(60)
    nested = spectral_radius(
        lambda s: {"a": 0.5 * s["b"], "b": 0.8 * s["a"]}, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    )
    assert nested.tolist() == pytest.approx([0.4**0.5] * 2, rel=1e-5)
    z = torch.ones(2, 3, dtype=torch.complex128)
    assert spectral_radius(lambda z: (0.3 + 0.4j) * z, z).tolist() == pytest.approx([0.5] * 2)
    assert spectral_radius(lambda z: w @ z, torch.ones(2, 1, dtype=F64), batch_dims=0).tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("wrong", [{"products": 0}, {"tol": 0.0}])
def test_bad_arguments(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        spectrum(torch.cos, torch.ones(1, 1), **wrong)
