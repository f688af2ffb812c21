"""The public problem collections: answers, dtypes, independence of the rows, equations against other forms of them."""

import numpy as np
import pytest
import torch
from scipy import optimize

import implicit
from benchmarks.problems import acceleration, published_maps, systems
from benchmarks.problems.acceleration.grids import charges, electric_field
from benchmarks.problems.acceleration.random_numbers import PortableRandom, RRandom

SYSTEMS = {p.name: p for p in systems()}
MAPS = {p.name: p for p in acceleration()}
PUBLISHED = {p.name: p for p in published_maps()}
# answers that sources print with few digits: residual over tolerance allowed
PRINTED = {"KINSOL Roberts": 1e-5, "Hasselblad EM": 100.0}


def ids(problems):
    return [pytest.param(p, id=p.name) for p in problems.values()]


@pytest.mark.parametrize("p", ids(SYSTEMS))
def test_systems_have_the_answer_that_is_published_or_that_scipy_finds(p):
    if p.answer is not None:
        assert float(p.residual(p.answer())) < 1e-4
        return

    def function(x):
        z = torch.from_numpy(x.copy()).unsqueeze(0)
        return (z - p.f(z)).numpy().ravel()

    start = p.z0.numpy().ravel()
    root = optimize.root(function, start, tol=1e-14)
    assert np.linalg.norm(root.fun) < 1e-12


@pytest.mark.parametrize("p", ids({**PUBLISHED, **MAPS}))
def test_maps_keep_the_answer_of_the_second_route(p):
    if p.answer is not None:
        assert float(p.residual(p.answer()).max()) < PRINTED.get(p.name, 0.1)


# not Douglas-Rachford, whose fixed points are many
NEWTON = """Three normals EM, Plug and play, Multivariate t EM, Poisson mixtures EM,
Normal mixtures EM, Sinkhorn, Implicit midpoint / pendulum, Implicit midpoint / chain, Self-consistent field,
Best response""".replace("\n", " ").split(", ")


@pytest.mark.parametrize("name", NEWTON)
def test_newton_from_plain_iteration_finds_the_point_of_the_default_solver(name):
    p = MAPS[name.replace(" /", ",")]
    args = tuple(a[:1] for a in p.args)

    def f(x):
        return p.f(x.unsqueeze(0), *args)[0]

    x = p.z0[0]
    with torch.no_grad():
        for _ in range(200):
            x = f(x)
        ours = implicit.fixed_point(p.f, p.z0[:1], *args, stop=implicit.Stop(rtol=1e-9, atol=0, max_evals=1000)).check()
    for _ in range(8):
        slope = torch.eye(len(x), dtype=x.dtype) - torch.autograd.functional.jacobian(f, x)
        x = x + torch.linalg.lstsq(slope, (f(x) - x).unsqueeze(1), driver="gelsd").solution[:, 0]
        if float(p.excess(x.unsqueeze(0), f(x).unsqueeze(0))) < 1e-4:
            break
    torch.testing.assert_close(ours.value[0], x, rtol=1e-5, atol=1e-5)


