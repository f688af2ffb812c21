"""What goes wrong in other libraries for fixed points, shown not to go wrong here. One block a defect.

Elsewhere in the tests, because the file of the feature shows it already:

    the backward pass as a hook: a second pass loses it   test_saved_and_repeated: a_layer_twice_in_one_graph...
    graphs of discarded forwards are kept for ever        test_ift: no_graph_outlives_a_forward_that_is_thrown_away
    an absolute tolerance in the backward pass            test_ift: the_scale_of_the_loss_changes_nothing_else
    an inexact backward pass says nothing                 test_ift: a_failed_backward_speaks
    no gradient in evaluation mode                        test_deq: gradients_do_not_depend_on_the_mode
    wrong second derivatives; crash in torch.func         test_ift: finite_differences; test_transforms
    graph breaks, synchronisations                        test_compile, test_syncs
    a damped step is what is tested                       test_iterate: damping_does_not_loosen_the_test
    finished samples are evaluated on                     test_iterate: compaction_gives_the_same_answer...
    0-dim states and empty batches                        test_iterate: a_0_dim_state..., an_empty_batch...
    f changes shape, dtype, device or structure           test_iterate: a_map_that_changes_what_it_must_keep...
    a budget of one or two returns the start              test_iterate: a_budget_of_one_or_two
    leaves of a nested state are treated apart            test_properties: nested_equals_flat
    masks drawn anew when a checkpoint is replayed        test_unrolled: the_random_numbers_of_a_checkpointed_map...
    states beyond those the method needs                  test_memory
    one linear solve for all samples, uncounted products  test_gmres: samples_fast_and_slow_are_strangers
    a penalty that cannot be trained                      test_diagnostics_jacobian_penalty: the_gradient_is_right...

Lists of intermediate states as outputs, slices of the budget and normalization layers have no counterpart here.
"""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from implicit import (
    DEQ,
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Neumann,
    NewtonKrylov,
    Phantom,
    Picard,
    Result,
    Reversible,
    StochasticJFB,
    Stop,
    Unrolled,
    fixed_point,
)
from implicit.diagnostics import jacobian_penalty, spectral_radius
from implicit.testing import problem
from tests.helpers import SOLVERS, half, solve
from tests.helpers import each_solver as each

F64 = torch.float64
GRADS = [IFT(), JFB(2), StochasticJFB(), Phantom(3, 0.3), Neumann(4), SHINE(), Reversible(), Unrolled()]
each_grad = pytest.mark.parametrize("grad", GRADS, ids=lambda g: type(g).__name__)
QUASI = [Anderson(), AndersonGS(), Broyden(), BadBroyden()]


def contraction(n=16, gain=0.5, dtype=F64):
    """f(z, x) = tanh(z W) + x with ||W|| = gain, and x."""
    rng = torch.Generator().manual_seed(0)
    w = (gain * torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=F64))[0]).to(dtype)
    return (lambda z, x: torch.tanh(z @ w) + x), torch.randn(4, n, generator=rng, dtype=F64).to(dtype)


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        with torch.no_grad():
            self.linear.weight.copy_(0.6 * torch.linalg.qr(torch.arange(64.0).view(8, 8).cos())[0])
            self.linear.bias.zero_()

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def tight(grad):
    """The estimator with a budget of its own to play with, where it draws one."""
    return StochasticJFB(30, 2, generator=torch.Generator().manual_seed(0)) if isinstance(grad, StochasticJFB) else grad


# ---- gradients


