"""torch.func through a fixed point, against the same transform of an unrolled reference in float64."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import implicit
from implicit import IFT, JFB, Picard, Stop, Unrolled, fixed_point
from tests.helpers import F64, each_solver

TIGHT = Stop(rtol=1e-13, atol=0, max_evals=200)
EXACT = IFT(stop=Stop(rtol=1e-13, atol=0, max_evals=200), on_failure="ignore")


def _random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W = 0.7 * _random(3, 3) / torch.linalg.matrix_norm(_random(3, 3), 2)
B = _random(2, 3, seed=1)
WS = torch.stack([W, 0.5 * W, -W, W.T])
BS = _random(4, 2, 3, seed=2)
ZERO = torch.zeros(2, 3, dtype=torch.float64)


def f(z, w, b):
    return torch.tanh(z @ w.T + b)


def unrolled(w, b):
    z = ZERO
    for _ in range(100):  # 0.7^100 is below the rounding error of float64
        z = f(z, w, b)
    return z


def one_step(w, b):
    return f(unrolled(w, b).detach(), w, b)


def through_args(estimator):
    return lambda w, b: fixed_point(f, ZERO, w, b, stop=TIGHT, grad=estimator).value


def through_closure(estimator):
    return lambda w, b: fixed_point(lambda z: f(z, w, b), ZERO, stop=TIGHT, grad=estimator).value


def loss(solve):
    return lambda w, b: (solve(w, b) ** 3).sum()


TRANSFORMS = {
    "grad": lambda s: grad(loss(s), (0, 1))(W, B),
    "vjp": lambda s: vjp(s, W, B)[1](torch.ones_like(B)),
    "jvp": lambda s: jvp(s, (W, B), (W.cos(), B.sin()))[1],
    "jacrev": lambda s: jacrev(s)(W, B),
    "jacfwd": lambda s: jacfwd(s)(W, B),
    "hessian": lambda s: hessian(loss(s))(W, B),
    "jacrev of jacrev": lambda s: jacrev(jacrev(loss(s)))(W, B),
    "jacrev of jacfwd": lambda s: jacrev(jacfwd(loss(s)))(W, B),
    "vmap over inputs": lambda s: vmap(s, (None, 0))(W, BS),
    "vmap over parameters": lambda s: vmap(s, (0, None))(WS, B),
    "vmap over a middle axis": lambda s: vmap(s, (0, 1))(WS, BS.transpose(0, 1)),
    "vmap of grad": lambda s: vmap(grad(loss(s), (0, 1)))(WS, BS),
    "grad of vmap": lambda s: grad(lambda w, b: vmap(loss(s))(w, b).sum(), (0, 1))(WS, BS),
    "vmap of vmap": lambda s: vmap(lambda w: vmap(lambda b: s(w, b))(BS))(WS),
    "vmap of hessian": lambda s: vmap(hessian(loss(s)))(WS, BS),
    "grad of grad of grad": lambda s: _third(s),
}


def _third(s):
    def first(b):
        return (grad(lambda b: loss(s)(W, b))(b) ** 2).sum()

    return grad(lambda b: (grad(first)(b) ** 2).sum())(B)


def _flat(out):
    return torch.cat([t.reshape(-1) for t in (out if isinstance(out, tuple) else (out,))])


@functools.cache
def _reference(name, solve):
    return _flat(TRANSFORMS[name](solve)).detach()


@pytest.mark.parametrize(
    ("route", "estimator", "reference"),
    [(through_args, EXACT, unrolled), (through_closure, EXACT, unrolled), (through_closure, JFB(), one_step)],
    ids=["args-IFT", "closure-IFT", "closure-JFB"],
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_equals_the_reference(name, estimator, reference, route):
    mine, truth = _flat(TRANSFORMS[name](route(estimator))), _reference(name, reference)
    assert truth.norm() > 0
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", [EXACT, JFB()], ids=["IFT", "JFB"])
def test_forward_over_forward_is_refused(estimator):
    with pytest.raises(NotImplementedError, match="hessian"):
        jacfwd(jacfwd(loss(through_args(estimator))))(W, B)


def test_the_forward_mode_of_autograd_under_its_own_vmap_is_refused():
    solve = functools.partial(loss(through_args(EXACT)), b=B)
    with pytest.raises(NotImplementedError, match="jacfwd"):
        torch.autograd.functional.jacobian(solve, W, vectorize=True, strategy="forward-mode")


@pytest.mark.parametrize("estimator", [EXACT, JFB()], ids=["IFT", "JFB"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameters_of_a_functional_call_around_the_solve(name, estimator):
    class Layer(nn.Linear):
        def forward(self, input):
            return fixed_point(lambda z: f(z, self.weight, input), ZERO, stop=TIGHT, grad=estimator).value

    layer = Layer(3, 3, bias=False, dtype=F64)
    own = layer.weight
    around = _flat(TRANSFORMS[name](lambda w, b: functional_call(layer, {"weight": w}, (b,))))
    torch.testing.assert_close(around, _flat(TRANSFORMS[name](through_args(estimator))), rtol=1e-9, atol=1e-9)
    assert layer.weight is own


def test_vmap_over_the_parameters_of_a_module():
    layers = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(4)]
    for i, layer in enumerate(layers):
        with torch.no_grad():
            layer.weight.copy_(WS[i])
    stacked, _ = torch.func.stack_module_state(layers)

    def solve(params, x):
        def g(z, x):
            return torch.tanh(functional_call(layers[0], params, z) + x)

        return fixed_point(g, ZERO, x, stop=TIGHT, grad=EXACT).value

    together = vmap(solve, (0, None))(stacked, B)
    apart = [fixed_point(lambda z, m=m: torch.tanh(m(z) + B), ZERO, stop=TIGHT).value for m in layers]
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-10, atol=1e-12)


def test_nested_states_and_integer_args_under_grad():
    def g(state, b, shift):
        return {"p": torch.tanh(0.5 * state["q"] + b), "q": 0.3 * torch.sin(state["p"]) + shift}

    start = {"p": ZERO, "q": ZERO}

    def mine(b):
        return sum(t.square().sum() for t in fixed_point(g, start, b, 1, stop=TIGHT, grad=EXACT).value.values())

    def truth(b):
        state = start
        for _ in range(100):
            state = g(state, b, 1)
        return sum(t.square().sum() for t in state.values())

    torch.testing.assert_close(grad(mine)(B), grad(truth)(B), rtol=1e-10, atol=1e-12)


def test_an_equilibrium_inside_an_equilibrium_under_grad():
    def outer(z, w, b):
        inner = fixed_point(lambda v, z: 0.4 * torch.sin(v) + z, ZERO, z, stop=TIGHT, grad=EXACT).value
        return 0.5 * torch.tanh(inner @ w.T) + b

    def truth(w, b):
        z = ZERO
        for _ in range(36):
            v = ZERO
            for _ in range(30):
                v = 0.4 * torch.sin(v) + z
            z = 0.5 * torch.tanh(v @ w.T) + b
        return z

    def mine(w, b):
        return fixed_point(outer, ZERO, w, b, stop=TIGHT, grad=EXACT).value

    a, c = grad(loss(mine), (0, 1))(W, B), grad(loss(truth), (0, 1))(W, B)
    torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)


def test_an_operator_without_forward_mode_is_pushed_by_two_pullbacks():
    class NoForward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * ctx.saved_tensors[0].cos()

    def mine(b):
        return fixed_point(lambda z, b: 0.5 * NoForward.apply(z) + b, ZERO, b, stop=TIGHT, grad=EXACT).value

    b = torch.autograd.functional.jacobian(mine, B)
    z = mine(B)
    truth = torch.diag((1 / (1 - 0.5 * z.cos())).reshape(-1)).reshape(2, 3, 2, 3)
    torch.testing.assert_close(b, truth, rtol=1e-9, atol=1e-10)
    pushed = jvp(mine, (B,), (torch.ones_like(B),))[1]
    torch.testing.assert_close(pushed, 1 / (1 - 0.5 * z.cos()), rtol=1e-9, atol=1e-10)


def test_the_other_fields_of_the_solution_keep_their_axes_under_vmap():
    def solve(b):
        s = fixed_point(f, ZERO, W, b, stop=TIGHT)
        return s.residual, s.evals, s.result

    residual, evals, result = vmap(solve)(BS)
    assert residual.shape == evals.shape == result.shape == (4, 2)
    assert (result == implicit.Result.CONVERGED).all()


@pytest.mark.parametrize("estimator", [EXACT, JFB(60)])
def test_a_tensor_that_is_argument_and_closed_over_too(estimator):
    """Both ways count, as they do for ordinary backward passes."""

    def both(b):
        return fixed_point(lambda z, c: torch.tanh(z @ W.T + b * c), ZERO, b, stop=TIGHT, grad=estimator).value.sum()

    truth = grad(lambda b: unrolled(W, b * b).sum())(B)
    torch.testing.assert_close(grad(both)(B), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", ["closed over", "args", "start too"])
def test_forward_mode_by_dual_numbers(given):
    move = _random(2, 3, seed=3)
    with forward_ad.dual_level():
        b = forward_ad.make_dual(B, move)
        if given == "args":
            solution = fixed_point(f, ZERO, W, b, stop=TIGHT, grad=EXACT)
        else:
            solution = fixed_point(lambda z: f(z, W, b), b if given == "start too" else ZERO, stop=TIGHT, grad=EXACT)
        tangent = forward_ad.unpack_dual(solution.value).tangent
    torch.testing.assert_close(tangent, jvp(lambda b: unrolled(W, b), (B,), (move,))[1], rtol=1e-9, atol=1e-9)


def test_unrolling_inside_transforms_takes_a_fixed_number():
    fixed = Stop(rtol=0, atol=0, max_evals=200)

    def solve(stop, **how):
        return lambda b: fixed_point(f, ZERO, W, b, solver=Picard(), stop=stop, grad=Unrolled(**how)).value.sum()

    torch.testing.assert_close(grad(solve(fixed))(B), grad(lambda b: unrolled(W, b).sum())(B), rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match="max_evals"):
        grad(solve(TIGHT))(B)
    with pytest.raises(NotImplementedError, match="checkpoint"):
        grad(solve(fixed, checkpoint=True))(B)


def test_a_starting_state_that_f_closes_over():
    def solve(x):
        return fixed_point(lambda z: torch.tanh(z @ W.T + x), x, stop=TIGHT, grad=EXACT).value

    expected = grad(lambda b: (unrolled(W, b) ** 3).sum())(B)
    torch.testing.assert_close(grad(lambda x: (solve(x) ** 3).sum())(B), expected, rtol=1e-9, atol=1e-11)
    pushed = jvp(lambda b: unrolled(W, b), (B,), (B.sin(),))[1]
    torch.testing.assert_close(jvp(solve, (B,), (B.sin(),))[1], pushed, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("estimator", [EXACT, JFB()], ids=["IFT", "JFB"])
@pytest.mark.parametrize("name", ["vmap over inputs", "vmap over parameters", "jvp", "jacfwd", "grad"])
def test_gradients_switched_off_around_a_transform(name, estimator, mode):
    if isinstance(estimator, JFB) and name in ("jvp", "jacfwd", "grad"):
        reference = one_step
    else:
        reference = unrolled
    truth = _reference(name, reference)
    with mode():
        mine = _flat(TRANSFORMS[name](through_closure(estimator)))
    torch.testing.assert_close(mine.clone(), truth, rtol=1e-9, atol=1e-9)


def _nested(solve):
    return lambda w, b: solve(lambda u: torch.sin(solve(lambda z: 0.5 * torch.tanh(z @ w.T + u))) @ WS[1].T + b)


def _by_iterating(f):
    z = ZERO
    for _ in range(20):  # converged to 1e-16, and so are its second derivatives
        z = f(z)
    return z


@pytest.mark.parametrize("name", ["jvp", "hessian", "jacrev of jacrev", "vmap over parameters"])
def test_an_equilibrium_inside_an_equilibrium(name):
    mine = _nested(lambda f: fixed_point(f, ZERO, stop=TIGHT, grad=EXACT).value)
    truth = _flat(TRANSFORMS[name](_nested(_by_iterating)))
    torch.testing.assert_close(_flat(TRANSFORMS[name](mine)), truth, rtol=1e-8, atol=1e-9)


def test_newton_krylov_around_an_inner_solve():
    value = _nested(lambda f: fixed_point(f, ZERO, stop=TIGHT, solver=implicit.NewtonKrylov()).value)(W, B)
    torch.testing.assert_close(value, _nested(_by_iterating)(W, B), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "option",
    [{"trace": True}, {"keep_state": True}, {"state": object()}, {"compact": True}],
    ids=lambda o: next(iter(o)),
)
def test_an_option_that_a_transform_cannot_give_is_refused(option):
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        grad(lambda w: fixed_point(lambda z: f(z, w, B), ZERO, **option).value.sum())(W)


def test_a_callback_is_called_inside_a_transform():
    calls = []
    grad(lambda w: fixed_point(lambda z: f(z, w, B), ZERO, callback=lambda n, r: calls.append(n)).value.sum())(W)
    assert calls[:3] == [1, 2, 3]


def test_the_map_is_linearized_once_a_linear_solve():
    calls = [0]

    def counted(z, w):
        calls[0] += 1
        return f(z, w, B)

    grad(lambda w: fixed_point(counted, ZERO, w, stop=TIGHT, grad=EXACT).value.sum())(W)
    with torch.no_grad():
        solve = fixed_point(f, ZERO, W, B, stop=TIGHT).evals.max().item()
    assert calls[0] == solve + 4  # closure conversion, the value on record, linearization, u^T df/dtheta


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 3e-3), (torch.float16, 3e-4), (torch.float32, 1e-6)])
def test_claims_in_half_precision(dtype, rtol):
    """The solve inside a transform rounds and classifies as the one outside does."""
    w, x = (0.25 * _random(8, 8)).to(dtype), _random(16, 8, seed=1).to(dtype)
    stop = Stop(rtol=rtol, atol=0, max_evals=60)

    def solve(w):
        found = fixed_point(lambda z, w: torch.tanh(z @ w.T + x), torch.zeros_like(x), w, stop=stop)
        return found.value.float().sum(), (found.value, found.result)

    _, (value, result) = grad(solve, has_aux=True)(w)
    outside = fixed_point(lambda z, w: torch.tanh(z @ w.T + x), torch.zeros_like(x), w, stop=stop)
    assert torch.equal(result, outside.result) and torch.equal(value, outside.value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("recorded", [False, True])
@each_solver
def test_a_fixed_count_of_an_ensemble_is_mapped_step_by_step(solver, recorded):
    """vmap over weights while the start is one: histories that are written in place would be one too."""
    rng = torch.Generator().manual_seed(0)
    w = 0.3 * torch.randn(2, 4, 4, generator=rng, dtype=F64)
    z0, stop = torch.zeros(2, 4, dtype=F64), Stop(rtol=0, atol=0, max_evals=9)

    def value(w):
        return fixed_point(lambda z: torch.tanh(z @ w + 1), z0, solver=solver, grad=Unrolled(), stop=stop).value

    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(torch.vmap(value)(w), torch.stack([value(one) for one in w]), rtol=1e-12, atol=1e-14)
