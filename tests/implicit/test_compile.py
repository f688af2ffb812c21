"""torch.compile: a solve of a fixed count is one graph, and one to a tolerance compiles once, however long it takes.

Compiled in a process of its own, as users run it: dynamo cannot see through the type checks of the tests. The backend
is "eager", which captures the same graphs as any other and makes no code of them, but for one test.
"""

import json
import operator
import os
import subprocess
import sys
from dataclasses import InitVar, dataclass, replace
from itertools import product
from pathlib import Path
from shutil import which

import pytest
import torch
from torch._dynamo.utils import compilation_time_metrics, counters

from implicit import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    AndersonGS,
    Broyden,
    Multisecant,
    Neumann,
    Picard,
    Reversible,
    Stop,
    fixed_point,
)
from implicit.solvers import AbstractSolver
from implicit.testing import problem
from tests.helpers import SOLVERS

COUNT = Stop(rtol=0, atol=0, max_evals=4)
GRADS = {
    type(g).__name__: g
    for g in (
        IFT(stop=COUNT, on_failure="ignore"),
        JFB(2),
        Neumann(2),
        SHINE(),
        Reversible(on_drift="ignore"),
    )
}
COMPILED = {type(s).__name__: s for s in SOLVERS}
WINDOWS = {type(s).__name__: s for s in (Picard(), Anderson(5), AndersonGS(5), Broyden(5), Multisecant(5))}
TO_TOLERANCE = ["Picard", "AndersonGS"]
X = torch.linspace(-1, 1, 12).view(3, 4)


def one_graph(solver):
    """A fixed count: does it agree with the eager solve, and how many graphs and breaks are there?"""

    def solve(z, x):
        return fixed_point(lambda z, x: torch.tanh(0.5 * z) + x, z, x, solver=solver, stop=COUNT).value

    with torch.no_grad():
        z0, x = torch.zeros(3, 4, dtype=torch.float64), X.double()  # eager small states take another path, to rounding
        got = torch.compile(solve, fullgraph=True, backend="eager")(z0, x)
        off = float((got - solve(z0, x)).abs().max())
    return {"off": off, "graphs": counters["stats"]["unique_graphs"], "breaks": len(counters["graph_break"])}


def one_compilation(solver):
    """A tolerance: frames compiled after each of three solves, and the evaluations they took."""

    def solve(z, x, gain):
        stop = Stop(rtol=1e-5, atol=0, max_evals=99)
        found = fixed_point(lambda z, x: torch.tanh(gain * z) + x, z, x, solver=solver, stop=stop)
        return found.value, found.evals

    frames, evals, off = [], [], 0.0
    run = torch.compile(solve, backend="eager")
    with torch.no_grad():
        for gain in map(torch.tensor, (0.1, 0.5, 0.9)):
            value, count = run(torch.zeros(3, 4), X, gain)
            off = max(off, float((value - solve(torch.zeros(3, 4), X, gain)[0]).abs().max()))
            frames.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
            evals.append(int(count.max()))
    return {"off": off, "frames": frames, "evals": evals}


def gradient(grad):
    """How far the gradient of a compiled solve is from that of the eager one."""
    weight = torch.linspace(-0.4, 0.4, 16).view(4, 4).requires_grad_()

    solver = Broyden() if isinstance(grad, SHINE) else Picard()

    def loss(weight, x):
        z0 = torch.zeros(3, 4)
        found = fixed_point(lambda z, x: torch.tanh(z @ weight) + x, z0, x, solver=solver, grad=grad, stop=COUNT)
        return found.value.square().sum()

    (eager,) = torch.autograd.grad(loss(weight, X), weight)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="eager")(weight, X), weight)
    return {"off": float((compiled - eager).norm() / eager.norm())}


