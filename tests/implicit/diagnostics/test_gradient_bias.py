"""`gradient_bias`: exact gradient, counts and bytes against closed forms; failures become rows."""

import math
import re

import pytest
import torch
from torch import nn

from implicit import (
    IFT,
    JFB,
    SHINE,
    Neumann,
    NewtonKrylov,
    NotConverged,
    Phantom,
    Picard,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.diagnostics import gradient_bias
from implicit.diagnostics.profiling import Bytes, measure
from tests.layers import dense_gradient, dense_solution, flat, layer, off

F64 = torch.float64
TIGHT = Stop(rtol=1e-12, atol=0, max_evals=300)


def affine(w=0.5):
    """z* = 1 / (1 - w), dz*/dw = 1 / (1 - w)^2; the k-step gradient is that times 1 - w^k."""
    return lambda z, w: w * z + 1, torch.zeros(2, 1, dtype=F64), torch.tensor(w, dtype=F64, requires_grad=True)


def test_closed_forms_of_the_bias_and_of_the_counts():
    f, z0, w = affine()
    estimators = {"IFT": IFT(), "1": JFB(), "3": JFB(3), "N": Neumann(4), "P": Phantom(3, 0.5), "U": Unrolled()}
    table = gradient_bias(f, z0, w, estimators=estimators, solver=Picard(), stop=TIGHT, repeats=0)
    errors = {"IFT": 0, "1": 0.5, "3": 0.5**3, "N": 0.5**4, "P": 0.75**3, "U": 0}
    for name, error in errors.items():
        assert table[name].error == pytest.approx(error, abs=1e-9), name
        assert table[name].cosine == pytest.approx(1.0)  # one number: the direction is always right
    forward = 41  # the residual after k steps is 0.5^k, that of z* = 2 is to be below 2e-12
    assert table["1"].evals == pytest.approx(forward, abs=2) and table["3"].evals == table["1"].evals + 2
    assert [table[name].products for name in ("1", "3", "N", "P")] == [1, 3, 4, 3]
    # Unrolled returns z after the residual of z is known: that evaluation is not part of the gradient
    assert table["U"].products == table["U"].evals - 1


@pytest.mark.parametrize("name", ["easy", "adaln", "hard"])
def test_the_truth_is_the_dense_one(name):
    f, x = layer(name)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    x.requires_grad_()
    params = [*f.parameters(), x]

    table = gradient_bias(
        f,
        torch.zeros_like(x),
        x,
        estimators=[JFB()],
        params=params,
        loss=lambda z: (g * z).sum(),
        stop=TIGHT,
        repeats=0,
    )
    truth = dense_gradient(f, x, g)
    z = dense_solution(f, x.detach())
    one = flat(torch.autograd.grad(f(z, x), params, g))
    assert table["JFB"].error == pytest.approx(off(one, truth), rel=1e-6)
    assert table["JFB"].cosine == pytest.approx(float(one @ truth / one.norm() / truth.norm()), rel=1e-9)


def test_a_large_layer_is_measured_without_forming_its_jacobian():
    rng = torch.Generator().manual_seed(0)
    d = (0.5 * torch.rand(2900, generator=rng, dtype=F64)).requires_grad_()
    z0 = torch.zeros(1, 2900, dtype=F64)
    table = gradient_bias(lambda z: d * z + 1, z0, estimators=[JFB(), IFT()], loss=torch.sum, stop=TIGHT, repeats=0)
    assert table.truth.startswith("an iterated")
    exact, one = 1 / (1 - d.detach()) ** 2, 1 / (1 - d.detach())
    assert table["JFB"].error == pytest.approx(float((one - exact).norm() / exact.norm()), rel=1e-8)
    assert table["IFT"].error < 1e-8


def test_a_loss_with_weights_of_its_own():
    """Its weights' gradient is direct, and exact under every estimator."""
    f, z0, w = affine()
    scale = torch.tensor(3.0, dtype=F64, requires_grad=True)
    for params, error in (([scale], 0.0), ([w], 0.5)):
        table = gradient_bias(
            f, z0, w, estimators=[JFB()], params=params, loss=lambda z: (scale * z).sum(), stop=TIGHT, repeats=0
        )
        assert table["JFB"].error == pytest.approx(error, abs=1e-9)


def kept_by_autograd(value, known):
    """Bytes of the tensors that a graph holds, each once, by PyTorch's own hooks."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = value()
    assert held.requires_grad
    return sum(size for ptr, size in kept.items() if ptr not in {t.untyped_storage().data_ptr() for t in known})


def test_bytes_between_the_passes_are_those_that_autograd_keeps():
    n = 1000
    w = torch.ones(n, requires_grad=True)
    z0, stop = torch.zeros(1, n), Stop(rtol=0, atol=0, max_evals=10)

    def f(z, w):
        return torch.tanh(0.5 * w * z + 1)

    saved = {}
    for grad in (JFB(), JFB(3), Unrolled()):
        table = gradient_bias(f, z0, w, estimators=[grad], solver=Picard(), stop=stop, loss=torch.sum, repeats=0)
        (row,) = table.rows
        hooks = kept_by_autograd(
            lambda g=grad: fixed_point(f, z0, w, solver=Picard(), grad=g, stop=stop).value, (w, z0)
        )
        # the value itself and the loop's last point besides; a state is 4 n bytes
        assert hooks - 100 <= row.saved <= hooks + 3 * 4 * n
        assert row.peak > row.saved
        saved[row.name] = row.saved
    assert saved["JFB(steps=3)"] - saved["JFB"] == pytest.approx(2 * 2 * 4 * n, abs=100)  # w/2 and tanh, a step
    assert saved["Unrolled"] > 3 * saved["JFB(steps=3)"]


def test_bytes_follow_what_is_alive_and_skip_what_was_there():
    before = torch.zeros(1000)
    with Bytes() as memory:
        a = before.view(10, 100)
        assert memory.alive == 0
        b = a + 1
        c = b.t()
        assert memory.alive == 4000
        d = c * 2
        del b, c, a
        assert memory.alive == 4000 and memory.peak == 8000
        del d
        assert memory.alive == 0


def test_failures_are_rows():
    f, z0, w = affine()
    estimators = {"SHINE": SHINE(), "JFB": JFB()}
    table = gradient_bias(f, z0, w, estimators=estimators, solver=NewtonKrylov(), stop=TIGHT, repeats=1)
    assert math.isnan(table["SHINE"].error) and math.isnan(table["SHINE"].time)
    assert table["SHINE"].note.startswith("ValueError: SHINE")
    assert table["JFB"].time > 0 and table["JFB"].note == ""
    assert "ValueError" in str(table)


def test_solves_that_stop_short_and_backward_passes_that_fail_are_noted():
    f, x = layer("hard")
    short = Stop(rtol=1e-10, atol=0, max_evals=4)
    weak = IFT(stop=Stop(rtol=1e-10, atol=0, max_evals=2))
    table = gradient_bias(f, torch.zeros_like(x), x, estimators={"IFT": weak}, stop=short, repeats=0)
    solve, backward = table["IFT"].note.split("MAX_EVALS", 1)
    assert re.search(r"\b3\b", solve) and "IFT" in backward


def test_the_mean_of_stochastic_draws():
    f, z0, w = affine()
    grad, again = (StochasticJFB(N=0, M=2, generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    (row,) = gradient_bias(f, z0, w, estimators=[grad], draws=12, repeats=0).rows
    two = sum(again.draw()[1] == 2 for _ in range(12)) / 12
    # from z = 0: dz_1/dw = 0 and dz_2/dw = 1, by the draw; the truth is 4
    assert 0 < two < 1 and row.error == pytest.approx(1 - two / 4)
    assert row.evals == row.products == pytest.approx(1 + two)


def test_the_table_is_aligned_markdown():
    f, z0, w = affine()
    lines = str(gradient_bias(f, z0, w, stop=Stop(rtol=1e-3), repeats=1, draws=1)).splitlines()
    assert len(lines) == 2 + 10 and len({len(line) for line in lines}) == 1
    assert lines[0].split()[1] == "estimator" and set(lines[1]) == set("|-:")
    assert len({line.count("|") for line in lines}) == 1


def test_what_requires_gradients_is_found_and_nothing_is_left_behind():
    module = nn.Linear(4, 4)
    with torch.no_grad():
        module.weight.mul_(0.5)
    x = torch.ones(2, 4, requires_grad=True)
    table = gradient_bias(lambda z, x: torch.tanh(module(z) + x), torch.zeros(2, 4), x, estimators=[IFT()], repeats=0)
    assert table["IFT"].error < 1e-2
    assert x.grad is None and all(p.grad is None for p in module.parameters())


def test_what_cannot_be_measured_is_refused():
    f, z0, w = affine()
    with pytest.raises(ValueError, match="params"):
        gradient_bias(torch.cos, z0)
    with pytest.raises(ValueError, match="params"):
        gradient_bias(f, z0, w, loss=lambda z: 0 * z.sum(), repeats=0)
    with pytest.raises(NotConverged, match="solver"):
        gradient_bias(lambda z, w: w / (0 * z), z0, w, repeats=0)
    with pytest.raises(KeyError, match="IFT"):
        gradient_bias(f, z0, w, estimators=[IFT()], repeats=0)["JFB"]


def test_any_gradient_can_be_put_on_the_scales():
    w = torch.tensor(2.0, requires_grad=True)
    taken = measure(lambda f: f(f(torch.ones(1))).sum(), lambda z: w * z, [w])
    assert taken.gradient is not None and taken.gradient.tolist() == [4.0]  # d w^2 / dw
    assert (taken.evals, taken.products, taken.note) == (2, 2, "")


def test_a_solution_of_zero_is_a_solution():
    f, x = layer("easy")
    x = x.detach().clone()
    x[0] = 0
    table = gradient_bias(
        lambda z, x: torch.tanh(z @ f.weight + x), torch.zeros_like(x), x, estimators=[JFB()], repeats=0
    )
    assert 0 < table.rows[0].error < 1


@pytest.mark.parametrize("wrong", [{"solver": "anderson"}, {"estimators": {"a": "jfb"}}, {"stop": 1e-4}], ids=str)
def test_a_name_or_a_number_in_place_of_an_instance_is_refused(wrong):
    w = torch.tensor([0.5], requires_grad=True)
    with pytest.raises(TypeError, match=r"solver|grad|stop"):
        gradient_bias(lambda z, w: w * z + 1, torch.zeros(1, 1), w, **wrong)