@each_grad
def test_two_forwards_of_one_layer_before_their_backwards_in_either_order(grad):
    """A hook kept on the module would be that of the last forward alone."""
    stop = Stop(rtol=1e-6, atol=0)
    xs = [torch.full((2, 8), 0.3), torch.linspace(-1, 1, 16).view(2, 8)]

    def run(order, together):
        deq = DEQ(Layer(), grad=grad, solver=Broyden(), stop=stop)
        inputs = [x.clone().requires_grad_() for x in xs]
        grads = {}

        def forward(i):
            if isinstance(grad, StochasticJFB):
                deq.grad = StochasticJFB(generator=torch.Generator().manual_seed(i))
            return deq(torch.zeros(2, 8), inputs[i]).value.square().sum()

        if together:
            losses = [forward(i) for i in (0, 1)]
            for i in order:
                grads[i] = torch.autograd.grad(losses[i], [inputs[i], *deq.parameters()])
        else:
            for i in order:
                grads[i] = torch.autograd.grad(forward(i), [inputs[i], *deq.parameters()])
        return [*grads[0], *grads[1]]

    alone = run((0, 1), False)
    for order in ((0, 1), (1, 0)):
        for a, b in zip(run(order, True), alone, strict=True):
            assert torch.equal(a, b)


@each_grad
def test_the_backward_pass_of_a_bfloat16_state_under_autocast(grad):
    """The map is evaluated again in the backward pass, which runs outside autocast."""
    layer, x = Layer(), torch.linspace(-1, 1, 16).view(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z0 = torch.zeros(2, 8, dtype=torch.bfloat16)
        found = fixed_point(
            lambda z, x: layer(z, x).bfloat16(), z0, x, grad=tight(grad), solver=Broyden(), stop=Stop(rtol=3e-2)
        )
    found.value.float().square().mean().backward()
    got, true = layer.linear.weight.grad, Layer()
    fixed_point(true, torch.zeros(2, 8), x, stop=Stop(rtol=1e-6, atol=0)).value.square().mean().backward()
    exact = true.linear.weight.grad
    assert got is not None and exact is not None
    off = float((got - exact).norm() / exact.norm())
    assert off < (0.1 if isinstance(grad, (IFT, Unrolled, Reversible)) else 0.6)


@each_grad
def test_no_grad_in_training_mode_is_no_error(grad):
    deq = DEQ(Layer(), grad=grad, solver=Broyden()).train()
    with torch.no_grad():
        assert not deq(torch.zeros(2, 8), torch.ones(2, 8)).value.requires_grad


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_the_exact_gradient_makes_no_jacobian():
    n = 1500
    x = torch.linspace(0, 1, n).unsqueeze(0).requires_grad_()
    with Largest() as seen:
        value = fixed_point(lambda z, x: torch.cos(z) * 0.5 + x, torch.zeros(1, n), x, solver=Picard()).value
        value.square().sum().backward()
    assert 2 * n <= seen.numel < 100 * n  # the basis of the backward solve, at most 61 vectors, not n x n


def test_the_returned_value_does_not_ask_for_gradients_that_it_cannot_have():
    """No leftover requires_grad on values or on the caller's tensors."""
    z0, x = torch.zeros(2, 8), torch.ones(2, 8)
    layer = Layer().requires_grad_(False)
    assert not fixed_point(layer, z0, x).value.requires_grad
    assert not z0.requires_grad and not x.requires_grad


# ---- diagnostics


def rotation(degrees):
    a = math.radians(degrees)
    return 0.9 * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=F64)


@pytest.mark.parametrize(
    ("matrix", "radius", "quotient"),
    [
        (rotation(90), 0.9, 0.0),
        (rotation(60), 0.9, 0.45),
        (torch.diag(torch.tensor([0.9, -0.9], dtype=F64)), 0.9, None),
        (torch.zeros(2, 2, dtype=F64), 0.0, None),
    ],
    ids=["a quarter turn", "complex pair", "two signs", "nothing"],
)
def test_the_spectral_radius_is_no_rayleigh_quotient(matrix, radius, quotient):
    """v^T J v / v^T v of a power iteration is none of these, or depends on where it starts, or is 0 / 0."""
    v = torch.linalg.matrix_power(matrix, 50) @ torch.tensor([0.6, 0.8], dtype=F64)
    if quotient is not None:
        assert float(v @ matrix @ v / (v @ v)) == pytest.approx(quotient, abs=1e-12)
    z = torch.ones(2, 2, dtype=F64)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        found = spectral_radius(lambda z: z @ matrix.T, z, generator=rng)
        assert found.tolist() == pytest.approx([radius] * 2, abs=1e-12) and not found.requires_grad
    assert not z.requires_grad