def regions(solver):
    """Graphs of 9 and of 21 evaluations: nodes outside of the solver's regions, bodies of regions, and their traces."""

    def solve(z, x, evals):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        return fixed_point(lambda z, x: torch.tanh(0.5 * z) + x, z, x, solver=solver, grad=JFB(), stop=stop).value

    def capture(graph, _):
        bodies.append(sorted(name for name, part in graph.named_children() if isinstance(part, torch.fx.GraphModule)))
        called = [node for node in graph.graph.nodes if node.op.startswith("call")]
        nodes.append(sum(node.target is not operator.getitem for node in called))  # not the results of a region
        return graph

    bodies, nodes, traces, off = [], [], [], 0.0
    z0, x = torch.zeros(3, 4, dtype=torch.float64), X.double()
    for evals in (9, 21):
        torch._dynamo.reset()
        compilation_time_metrics.clear()
        with torch.no_grad():
            got = torch.compile(solve, fullgraph=True, backend=capture)(z0, x, evals)
            off = max(off, float((got - solve(z0, x, evals)).abs().max()))
        traces.append(len(compilation_time_metrics.get("invoke_subgraph_trace", ())))
    return {"off": off, "bodies": bodies, "traces": traces, "nodes": (nodes[1] - nodes[0]) / 12}


def many_solves(solver):
    """More solves in a graph, of several windows, dtypes and maps, than regions of one function by PyTorch's default.

    The last map gives NaN for some samples and evaluations.
    """
    cases = [(lambda z, x: torch.tanh(0.5 * z) + x, dtype) for dtype in (torch.float32, torch.float64)]
    cases.append((lambda z, x: torch.sqrt(x + 0.4 - z.roll(1, dims=1)), torch.float64))

    def solve(z, x):
        values = []
        for memory, (f, dtype) in product((1, 2, 5), cases):
            stop, which = Stop(rtol=0, atol=0, max_evals=5 + memory), replace(solver, memory=memory)
            found = fixed_point(f, z.to(dtype), x.to(dtype), solver=which, grad=JFB(), stop=stop)
            values.append(found.value.double())
        return torch.stack(values)

    run, off = torch.compile(solve, fullgraph=True, backend="eager"), 0.0
    with torch.no_grad():
        for z0 in (torch.zeros(3, 4), torch.ones(3, 4)):
            found = solve(z0, X)
            assert found.isfinite().all()
            off = max(off, float((run(z0, X) - found).abs().max()))
    return {"off": off, "graphs": counters["stats"]["unique_graphs"]}


def generated(solver):
    """Code made by inductor, which asserts the strides of what goes from region to region."""

    def solve(z, x):
        stop = Stop(rtol=0, atol=0, max_evals=9)
        return fixed_point(lambda z, x: torch.tanh(0.5 * z) + x, z, x, solver=solver, grad=JFB(), stop=stop).value

    z0, x = torch.zeros(3, 4, dtype=torch.float64), X.double()
    with torch.no_grad():
        got = torch.compile(solve, fullgraph=True)(z0, x)
        return {"off": float((got - solve(z0, x)).abs().max())}


def phases(solver):
    """Maps on which the first steps are plain: one is exact after few evaluations, one converges quadratically."""
    upper, x = torch.linspace(-2, 2, 36, dtype=torch.float64).view(6, 6).triu(1), torch.linspace(0.5, 2, 18)

    def solve(z, x):
        stop = Stop(rtol=0, atol=0, max_evals=4)
        maps = (lambda z, x: z @ upper + x, lambda z, x: z - (z * z - x) / (2 * z))
        return torch.stack([fixed_point(f, z, x, solver=solver, grad=JFB(), stop=stop).value for f in maps])

    z0, x = torch.full((3, 6), 0.7, dtype=torch.float64), x.double().view(3, 6)
    with torch.no_grad():
        got, expected = torch.compile(solve, fullgraph=True, backend="eager")(z0, x), solve(z0, x)
    return {"off": float((got - expected).abs().max())}


def trained(solver):
    """How far the gradient of the last evaluation is from the eager one, through AOTAutograd, and the state after."""
    weight = torch.linspace(-0.4, 0.4, 16, dtype=torch.float64).view(4, 4).requires_grad_()
    evals = 7 if isinstance(solver, Multisecant) else 9  # after 9 its newest pairs are rounding errors, and H with them
    options = {"solver": solver, "grad": JFB(), "stop": Stop(rtol=0, atol=0, max_evals=evals), "keep_state": True}

    def solve(weight, x):
        found = fixed_point(lambda z, x: torch.tanh(z @ weight) + x, torch.zeros_like(x), x, **options)
        return found.value.square().sum(), found.state

    run = torch.compile(solve, fullgraph=True, backend="aot_eager")
    (loss, state), (expected, other) = run(weight, X.double()), solve(weight, X.double())
    got, grad = (torch.autograd.grad(value, weight)[0] for value in (loss, expected))
    # both states as the inverses of I - df/dz that they hold: what lies in unused rows may differ
    kept, wanted = (solver.inverse_transpose(s, torch.ones_like(X.double())) for s in (state, other))
    return {"off": float((got - grad).norm() / grad.norm()), "state": float((kept - wanted).abs().max())}


