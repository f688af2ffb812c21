"""Solves and gradients on a CUDA device: the values of the CPU, waits for the device, memory, CUDA graphs."""

import warnings

import pytest
import torch

from implicit import DEQ, IFT, Anderson, NewtonKrylov, Picard, Stop, fixed_point
from implicit.testing import problems
from tests.helpers import ESTIMATORS, F64, FREE, each_estimator, each_solver, relative, solver_and, synchronizations

pytestmark = pytest.mark.gpu
CUDA = "cuda"


@each_solver
@pytest.mark.parametrize("p", problems(), ids=lambda p: p.name)
def test_a_solve_ends_where_that_of_the_cpu_ends(solver, p):
    found = {}
    for device in ("cpu", CUDA):
        z0, *args = (t.to(device, F64) for t in (p.z0, *p.args))
        with torch.no_grad():
            found[device] = fixed_point(p.map, z0, *args, solver=solver, stop=Stop(rtol=1e-6, atol=0, max_evals=60))
    ours, cpu = found[CUDA], found["cpu"]
    assert ours.value.device.type == CUDA
    ended = ours.converged.cpu()
    assert (
        ended.sum() >= cpu.converged.sum() - 1
    )  # sums in another order can take the last evaluation beyond the budget
    assert (p.residual(ours.value.cpu())[ended] <= 1.001e-6).all()
    reported = ours.residual.cpu() / (ours.value.cpu().norm(dim=1) + 1e-300)
    torch.testing.assert_close(reported[ended], p.residual(ours.value.cpu())[ended], rtol=1e-2, atol=1e-9)


def layer(device, dtype):
    torch.manual_seed(0)
    w = torch.nn.Parameter((0.7 * torch.linalg.qr(torch.randn(24, 24, dtype=F64))[0]).to(device, dtype))
    x = torch.randn(5, 24, dtype=F64).to(device, dtype).requires_grad_()
    return lambda z, x: torch.tanh(z @ w + x), torch.zeros(5, 24, device=device, dtype=dtype), w, x


@each_estimator
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_gradients_are_those_of_the_cpu(estimator, dtype):
    found = {}
    tolerance = 1e-10 if dtype == F64 else 1e-5
    for device in ("cpu", CUDA):
        f, z0, w, x = layer(device, dtype)
        stop = Stop(rtol=tolerance, atol=0, max_evals=60)
        value = fixed_point(f, z0, x, stop=stop, **solver_and(estimator)).value
        found[device] = [g.cpu() for g in torch.autograd.grad(value.square().sum(), (w, x))] + [value.detach().cpu()]
    tolerance *= 1e3 if estimator == "SHINE" else 1  # the inverse that a solver leaves depends on its rounding errors
    for ours, cpu in zip(found[CUDA], found["cpu"], strict=True):
        torch.testing.assert_close(ours, cpu, rtol=2e3 * tolerance, atol=2e2 * tolerance)


def test_every_estimator_is_tried():
    assert len(ESTIMATORS) >= 10


@each_solver
def test_a_fixed_count_never_waits_for_the_device(solver):
    f, z0, _, x = layer(CUDA, torch.float32)
    with torch.no_grad():
        fixed_point(f, z0, x, solver=solver, stop=Stop(max_evals=12, **FREE))  # first use of kernels
        torch.cuda.synchronize()
        with synchronizations("error"):
            found = fixed_point(f, z0, x, solver=solver, stop=Stop(max_evals=12, **FREE))  # a wait raises
    assert found.value.isfinite().all() and (found.evals == 12).all()


@each_solver
def test_a_tolerance_waits_at_most_once_an_evaluation(solver):
    f, z0, _, x = layer(CUDA, F64)
    with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with synchronizations("warn"):
            found = fixed_point(f, z0, x, solver=solver, stop=Stop(rtol=1e-8, atol=0, max_evals=60))
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    assert bool(found.converged.all()) and len(waits) <= int(found.evals.max()) + 3


@pytest.mark.parametrize("solver", [Picard(), Anderson(3)], ids=["Picard", "Anderson"])
def test_a_fixed_count_is_captured_in_a_cuda_graph(solver):
    f, z0, _, x = layer(CUDA, torch.float32)
    x = x.detach()

    def solve():
        with torch.no_grad():
            return fixed_point(f, z0, x, solver=solver, stop=Stop(max_evals=10, **FREE)).value

    expected = solve().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solve()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve()
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
    x.add_(1)
    graph.replay()
    torch.testing.assert_close(captured, solve())


@pytest.mark.parametrize("options", [{"late": True}, {"check_every": 4}, {"late": True, "check_every": 3}], ids=str)
def test_late_and_seldom_readings_change_no_answer(options):
    f, z0, _, x = layer(CUDA, F64)
    with torch.no_grad():
        plain = fixed_point(f, z0, x, stop=Stop(rtol=1e-9, atol=0, max_evals=80))
        other = fixed_point(f, z0, x, stop=Stop(rtol=1e-9, atol=0, max_evals=80, **options))
    assert bool(plain.converged.all()) and bool(other.converged.all())
    torch.testing.assert_close(other.value, plain.value, rtol=1e-7, atol=1e-9)
    assert (relative(lambda z: f(z, x), other.value) <= 1.001e-9).all()


