"""The public surface: types that are refused, summaries, and no import of the compiler."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import implicit
from implicit import DEQ, GMRES, IFT, Anderson, Broyden, Reversible, Stop, fixed_point
from implicit.autodiff.recomputation import require_same_derivatives
from tests.helpers import ESTIMATORS, Waits, each_solver, half, solve, watching

IMPORT = """
import os, sys, time, torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
for _ in range(6):
    if os.fork() == 0:
        before, began = set(sys.modules), time.process_time()
        import implicit
        seconds, new = time.process_time() - began, {name.split(".")[0] for name in set(sys.modules) - before}
        print(seconds, "torch._dynamo" in sys.modules, *new - set(sys.stdlib_module_names), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_import_adds_little_to_that_of_torch_and_leaves_the_compiler_out(tmp_path):
    """No package but the declared ones. The first process compiles the modules, as an installer does, and is not
    counted.
    """
    command = [sys.executable, "-c", IMPORT, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, compiler, *packages = zip(*(line.split() for line in out.stdout.splitlines()), strict=True)
    assert {name for names in packages for name in names} <= {"implicit", "jaxtyping", "numpy"}
    assert len(seconds) == 6 and set(compiler) == {"False"}
    assert min(map(float, seconds[1:])) < 0.3  # seconds of CPU; other work on the machine only adds to them


def test_the_version_is_that_of_the_project():
    assert implicit.__version__.count(".") == 2


@pytest.mark.parametrize(
    ("name", "given"), [("solver", "anderson"), ("grad", "jfb"), ("stop", 1e-3), ("solver", Anderson)]
)
def test_a_wrong_type_is_named(name, given):
    options = {name: given}
    with pytest.raises(Exception, match=name):  # a TypeError, where the tests do not check types before
        fixed_point(half, torch.zeros(2, 3), **options)


def test_a_solution_shows_how_it_ended_in_one_line():
    shown = repr(solve(half, torch.zeros(2, 3)))
    assert "2 CONVERGED" in shown and "\n" not in shown


def test_a_layer_shows_its_settings():
    shown = repr(DEQ(half))
    assert "Multisecant(" in shown and "IFT(" in shown and "Stop(rtol=0.0001" in shown


def test_a_solution_in_place_of_a_tensor_is_named():
    layer = torch.nn.Sequential(DEQ(half), torch.nn.Linear(3, 1))
    with pytest.raises(TypeError, match="value"):
        layer(torch.zeros(2, 3))
    chained = torch.nn.Sequential(DEQ(half, return_value=True), torch.nn.Linear(3, 1))
    assert chained(torch.zeros(2, 3)).shape == (2, 1)


class OneWidth(TorchDispatchMode):
    """A device without float64: every operator that returns such a tensor fails; a number of Python has no device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.ndim and t.dtype == torch.float64:
                raise TypeError(f"no such number on this device: {func}")
        return out


def test_reversible_refuses_a_device_without_float64_by_name():
    with OneWidth(), pytest.raises(TypeError, match="float64"):
        fixed_point(half, torch.zeros(3, 4), grad=Reversible())


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in ("IFT", "Reversible")])
@pytest.mark.parametrize("stop", [Stop(norm="leaf"), Stop(rtol=0, max_evals=9)], ids=str)
def test_no_gradient_of_a_float32_state_makes_float64_on_the_device(estimator, stop):
    """IFT has float64 numbers on the host, which this device cannot tell from its own."""
    w = torch.ones(4, requires_grad=True)
    with OneWidth():
        found = fixed_point(
            lambda z: 0.5 * torch.tanh(z * w) + 1, torch.zeros(3, 4), grad=ESTIMATORS[estimator](), stop=stop
        )
        found.value.sum().backward()
    assert w.grad is not None and w.grad.isfinite().all()


@each_solver
@pytest.mark.parametrize("stop", [Stop(), Stop(late=True), Stop(rtol=0, max_evals=9), Stop(norm="max")], ids=str)
def test_no_solve_of_a_float32_state_makes_float64_on_the_device(solver, stop):
    rate = torch.tensor([[0.3], [0.9], [0.5]])
    with torch.no_grad(), OneWidth():
        found = fixed_point(lambda z: rate * torch.tanh(z + 0.1) + 1, torch.zeros(3, 4), solver=solver, stop=stop)
    assert torch.isfinite(found.value).all()


class NoFloat64(TorchDispatchMode):
    """`OneWidth` that refuses tensors of one number too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)):
            raise TypeError(f"no such number on this device: {func}")
        return out


def test_derivatives_of_two_evaluations_are_compared_without_float64():
    first = [torch.full((3,), 1e-4, dtype=dtype) for dtype in (torch.float32, torch.float16, torch.complex64)]
    first += [None, torch.zeros(0)]
    with NoFloat64():
        require_same_derivatives([t if t is None else t.clone() for t in first], first, 1e-7)
        for i in range(3):
            other = [t if t is None else t.clone() for t in first]
            other[i][1] *= 3
            with pytest.raises(RuntimeError, match="another map"):
                require_same_derivatives(other, first, 1e-7)


class Accelerator(Waits):
    """A device without float64, of which numpy reads nothing; what `.cpu()` gives is on the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_host = bool(args) and hasattr(args[0], "_host")
        if getattr(func, "__name__", "") in ("numpy", "__array__") and not on_host:
            raise TypeError("numpy reads no tensor of this device")
        out = super().__torch_function__(func, types, args, kwargs)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.ndim and t.dtype == torch.float64 and not hasattr(t, "_host"):
                raise TypeError(f"no such number on this device: {func}")
        return out


@pytest.mark.parametrize("solver", [None, GMRES(memory=3)], ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_the_linear_solve_of_ift_reads_through_the_host_and_makes_no_float64_on_the_device(solver, again):
    w = torch.full((4,), 0.7, requires_grad=True)
    value = fixed_point(lambda z: torch.tanh(z.roll(1, 1) * w) + 1, torch.zeros(3, 4), grad=IFT(solver)).value
    with watching(Accelerator()):
        (g,) = torch.autograd.grad(value.sum(), w, create_graph=again)
        if again:
            g.square().sum().backward()
    assert g.isfinite().all() and (not again or w.grad.isfinite().all())


def test_the_linear_solve_of_ift_by_a_solver_of_fixed_points_makes_no_float64_on_the_device():
    w = torch.full((4,), 0.7, requires_grad=True)
    value = fixed_point(lambda z: torch.tanh(z.roll(1, 1) * w) + 1, torch.zeros(3, 4), grad=IFT(Broyden())).value
    with OneWidth():
        (g,) = torch.autograd.grad(value.sum(), w)
    assert g.isfinite().all()
