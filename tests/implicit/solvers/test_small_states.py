"""Small states on the CPU are stepped by numpy: the same steps, the same memory."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from implicit import Anderson, AndersonGS, Broyden, Stop, fixed_point
from implicit.solvers import broyden
from implicit.solvers import history_buffer as history


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "solver",
    [
        Anderson(),
        Anderson(3, damping=0.3),
        Anderson(4, start=4),
        Broyden(),
        Broyden(4),
        Anderson(12),
        AndersonGS(),
        AndersonGS(3),
    ],
    ids=repr,
)
def test_small_states_take_the_same_steps_in_numpy_as_in_torch(solver, rows, dtype, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(16, 16, generator=draw, dtype=dtype) / 6, torch.randn(rows, 16, generator=draw, dtype=dtype)

    def value(evals):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        return fixed_point(lambda z: torch.tanh(z @ w) + x, torch.zeros_like(x), solver=solver, stop=stop).value

    small = [value(evals) for evals in range(1, 14)]
    monkeypatch.setattr(history, "_NEAR", 0)
    for near, far in zip(small, [value(evals) for evals in range(1, 14)], strict=True):
        torch.testing.assert_close(near, far, rtol=0, atol=1e-9 if dtype == torch.float64 else 3e-5)


def test_columns_that_repeat_each_other_are_left_to_torch():
    x = torch.ones(2, 3, dtype=torch.float64)
    found = fixed_point(
        lambda z: 0.5 * z + x, torch.zeros_like(x), solver=Anderson(ridge=1e-300), stop=Stop(rtol=1e-12)
    )
    assert found.converged.all()
    torch.testing.assert_close(found.value, 2 * x)


@pytest.mark.parametrize("solver", [Anderson(), AndersonGS(), Broyden()], ids=repr)
def test_a_state_that_is_a_negated_view_is_left_to_torch(solver):
    def f(z):
        out = torch.complex(z, -0.3 * z.cos() - 1).conj().imag
        assert out.is_neg()  # numpy refuses it
        return out

    assert fixed_point(f, torch.zeros(1, 8), solver=solver).converged.all()


def test_a_long_history_goes_on_in_torch(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(40, 40, generator=draw, dtype=torch.float64)
    w, stop = 0.98 * w / torch.linalg.matrix_norm(w, 2), Stop(rtol=0, atol=0, max_evals=20)

    def value():
        return fixed_point(lambda z: z @ w + 1, torch.zeros(1, 40, dtype=w.dtype), solver=Broyden(), stop=stop).value

    near = value()
    monkeypatch.setattr(broyden, "_LONG", 7)
    torch.testing.assert_close(value(), near, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "trace"),
    [
        (Anderson(), make_fx),
        (AndersonGS(), make_fx),
        (Broyden(), make_fx),
        (Anderson(), lambda f: lambda x: torch.jit.trace(f, (x,), check_trace=False)),
    ],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_traced_is_no_constant(solver, trace):
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 5
    x, y, stop = torch.ones(1, 4), -2 * torch.ones(1, 4), Stop(rtol=0, atol=0, max_evals=5)

    def solve(x):
        return fixed_point(lambda z: torch.tanh(z @ w) + x, torch.zeros(1, 4), solver=solver, stop=stop).value

    graph = trace(solve)(x)
    torch.testing.assert_close(graph(y), solve(y), rtol=0, atol=1e-4)
    assert not torch.allclose(graph(y), graph(x), atol=0.1)