def beside(mate, estimator, late=False):
    """The gradient of shared weights, of five evaluations of f on four samples of which the last is left out."""
    torch.manual_seed(0)
    w = (0.3 * torch.randn(24, 24)).to(CUDA).requires_grad_()
    x = torch.randn(4, 24).to(CUDA)

    def f(z):
        h = z @ w + x
        return torch.cat((torch.tanh(h[:3]), mate(h[3:] + z[3:])))

    stop = Stop(max_evals=5, late=late, **FREE)
    value = fixed_point(f, torch.zeros_like(x), stop=stop, **solver_and(estimator)).value
    return torch.autograd.grad(value[:3].square().sum(), w)[0]


@each_estimator
@pytest.mark.parametrize(
    "mate",
    [lambda h: torch.exp(h + 3), lambda h: torch.where(h > 4, torch.nan, 2 * h.abs() + 1)],
    ids=["explodes", "ends in NaN"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_failed_sample_reaches_no_gradient_of_a_fixed_count(estimator, mate):
    torch.testing.assert_close(beside(mate, estimator), beside(torch.tanh, estimator), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["JFB", "JFB(3)", "Phantom", "Unrolled"])
def test_a_recorded_fixed_count_that_is_late_never_waits(estimator):
    expected = beside(torch.tanh, estimator)
    torch.cuda.synchronize()
    w = torch.eye(24, device=CUDA, requires_grad=True)
    z0, stop = torch.zeros(4, 24, device=CUDA), Stop(max_evals=5, late=True, **FREE)
    with synchronizations("error"):
        fixed_point(lambda z: torch.tanh(z @ w + 1), z0, stop=stop, **solver_and(estimator))  # a wait raises
    torch.testing.assert_close(beside(torch.tanh, estimator, late=True), expected)


def test_memory_of_ift_does_not_grow_with_the_evaluations():
    def peak(count):
        f, _, w, _ = layer(CUDA, torch.float32)
        x = torch.randn(4096, 24, device=CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stop = Stop(max_evals=count, **FREE)
        value = fixed_point(f, torch.zeros_like(x), x, solver=Picard(), stop=stop, grad=IFT(on_failure="ignore")).value
        value.sum().backward()
        assert w.grad is not None
        return torch.cuda.max_memory_allocated() - before

    assert peak(40) <= 1.05 * peak(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_a_solve(dtype):
    f, z0, w, x = layer(CUDA, torch.float32)
    with torch.autocast(CUDA, dtype):
        value = fixed_point(f, z0, x, stop=Stop(rtol=1e-2, atol=0, max_evals=40)).value
    exact = fixed_point(f, z0, x, stop=Stop(rtol=1e-6, atol=0, max_evals=60)).value
    assert (value - exact).norm() / exact.norm() < 0.05
    value.float().sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


def test_transforms_of_functorch():
    f, z0, w, x = layer(CUDA, F64)

    def value(weight, row):
        def g(z, r):
            return torch.tanh(z @ weight + r)

        stop = Stop(rtol=1e-10, atol=0, max_evals=80)
        return fixed_point(g, torch.zeros_like(row), row, stop=stop, batch_dims=0).value

    per_sample = torch.func.vmap(torch.func.jacrev(value, argnums=1), (None, 0))(w.detach(), x.detach())
    whole = fixed_point(f, z0, x, stop=Stop(rtol=1e-10, atol=0, max_evals=80)).value
    first = torch.autograd.grad(whole[0].sum(), x)[0][0]
    torch.testing.assert_close(per_sample[0].sum(0), first, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:TensorFloat32:UserWarning")
def test_a_compiled_layer_trains():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()).to(CUDA)
    with torch.no_grad():
        block[0].weight.mul_(0.5)
    compiled = torch.compile(block)
    gradients = {}
    for name, f in (("eager", block), ("compiled", compiled)):
        block.zero_grad()
        deq = DEQ(lambda z, x, f=f: f(z + x), stop=Stop(rtol=1e-5, max_evals=40))
        x = torch.ones(3, 16, device=CUDA)
        deq(torch.zeros(3, 16, device=CUDA), x).value.square().sum().backward()
        gradients[name] = block[0].weight.grad.clone()
    torch.testing.assert_close(gradients["compiled"], gradients["eager"], rtol=1e-3, atol=1e-5)


def test_newton_krylov_through_fused_attention():
    torch.manual_seed(0)
    q = 0.3 * torch.randn(16, 16, device=CUDA)

    def f(z):
        h = (z @ q).view(z.shape[0], 1, 4, 16)
        return 0.5 * torch.nn.functional.scaled_dot_product_attention(h, h, h).reshape(z.shape) + 1

    z0 = torch.zeros(2, 4, 16, device=CUDA)
    with torch.no_grad():
        found = fixed_point(f, z0, solver=NewtonKrylov(), stop=Stop(rtol=1e-5, max_evals=60))
    assert bool(found.converged.all())
    torch.testing.assert_close(f(found.value), found.value, rtol=1e-4, atol=1e-4)