def test_the_jacobian_penalty_of_every_sample_and_of_a_map_that_ignores_z():
    """A number a sample, that a weight of any kind multiplies on any device; 0 and no NaN where J is 0."""
    scale = torch.tensor([[0.5], [2.0], [0.0]], dtype=F64, requires_grad=True)
    z = torch.ones(3, 4, dtype=F64)
    penalty = jacobian_penalty(lambda z: scale * z, z, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(penalty.detach(), scale.detach().square()[:, 0])
    (gradient,) = torch.autograd.grad((0.1 * penalty).sum(), scale)
    torch.testing.assert_close(gradient, 0.2 * scale.detach())
    assert not z.requires_grad and z.grad is None


# ---- what is called an answer


def burst(at, rows, value):
    """f that gives `value` for the samples `rows` at evaluation number `at`, and is a contraction otherwise."""
    f, x = contraction()
    calls = 0

    def broken(z, x):
        nonlocal calls
        calls += 1
        out = f(z, x)
        if calls == at:
            out = out.clone()
            out[rows] = value
        return out

    return broken, x


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_evaluation_destroys_no_good_iterate(solver, value):
    """0 * NaN is NaN: an iterate that is masked out by multiplication comes through."""
    good, x = contraction()
    bad, _ = burst(4, [1], value)
    stop = Stop(rtol=1e-9, atol=0, max_evals=80)
    clean = solve(good, torch.zeros_like(x), x, solver=solver, stop=stop).check()
    found = solve(bad, torch.zeros_like(x), x, solver=solver, stop=stop)
    others = [0, 2, 3]
    assert torch.equal(found.value[others], clean.value[others])
    assert torch.equal(found.evals[others], clean.evals[others])
    assert torch.isfinite(found.value).all() and torch.isfinite(found.residual).all()
    if found.result[1] == Result.NONFINITE:
        assert int(found.evals[1]) == 4 and float(found.residual[1]) < float(torch.linalg.norm(x[1]))
    else:
        torch.testing.assert_close(found.value[1], clean.value[1], rtol=1e-7, atol=1e-8)


@each
def test_nan_for_ever_ends_the_sample_at_its_best_and_spends_no_budget(solver):
    f, x = contraction()
    calls = 0

    def broken(z, x):
        nonlocal calls
        calls += 1
        return f(z, x) if calls < 5 else f(z, x) * math.nan

    start = float(torch.linalg.norm(x[0]))
    found = solve(broken, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=1e-12, atol=0, max_evals=500))
    assert (found.result == Result.NONFINITE).all() and calls <= 60
    assert torch.isfinite(found.value).all() and float(found.residual[0]) <= start


@each
def test_norms_past_the_largest_half_precision_number_are_no_convergence(solver):
    """||f(z)|| of 400 numbers of 6e4 is inf in float16, and finite / inf = 0 would meet any tolerance."""
    grown = torch.full((1, 400), 3.0e4, dtype=torch.float16)
    found = solve(lambda z: 1.3 * z, grown, solver=solver, stop=Stop(rtol=1e-3, atol=0, max_evals=1))
    assert not found.converged.any() and math.isfinite(float(found.residual))
    torch.testing.assert_close(float(found.residual), 0.3 * 3.0e4 * 20, rtol=2e-3, atol=0)
    still = solve(lambda z: z.clone(), grown, solver=solver, stop=Stop(rtol=1e-3, atol=0))
    assert still.converged.all() and torch.equal(still.value, grown)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_diverging_iteration_is_never_converged_with_residual_zero(solver, dtype):
    found = solve(lambda z: -3 * z + 1, torch.full((2, 8), 5.0, dtype=dtype), solver=solver, stop=Stop(max_evals=120))
    if isinstance(solver, Picard):
        assert not found.converged.any()
    for z in found.value[found.converged]:  # accelerated solvers find the fixed point 1/4
        torch.testing.assert_close(z, torch.full_like(z, 0.25), rtol=1e-2, atol=1e-2)
    assert torch.isfinite(found.value).all() and (found.residual[~found.converged] > 0).all()