def test_the_nearest_correlation_matrix_meets_its_optimality_conditions():
    # every correlation matrix with S = 0 is a fixed point; Dykstra's start selects the nearest one
    p = MAPS["Higham correlation"]
    with torch.no_grad():
        ys = implicit.fixed_point(p.f, p.z0, stop=implicit.Stop(rtol=1e-10, atol=0, max_evals=1000)).check().value[0]
    i, j = torch.triu_indices(6, 6)
    y, s, given = (torch.zeros(6, 6, dtype=ys.dtype) for _ in range(3))
    for matrix, entries in ((y, ys[:21]), (s, ys[21:]), (given, p.z0[0, :21])):
        matrix[i, j] = entries
        matrix[j, i] = entries
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close((y - s)[off], given[off], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(y.diagonal(), torch.ones(6, dtype=ys.dtype), rtol=1e-7, atol=1e-7)
    # Y and S are positive semidefinite and complementary
    assert float(torch.linalg.eigvalsh(y)[0]) > -1e-7 and float(torch.linalg.eigvalsh(s)[0]) > -1e-6
    assert float((y @ s).norm()) < 1e-5


@pytest.mark.parametrize("p", ids({**SYSTEMS, **MAPS}))
def test_every_map_keeps_shape_and_dtype_and_treats_rows_alone(p):
    for dtype in (torch.float64, torch.float32):
        q = p.to(dtype)
        out = q.f(q.z0, *q.args)
        assert out.shape == q.z0.shape and out.dtype == dtype and bool(out.isfinite().all())
    other = p.z0 * 1.01
    if p.args:
        both = p.f(p.z0, *p.args)
        one = p.f(p.z0[:1], *(a[:1] for a in p.args))
        torch.testing.assert_close(both[:1], one, rtol=1e-10, atol=1e-10)
    elif len(p.z0) == 1:
        torch.testing.assert_close(p.f(torch.cat((p.z0, other)))[:1], p.f(p.z0), rtol=1e-10, atol=1e-10)


def test_names_are_unique_and_sources_are_given():
    assert len(SYSTEMS) == 23 and len(systems()) == 23
    assert len(MAPS) == len(acceleration())
    assert all(p.source for p in [*SYSTEMS.values(), *MAPS.values(), *PUBLISHED.values()])


def test_watson_is_the_gradient_of_its_sum_of_squares():
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    t = torch.arange(1, 30, dtype=torch.float64) / 29
    value = x[0, 0] + x[0, 1] * t
    squares = (x[0, 1] - value**2 - 1).square().sum() + x[0, 0] ** 2 + (x[0, 1] - x[0, 0] ** 2 - 1) ** 2
    gradient = torch.autograd.grad(squares / 2, x)[0]
    torch.testing.assert_close(x - SYSTEMS["Watson"].f(x), gradient)


def test_the_discrete_integral_equation_is_that_of_its_loops():
    n, h = 10, 1 / 11
    x = torch.linspace(-0.3, 0.4, n, dtype=torch.float64)
    cube = [(float(x[j]) + (j + 1) * h + 1) ** 3 for j in range(n)]
    expected = []
    for k in range(1, n + 1):
        first = sum(j * h * cube[j - 1] for j in range(1, k + 1))
        second = sum((1 - j * h) * cube[j - 1] for j in range(k, n + 1))
        expected.append(float(x[k - 1]) + h / 2 * ((1 - k * h) * first + k * h * second))
    got = x - SYSTEMS["Discrete integral equation"].f(x.unsqueeze(0))[0]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("w", [1.0, 1.94])
def test_a_sweep_of_relaxation_is_that_of_its_loops(w):
    side = 12
    f, _, _ = electric_field(side, w)
    push = charges(side) / (side - 1) ** 2
    u = torch.linspace(-1, 2, side * side, dtype=torch.float64).cos().reshape(side, side)
    expected = u.clone()
    for i in range(1, side - 1):
        for j in range(1, side - 1):
            near = expected[i - 1, j] + expected[i + 1, j] + expected[i, j - 1] + expected[i, j + 1]
            expected[i, j] += w * ((near + push[i, j]) / 4 - expected[i, j])
    torch.testing.assert_close(f(u.reshape(1, -1)).reshape(side, side), expected, rtol=1e-12, atol=1e-12)


def test_the_random_numbers_are_those_of_r_and_of_the_suite():
    # set.seed(10); rnorm(3) and set.seed(42); runif(3), as R prints them
    np.testing.assert_allclose(RRandom(10).normal(3), [0.01874617, -0.18425254, -1.37133055], atol=5e-9)
    np.testing.assert_allclose(RRandom(42).uniform(3), [0.9148060, 0.9370754, 0.2861395], atol=5e-8)
    r = (3685477807 + 12345) // 65536 % 32768
    assert float(PortableRandom().uniform(1)[0]) == r / 32768


@pytest.mark.parametrize("call", [lambda: systems(0.0), lambda: acceleration(-1.0)])
def test_tolerances_must_be_positive(call):
    with pytest.raises(ValueError, match="tol"):
        call()
