"""torch.set_default_device: solves, gradients and diagnostics work on the device of the state.

The default device here is `meta`, on which a tensor that the package makes without a device would have no values.
"""

from typing import Any

import pytest
import torch

from implicit import Stop, diagnose, fixed_point
from implicit.diagnostics import gradient_bias, jacobian_penalty, path_independence, spectral_radius
from tests.helpers import F64, each_estimator, each_solver, solver_and

STOPS = [
    Stop(rtol=1e-8, atol=0, max_evals=60),
    Stop(rtol=0, atol=0, max_evals=8),
    Stop(rtol=1e-8, atol=0, max_evals=60, late=True, check_every=3),
    Stop(rtol=1e-6, atol=0, max_evals=60, norm="max"),
]


def layer():
    with torch.device("cpu"):
        rng = torch.Generator().manual_seed(0)
        w = 0.7 * torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=F64))[0]
        x = torch.randn(3, 12, generator=rng, dtype=F64).requires_grad_()
        return lambda z, x: torch.tanh(z @ w + x), torch.zeros(3, 12, dtype=F64), x


def elsewhere(run) -> Any:
    """The result of `run` under another default device."""
    with torch.device("meta"):
        return run()


SAME: dict[str, Any] = dict(rtol=0, atol=0, equal_nan=True)


@each_solver
@pytest.mark.parametrize("stop", STOPS, ids=["tolerance", "fixed count", "late", "maximum"])
def test_a_solve(solver, stop):
    f, z0, x = layer()

    def run():
        with torch.no_grad():
            found = fixed_point(f, z0, x, solver=solver, stop=stop)
        return found.value, found.residual, found.result, found.evals

    torch.testing.assert_close(elsewhere(run), run(), **SAME)


@each_estimator
def test_a_gradient(estimator):
    def run():
        torch.manual_seed(0)
        f, z0, x = layer()
        fixed_point(f, z0, x, stop=STOPS[0], **solver_and(estimator)).value.square().sum().backward()
        return x.grad

    torch.testing.assert_close(elsewhere(run), run(), **SAME)


@pytest.mark.parametrize(
    "run",
    [
        lambda f, z0, x: [s.evals for s in diagnose(f, z0, x, repeats=0).solvers],
        lambda f, z0, x: spectral_radius(lambda z: f(z, x), z0),
        lambda f, z0, x: path_independence(lambda z: f(z, x), z0).distance,
        lambda f, z0, x: jacobian_penalty(lambda z: f(z, x), z0, generator=torch.Generator().manual_seed(0)),
        lambda f, z0, x: [row.error for row in gradient_bias(f, z0, x).rows],
    ],
    ids=["diagnose", "spectral_radius", "path_independence", "jacobian_penalty", "gradient_bias"],
)
def test_diagnostics(run):
    torch.testing.assert_close(elsewhere(lambda: run(*layer())), run(*layer()), **SAME)