@each
@pytest.mark.parametrize("name", ["repelling", "non-normal"])
def test_the_residual_reported_is_that_of_the_value_returned(solver, name):
    """To return f(z) and report the residual of z is a false claim wherever f expands."""
    p = problem(name)
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-4, atol=0, max_evals=60))
    fz = p.map(found.value, *p.args)
    true = (fz - found.value).norm(dim=1)
    done = found.converged
    torch.testing.assert_close(found.residual[done], true[done], rtol=1e-9, atol=0)
    assert (true[done] <= 1e-4 * fz.norm(dim=1)[done] * (1 + 1e-9)).all()


@each
def test_a_batch_of_one_is_as_accurate_as_any(solver):
    """Progress over the iterations, not over the batch."""
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        w = 0.9 * torch.linalg.qr(torch.randn(30, 30, generator=rng, dtype=F64))[0]
        x = torch.randn(1, 30, generator=rng, dtype=F64)
        found = solve(
            lambda z, x, w=w: torch.tanh(z @ w) + x,
            torch.zeros_like(x),
            x,
            solver=solver,
            stop=Stop(rtol=1e-9, atol=0, max_evals=250),
        )
        fz = torch.tanh(found.value @ w) + x
        claim = (fz - found.value).norm() <= 1e-9 * fz.norm()
        assert bool(claim) == bool(found.converged[0])
        assert bool(claim) or int(found.evals) == 250


# ---- units, precision, history


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["tanh layers", "repelling", "H 0.99"])
def test_the_unit_of_z_changes_no_count(solver, name):
    """An absolute regularisation of a Gram matrix does."""
    counts = set()
    for unit in (1e-4, 1.0, 1e4):
        p = problem(name)
        found = solve(
            lambda z, *args, p=p, unit=unit: unit * p.map(z / unit, *args),
            p.z0 * unit,
            *p.args,
            solver=solver,
            stop=Stop(rtol=1e-5, atol=0, max_evals=40),
        )
        counts.add(tuple(found.evals.tolist()))
    assert len(counts) == 1


@pytest.mark.parametrize("memory", [2, 5, 10])
@pytest.mark.parametrize("method", [Broyden, BadBroyden])
def test_a_history_that_wraps_goes_on_converging(memory, method):
    p = problem("linear 0.9")
    solver = method(memory, safeguard=False)
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-8, atol=0, max_evals=300))
    assert torch.isfinite(found.value).all() and (found.result != Result.NONFINITE).all()
    plain = solve(p, p.z0, *p.args, solver=Picard(), stop=Stop(rtol=1e-8, atol=0, max_evals=300))
    assert found.converged.all() and int(found.evals.max()) <= int(plain.evals.max())


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_needs_no_solver_that_torch_lacks(solver, dtype):
    """LU and QR do not exist in half precision on a CPU."""
    f, x = contraction(dtype=dtype)
    rtol = 1e-2 if dtype == torch.float16 else 5e-2
    found = solve(f, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=rtol, atol=0, max_evals=60)).check()
    true, y = contraction()
    z = solve(true, torch.zeros_like(y), y, stop=Stop(rtol=1e-10, atol=0, max_evals=60)).check().value
    assert found.value.dtype == dtype
    assert ((found.value.double() - z).norm(dim=1) <= 3 * rtol * z.norm(dim=1)).all()