def any_size(solver):
    """A graph for any batch size and numbers a sample: how far is it from the eager solve; the graphs compiled.

    There are no regions at open sizes.
    """

    def solve(z, x):
        stop = Stop(rtol=0, atol=0, max_evals=8)
        return fixed_point(lambda z, x: torch.tanh(0.5 * z) + x, z, x, solver=solver, grad=JFB(), stop=stop).value

    run, off = torch.compile(solve, fullgraph=True, backend="eager", dynamic=True), 0.0
    with torch.no_grad():
        for shape in ((3, 6), (5, 6), (5, 8)):
            z0, x = torch.zeros(shape, dtype=torch.float64), torch.linspace(-1, 1, shape[1], dtype=torch.float64)
            off = max(off, float((run(z0, x) - solve(z0, x)).abs().max()))
    return {"off": off, "graphs": counters["stats"]["unique_graphs"]}


def long_history(solver):
    """A history that has several blocks in eager mode: nodes of the graph, and an eager solve from its state."""
    x, stop = torch.linspace(-1, 1, 40_000, dtype=torch.float64).view(2, 20_000), Stop(rtol=0, atol=0, max_evals=8)
    nodes, same = [], {"solver": solver, "grad": JFB(), "stop": stop, "keep_state": True}

    def capture(graph, _):
        nodes.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    def solve(z, state=None):
        found = fixed_point(lambda z: torch.tanh(z.roll(1, dims=1) - z / 3) + x, z, state=state, **same)
        return found.value, found.state

    with torch.no_grad():
        found = torch.compile(solve, fullgraph=True, backend=capture)(torch.zeros_like(x))
        expected = solve(torch.zeros_like(x))
        pairs = [(found[0], expected[0]), (solve(*found)[0], solve(*expected)[0])]
    return {"off": max(float((a - b).abs().max()) for a, b in pairs), "nodes": nodes}


def several_numbers(solver):
    """One function compiled for several values of each number, which dynamo leaves open from the second one on."""
    f, z0, off = lambda z, x: torch.tanh(z.roll(1, dims=1) / 2) + x, torch.zeros(3, 12, dtype=torch.float64), {}
    x = torch.linspace(0, 1, 36, dtype=torch.float64).view(3, 12)

    def solve(z, solver, evals):
        stop = Stop(rtol=0, atol=0, max_evals=evals)
        return fixed_point(f, z, x, solver=solver, grad=JFB(), stop=stop).value

    named: dict[str, tuple] = {"memory": (3, 8), "damping": (0.1, 0.2), "ridge": (1e-8, 1e-6)}
    named |= {"drop": (0.9, 0.8), "filter": (0.2, 0.1)}
    named = {name: values for name, values in named.items() if hasattr(solver, name)}
    cases = {name: [(replace(solver, **{name: v}), 9) for v in values] for name, values in named.items()}
    cases["max_evals"] = [(replace(solver, memory=3), evals) for evals in (5, 9)]
    for name, values in cases.items():
        torch._dynamo.reset()
        run = torch.compile(solve, fullgraph=True, backend="eager")
        with torch.no_grad():
            off[name] = max([float((run(z0, *case) - solve(z0, *case)).abs().max()) for case in values])
    return {"off": off}


