"""jaxopt's and optimistix's solvers on the fourteen problems, in a separate environment.

    python3 -m venv peers && peers/bin/pip install . scipy jaxopt==0.8.5 optimistix "jax[cpu]"
    peers/bin/python -m benchmarks.solvers.peers_jax     writes benchmarks/results/peers_jax.json

`evaluations.py` adds these rows to its tables. The maps are those of `implicit.testing`, which jax calls back; each
call and each product with the Jacobian counts as one evaluation. All samples form one system, because neither package
batches. A problem counts as solved when every sample has been evaluated at a point within the tolerance, independently
of the solver's own stopping criterion.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import RESULTS, provenance, write_result
from implicit.testing import Problem, problems

try:
    import jax  # pyright: ignore[reportMissingImports]
    import jaxopt  # pyright: ignore[reportMissingImports]
    import optimistix  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    sys.exit(f"{missing}: install jaxopt, optimistix and jax in an environment of their own, see {__file__}.")

BUDGET = 300
Map = Callable[[Any], Any]


class Watched:
    """A problem as a map of flat numpy vectors; it records which samples have been within the tolerance."""

    def __init__(self, problem: Problem, rtol: float) -> None:
        self.problem, self.rtol = problem, rtol
        self.best = torch.full((len(problem.z0),), torch.inf, dtype=torch.float64)

    @property
    def solved(self) -> bool:
        return bool((self.best <= 1.2 * self.rtol).all())

    def _state(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).reshape(self.problem.z0.shape)

    def _spend(self) -> None:
        if self.solved or self.problem.calls >= BUDGET:
            raise StopIteration

    def f(self, x: np.ndarray) -> np.ndarray:
        self._spend()
        z = self._state(x)
        self.best = torch.fmin(self.best, self.problem.residual(z))
        return self.problem(z, *self.problem.args).numpy().ravel()

    def jvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """J v."""
        self._spend()
        return torch.func.jvp(self._map, (self._state(x),), (self._state(v),))[1].numpy().ravel()

    def vjp(self, x: np.ndarray, g: np.ndarray) -> np.ndarray:
        """J^T g."""
        self._spend()
        return torch.func.vjp(self._map, self._state(x))[1](self._state(g))[0].numpy().ravel()

    def _map(self, z: torch.Tensor) -> torch.Tensor:
        return self.problem(z, *self.problem.args)

    def in_jax(self, backward: bool) -> Map:
        """f as a function of jax, with J^T g if `backward`, else with batches of J v."""

        def called(function: Callable[..., np.ndarray], *arrays: Any) -> Any:
            kind = jax.ShapeDtypeStruct(arrays[-1].shape, arrays[-1].dtype)
            return jax.pure_callback(function, kind, *arrays, vmap_method="sequential")

        def jvp(x: Any, v: Any) -> Any:
            return called(self.jvp, x, v)

        def vjp(x: Any, g: Any) -> Any:
            return called(self.vjp, x, g)

        @jax.custom_jvp
        def f(x: Any) -> Any:
            return called(self.f, x)

        @f.defjvp  # pyright: ignore[reportFunctionMemberAccess]
        def product(primals: Any, tangents: Any) -> Any:
            (x,), (v,) = primals, tangents
            return f(x), jax.custom_derivatives.linear_call(jvp, vjp, x, v) if backward else jvp(x, v)

        return f


def solvers() -> dict[str, Callable[[Map, Any], Any]]:
    """The solvers of both packages for fixed points and for roots; jaxopt's Broyden with and without line search."""
    never = {"maxiter": BUDGET, "tol": 0.0, "implicit_diff": False}

    def finds(solver: Any) -> Callable[[Map, Any], Any]:
        return lambda f, x: optimistix.root_find(lambda z, _: f(z) - z, solver, x, max_steps=BUDGET, throw=False)

    def repeats(f: Map, x: Any) -> Any:
        solver = optimistix.FixedPointIteration(**tight)
        return optimistix.fixed_point(lambda z, _: f(z), solver, x, max_steps=BUDGET, throw=False)

    tight = {"rtol": 1e-300, "atol": 1e-300}
    return {
        "jaxopt FixedPointIteration": lambda f, x: jaxopt.FixedPointIteration(f, **never).run(x),
        "jaxopt AndersonAcceleration": lambda f, x: jaxopt.AndersonAcceleration(f, **never).run(x),
        "jaxopt Broyden": lambda f, x: jaxopt.Broyden(lambda z: f(z) - z, **never).run(x),
        "jaxopt Broyden, step 1": lambda f, x: jaxopt.Broyden(lambda z: f(z) - z, stepsize=1.0, **never).run(x),
        "optimistix FixedPointIteration": repeats,
        "optimistix Newton": finds(optimistix.Newton(**tight)),
        "optimistix Chord": finds(optimistix.Chord(**tight)),
    }


def evaluations(dtype: torch.dtype, rtol: float) -> dict[str, dict[str, int | str]]:
    """Solver -> problem -> evaluations, or the kind of failure."""
    jax.config.update("jax_enable_x64", dtype == torch.float64)  # else jaxopt's Anderson mixes float32 and float64
    table: dict[str, dict[str, int | str]] = {}
    for name, solve in solvers().items():
        table[name] = {}
        for p in problems(dtype):
            watched, why = Watched(p, rtol), ""
            try:
                jax.block_until_ready(
                    solve(watched.in_jax(name.startswith("jaxopt")), jax.numpy.asarray(p.z0.numpy().ravel()))
                )
            except Exception as error:  # jax reports the end of the budget as an error of the callback
                spent = "StopIteration" in str(error)
                why = "" if spent else f": {type(error).__name__}"
            worst = float(watched.best.max())
            table[name][p.name] = p.calls if watched.solved else f"failed at {worst:.0e}{why}"
        print(name, table[name], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers_jax.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = {
        **provenance("cpu", "jax", "jaxopt", "optimistix"),
        "evaluations": {
            "float64 to 1e-10": evaluations(torch.float64, 1e-10),
            "float32 to 1e-5": evaluations(torch.float32, 1e-5),
        },
    }
    write_result(options.out, result)


if __name__ == "__main__":
    main()