@pytest.mark.parametrize("solver", [Anderson(1), Anderson(2), AndersonGS(1), Broyden(1), NewtonKrylov(1)], ids=repr)
def test_the_shortest_memory_works(solver):
    f, x = contraction()
    found = solve(f, torch.zeros_like(x), x, solver=solver, stop=Stop(rtol=1e-8, atol=0, max_evals=200)).check()
    torch.testing.assert_close(f(found.value, x), found.value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", QUASI, ids=lambda s: type(s).__name__)
def test_residuals_that_are_equal_make_no_singular_system(solver):
    """Identical differences, hence a singular Gram matrix, from a map that moves at constant speed."""
    found = solve(lambda z: z + 1, torch.zeros(2, 3), solver=solver, stop=Stop(max_evals=20))
    assert not found.converged.any() and torch.isfinite(found.value).all()


# ---- counts


@each
@pytest.mark.parametrize("budget", [1, 2, 3, 20])
def test_every_solver_counts_alike(solver, budget):
    """The budget is the number of calls of f: no hidden first one, no placeholder in the trace."""
    p = problem("linear 0.99")
    found = solve(p, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-15, atol=0, max_evals=budget), trace=True)
    assert p.calls == budget and (found.evals == budget).all()
    assert found.trace is not None
    torch.testing.assert_close(found.trace[0], (p.map(p.z0, *p.args) - p.z0).norm(dim=1))
    assert found.trace.shape == (budget, 4)
    q = problem("linear 0.99")
    fixed = solve(q, q.z0, *q.args, solver=solver, stop=Stop(rtol=0, atol=0, max_evals=budget))
    assert q.calls == budget and (fixed.evals == budget).all()


# ---- states