def continued(solver):
    """Solves that continue with the state of the one before: how far is each from the eager one; graphs after each."""
    x, off, graphs = torch.linspace(0, 1, 36, dtype=torch.float64).view(3, 12), 0.0, []

    def solve(z, x, state):
        stop, f = Stop(rtol=0, atol=0, max_evals=5), lambda z, x: torch.tanh(z.roll(1, dims=1) / 2) + x
        found = fixed_point(f, z, x, solver=solver, grad=JFB(), stop=stop, state=state, keep_state=True)
        return found.value, found.state

    run, compiled, eager = torch.compile(solve, fullgraph=True, backend="eager"), (x, None), (x, None)
    with torch.no_grad():
        for drift in torch.linspace(0, 1, 8).tolist():
            (z, state), (z_eager, state_eager) = compiled, eager
            compiled, eager = run(z, x + drift, state), solve(z_eager, x + drift, state_eager)
            off = max(off, float((compiled[0] - eager[0]).abs().max()))
            graphs.append(counters["stats"]["unique_graphs"])
    return {"off": off, "graphs": graphs}


@dataclass(frozen=True)
class Damped(AbstractSolver):
    """A user's solver that `dataclasses.replace` does not copy, with a counter in its state."""

    memory: int = 3
    share: InitVar[float] = 0.5

    def __post_init__(self, share):
        object.__setattr__(self, "kept", share)

    def init(self, point):
        return {"steps": 0, "last": point.fz}

    def step(self, point, state):
        z = (1 - self.kept) * point.z + self.kept * point.fz
        return z, None, {"steps": state["steps"] + 1, "last": point.fz}


def users_solver(solver):
    """One function compiled for several settings of a user's solver: how far is each from the eager solve?"""
    x, off = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4), 0.0

    def solve(z, which):
        stop = Stop(rtol=0, atol=0, max_evals=5)
        return fixed_point(lambda z: torch.tanh(z) / 2 + x, z, solver=which, grad=JFB(), stop=stop).value

    run = torch.compile(solve, fullgraph=True, backend="eager")
    with torch.no_grad():
        for which in (solver, Damped(share=0.25), Damped(4, share=0.75)):
            off = max(off, float((run(x, which) - solve(x, which)).abs().max()))
    return {"off": off}


def nested(solver):
    """States in dicts, tuples and lists, and starts that are drawn, in one graph of a fixed count."""

    def solve(z, x):
        def f(z):
            return {"a": [torch.tanh(0.5 * z["a"][0]) + x], "b": (z["a"][0].sum(dim=1, keepdim=True) / 9,)}

        def drawn(_):
            return {"a": [z], "b": (z[:, :1],)}

        options = {"solver": solver, "grad": JFB(), "stop": COUNT}
        found = [fixed_point(f, start, **options).value for start in (drawn(None), drawn)]
        return torch.cat([torch.cat((value["a"][0], value["b"][0]), dim=1) for value in found])

    z0, run = torch.zeros_like(X), torch.compile(solve, fullgraph=True, backend="eager")
    with torch.no_grad():
        return {"off": max([float((run(z0, x) - solve(z0, x)).abs().max()) for x in (X, X.flip(0))])}


def map_alone(solver):
    """A compiled map inside an eager solve."""
    p = problem("tanh layers", torch.float32)
    with torch.no_grad():
        eager, found = (
            fixed_point(f, p.z0, *p.args, solver=solver, stop=Stop(rtol=1e-5, atol=0))
            for f in (p.map, torch.compile(p.map, backend="eager"))
        )
    off = float((found.value - eager.value).abs().max())
    return {"off": off, "graphs": counters["stats"]["unique_graphs"]}


def all_of_it():
    jobs = [("one_graph", name, one_graph, s) for name, s in COMPILED.items()]
    jobs += [("one_compilation", name, one_compilation, COMPILED[name]) for name in TO_TOLERANCE]
    jobs += [("regions", name, regions, solver) for name, solver in WINDOWS.items()]
    jobs += [("any_size", name, any_size, solver) for name, solver in WINDOWS.items()]
    regional = {name: solver for name, solver in WINDOWS.items() if name != "Picard"}
    jobs += [("generated", name, generated, solver) for name, solver in regional.items() if which("g++")]
    jobs += [("many_solves", name, many_solves, solver) for name, solver in regional.items()]
    jobs += [("trained", name, trained, solver) for name, solver in regional.items()]
    jobs += [("long_history", name, long_history, type(solver)()) for name, solver in regional.items()]
    jobs += [("several_numbers", name, several_numbers, solver) for name, solver in regional.items()]
    jobs += [("continued", name, continued, replace(solver, memory=3)) for name, solver in regional.items()]
    jobs += [("nested", "", nested, Anderson())]
    jobs += [("users_solver", "", users_solver, Damped())]
    jobs += [("phases", "", phases, Multisecant(60))]
    jobs += [("map_alone", "", map_alone, AndersonGS())]
    jobs += [("gradient", name, gradient, grad) for name, grad in GRADS.items()]
    results = {}
    for kind, name, work, what in jobs:
        torch._dynamo.reset()
        counters.clear()
        results[f"{kind} {name}"] = work(what)
    return results


