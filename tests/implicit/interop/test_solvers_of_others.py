"""scipy and torchdeq: their solvers on maps of the tests, and solvers of the package inside torchdeq."""

import pytest
import torch
import torchdeq

from implicit import Anderson, AndersonGS, Broyden, Result, Stop
from implicit.interop import scipy as from_scipy
from implicit.interop import torchdeq as from_torchdeq
from implicit.testing import problem

F64 = torch.float64
STOP = Stop(rtol=1e-8, atol=0, max_evals=2000)


@pytest.mark.parametrize(
    ("method", "options"), [("hybr", {}), ("krylov", {"fatol": 1e-10}), ("broyden1", {"fatol": 1e-10})]
)
def test_scipy_finds_what_is_known(method, options):
    p = problem("H 0.99")
    found = from_scipy.root(p, p.z0, method=method, stop=STOP, **options)
    assert found.converged.all() and float(p.residual(found.value).max()) <= 1e-8
    assert int(found.evals.sum()) == p.calls - 1  # the last call is at the answer
    torch.testing.assert_close(found.value, p.solution, rtol=1e-6, atol=1e-6)


def test_scipys_answers_are_classified_by_the_same_rule():
    p = problem("H 0.99")
    found = from_scipy.root(p, p.z0, stop=Stop(rtol=1e-8, max_evals=5))
    assert found.result.tolist() == [Result.MAX_EVALS] and int(found.evals) == 5
    state = {"a": torch.ones(2, 3), "b": torch.ones(2, 1)}
    both = from_scipy.root(lambda z: {"a": z["a"].cos(), "b": 0.5 * z["b"] + 1}, state)
    assert both.converged.all() and both.value["a"].dtype == torch.float32
    torch.testing.assert_close(both.value["b"], torch.full((2, 1), 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [Anderson(), AndersonGS(), Broyden()], ids=lambda s: type(s).__name__)
def test_ours_inside_a_torchdeq_layer(solver):
    p, name = problem("tanh layers", torch.float32), f"implicit-{type(solver).__name__}"
    from_torchdeq.register(name, solver)
    deq = torchdeq.get_deq(f_solver=name, b_solver=name, f_tol=1e-5, b_tol=1e-5, f_stop_mode="rel", ift=True)
    x = p.args[0].clone().requires_grad_()
    (value,), info = deq(lambda z: p(z, x), p.z0)
    assert float(p.residual(value.detach()).max()) <= 1e-4 and info["nstep"].shape == (4,)
    (got,) = torch.autograd.grad(value.sum(), x)
    import implicit

    y = p.args[0].clone().requires_grad_()
    ours = implicit.fixed_point(p, p.z0, y, stop=Stop(rtol=1e-5, atol=0)).value
    torch.testing.assert_close(got, torch.autograd.grad(ours.sum(), y)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["broyden", "anderson", "fixed_point_iter"])
def test_torchdeqs_answers_are_classified_by_the_same_rule(method):
    p = problem("Bratu")
    found = from_torchdeq.solve(p, p.z0, *p.args, method=method, stop=Stop(rtol=1e-6, atol=0, max_evals=200))
    assert (found.converged == (p.residual(found.value) <= 1e-6)).all()
    assert int(found.evals[0]) == p.calls - 1 and found.value.shape == p.z0.shape


@pytest.mark.parametrize("method", ["hybr", "lm", "krylov"])
def test_differences_of_float32_maps_have_a_step_that_they_can_see(method):
    scipy = pytest.importorskip("implicit.interop.scipy")
    assert scipy.root(lambda z: 0.5 * torch.cos(z), torch.zeros(2, 3), method=method).converged.all()


@pytest.mark.parametrize("solve", [from_scipy.root, from_torchdeq.solve])
@pytest.mark.parametrize(("stop", "name"), [(Stop(norm="max"), "norm"), (Stop(when=lambda z, f: z > 0), "when")])
def test_criteria_that_are_not_used_are_refused_by_name(solve, stop, name):
    with pytest.raises(ValueError, match=f"Stop.{name}"):
        solve(torch.cos, torch.zeros(2, 3), stop=stop)