@each
def test_dtypes_of_a_mixed_state_are_kept(solver):
    """Concatenation promotes; every leaf must come back as it went in, and f must see it so."""
    z0 = {
        "double": torch.zeros(2, 3, dtype=F64),
        "pair": (torch.zeros(2, 2, 2), torch.zeros(2, 1, dtype=torch.bfloat16)),
        "complex": torch.zeros(2, 2, dtype=torch.complex64),
    }
    kinds = (F64, torch.float32, torch.bfloat16, torch.complex64)

    def f(z):
        a, (b, c), d = z["double"], z["pair"], z["complex"]
        assert (a.dtype, b.dtype, c.dtype, d.dtype) == kinds
        return {"complex": 0.5 * d + (1 + 2j), "pair": (0.5 * b + 1, 0.5 * c + 1), "double": 0.5 * a.cos()}

    found = solve(f, z0, solver=solver, stop=Stop(rtol=1e-2, atol=0, max_evals=60)).check()
    a, (b, c), d = found.value["double"], found.value["pair"], found.value["complex"]
    assert (a.dtype, b.dtype, c.dtype, d.dtype) == kinds and list(found.value) == list(z0)
    torch.testing.assert_close(d, torch.full_like(d, 2 + 4j), rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(a, torch.full_like(a, 0.4501836), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("grad", [IFT(), JFB(), Unrolled(), Reversible()], ids=lambda g: type(g).__name__)
def test_a_tuple_of_different_dtypes_has_gradients(grad):
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    z0 = (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 2, dtype=torch.float32))

    def f(z, x):
        return 0.3 * z[0] + x, 0.2 * z[1] + x[:, :2].float()

    a, b = fixed_point(f, z0, x, grad=grad, solver=Picard(), stop=Stop(rtol=1e-6, atol=0)).value
    (got,) = torch.autograd.grad(a.sum() + b.sum(), x)
    true = torch.full_like(x, 1 / 0.7)
    true[:, :2] += 1 / 0.8
    exact = not isinstance(grad, JFB)
    torch.testing.assert_close(
        got, true if exact else torch.tensor([[2.0, 2, 1]], dtype=F64).expand(2, 3), rtol=1e-4, atol=0
    )


@each
def test_one_number_a_sample(solver):
    z0 = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    found = solve(torch.cos, z0, solver=solver, stop=Stop(rtol=1e-8, max_evals=99))
    expected = torch.full((3, 1), 0.7390851332151607, dtype=F64)
    torch.testing.assert_close(found.check().value, expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="batch_dims"):  # a vector may be one system or three
        solve(torch.cos, z0[:, 0], solver=solver)


@each
def test_leaves_with_different_batch_sizes_are_one_system_or_an_error(solver):
    z0 = (torch.zeros(2, 3), torch.zeros(5))
    found = solve(lambda z: (0.5 * z[0] + 1, 0.1 * z[1] + 1), z0, solver=solver, batch_dims=0, stop=Stop(max_evals=99))
    assert found.check().value[1].shape == (5,)
    with pytest.raises(ValueError, match="one batch size"):
        solve(lambda z: z, z0, solver=solver)


@each
def test_a_map_that_writes_in_place_is_refused(solver):
    """z and f(z) would be one tensor and the residual 0."""
    buffer = torch.zeros(2, 3)

    def into_a_buffer(z):
        return torch.mul(z, 0.5, out=buffer).add_(1)

    def into_a_view(z):
        z[:, 0] = 1
        return 0.5 * z

    for f in (into_a_buffer, into_a_view, lambda z: z.add_(1)):
        for stop in (Stop(), Stop(rtol=0, atol=0, max_evals=9)):
            with pytest.raises(
                (ValueError, RuntimeError), match=r"in place|out=\.\.\. arguments"
            ):  # torch's own, in a jvp
                solve(f, torch.zeros(2, 3), solver=solver, stop=stop)


@each
def test_the_callers_tensors_are_left_as_they_were(solver):
    z0 = torch.full((3, 4), 0.25)
    for keep in (lambda z: z, lambda z: z[:, :], lambda z: z.view(3, 4)):
        found = solve(lambda z, keep=keep: keep(half(z)), z0, solver=solver, stop=Stop(rtol=1e-6))
        assert torch.equal(z0, torch.full((3, 4), 0.25)) and found.value.data_ptr() != z0.data_ptr()


# ---- settings


def test_settings_are_frozen_and_misspelt_ones_refused():
    options: list[tuple[Any, dict[str, Any]]] = [
        (Stop, {"rtoll": 1e-3}),
        (Anderson, {"m": 5}),
        (Broyden, {"max_iter": 3}),
        (IFT, {"solvr": Picard()}),
        (lambda **options: fixed_point(half, torch.zeros(1, 2), **options), {"f_toll": 1e-3}),
        (lambda **options: DEQ(half, **options), {"tol": 1e-3}),
        (lambda **options: DEQ(half)(torch.zeros(1, 2), **options), {"tol": 1e-3}),
    ]
    for make, misspelt in options:
        with pytest.raises(TypeError, match="unexpected keyword"):
            make(**misspelt)
    for thing, name in ((Stop(), "rtol"), (Anderson(), "memory"), (IFT(), "stop")):
        with pytest.raises(AttributeError):
            setattr(thing, name, None)


@pytest.mark.parametrize(
    ("grad", "solver"),
    [(g, Picard() if isinstance(g, Reversible) else Broyden(5)) for g in GRADS] + [(IFT(), s) for s in SOLVERS],
    ids=lambda thing: type(thing).__name__,
)
def test_layers_pickle_and_copy_after_use(grad, solver):
    deq = DEQ(Layer(), solver=solver, grad=tight(grad), stop=Stop(rtol=1e-5))
    z0, x = torch.zeros(2, 8), torch.ones(2, 8)
    deq(z0, x).value.sum().backward()
    copies = pickle.loads(pickle.dumps(deq)), copy.deepcopy(deq)
    with torch.no_grad():
        value = deq(z0, x).value
        for again in copies:
            assert torch.equal(again(z0, x).value, value)  # a generator of the estimator's is copied with it
            assert again.solver == solver and again.stop == deq.stop