@pytest.fixture(scope="module")
def results():
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("solver", COMPILED)
def test_a_fixed_count_is_one_graph_without_a_break(results, solver):
    found = results[f"one_graph {solver}"]
    assert found["off"] < 1e-10 and found["graphs"] == 1 and found["breaks"] == 0


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_steps_of_a_fixed_count_are_compiled_once_however_many(results, solver):
    found, plain = results[f"regions {solver}"], results["regions Picard"]
    assert found["off"] < 1e-10
    few, many = found["bodies"]
    assert few == many and len(many) == 1 and found["traces"] == [1, 1]
    # an evaluation adds f and the call with its results; plain iteration has the tests of f(z) there
    assert found["nodes"] <= plain["nodes"]


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_solves_of_one_graph_have_regions_of_their_own(results, solver):
    found = results[f"many_solves {solver}"]
    assert found["off"] < 1e-5 and found["graphs"] == 1


@pytest.mark.skipif(which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_regions_pass_their_tensors_on_in_generated_code(results, solver):
    # near the end of the solve differences are nearly dependent, and rounding differs between compilers
    assert results[f"generated {solver}"]["off"] < 1e-7


@pytest.mark.parametrize("solver", WINDOWS)
def test_graphs_with_open_sizes_are_those_of_plain_iteration(results, solver):
    found = results[f"any_size {solver}"]
    assert found["off"] < 1e-10 and found["graphs"] == results["any_size Picard"]["graphs"]


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_long_histories_have_regions_and_eager_solves_continue_from_them(results, solver):
    found = results[f"long_history {solver}"]
    assert found["off"] < 1e-10 and len(found["nodes"]) == 1 and found["nodes"][0] < 300


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_a_function_compiled_for_one_number_of_a_solver_takes_others(results, solver):
    off = results[f"several_numbers {solver}"]["off"]
    assert len(off) >= 2 and max(off.values()) < 1e-10


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_compiled_solves_continue_with_the_state_of_the_one_before(results, solver):
    found = results[f"continued {solver}"]
    # once the window is full, a graph for each place of its newest pair
    assert found["off"] < 1e-10 and found["graphs"][-1] == found["graphs"][5]


def test_nested_and_drawn_states_are_one_graph(results):
    assert results["nested "]["off"] < 1e-5


@pytest.mark.parametrize("solver", [name for name in WINDOWS if name != "Picard"])
def test_a_compiled_training_step_has_the_gradient_and_the_state_of_the_eager_one(results, solver):
    found = results[f"trained {solver}"]
    assert found["off"] < 1e-10 and found["state"] < 1e-10


def test_the_solver_of_a_user_is_compiled_as_it_is(results):
    assert results["users_solver "]["off"] < 1e-12


def test_plain_steps_at_the_start_are_masks_of_one_region(results):
    assert results["phases "]["off"] < 1e-12


@pytest.mark.parametrize("solver", TO_TOLERANCE)
def test_a_tolerance_compiles_once_however_long_the_solve(results, solver):
    found = results[f"one_compilation {solver}"]
    assert found["off"] < 1e-6 and len(set(found["evals"])) > 2
    # (graphs, frames): no new graph ever, and no new frame once a solve has gone on for several evaluations
    assert len({graphs for graphs, _ in found["frames"]}) == 1
    assert found["frames"][1] == found["frames"][2]


def test_a_compiled_map_in_an_eager_solve_is_one_graph(results):
    found = results["map_alone "]
    assert found["off"] < 1e-5 and found["graphs"] == 1


@pytest.mark.parametrize("grad", GRADS)
def test_gradients_of_a_compiled_solve_are_those_of_the_eager_one(results, grad):
    assert results[f"gradient {grad}"]["off"] < 1e-5


if __name__ == "__main__":
    print(json.dumps(all_of_it()))
