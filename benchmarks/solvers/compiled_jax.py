"""Times jitted jaxopt for `compiled.py`, in an environment with jax and jaxopt, without torch.

Prints as JSON {name: microseconds of CPU time per evaluation of f}, and the seconds of compiling.
"""

import json
import os
import statistics
import time
from importlib.metadata import version

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # pyright: ignore[reportMissingImports]
import jaxopt  # pyright: ignore[reportMissingImports]
import numpy as np

EVALS = 30


def main() -> None:
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    w, z0 = jax.numpy.asarray(0.5 * orthogonal, "float32"), jax.numpy.zeros((1, 64), "float32")

    def f(z):
        return jax.numpy.tanh(z @ w + 0.1)

    tight = {"maxiter": EVALS - 1, "tol": 0.0, "implicit_diff": False}
    runs = {
        "bare loop": lambda z: jax.lax.fori_loop(0, EVALS, lambda _, z: f(z), z),
        "FixedPointIteration": lambda z: jaxopt.FixedPointIteration(f, **tight).run(z).params,
        "AndersonAcceleration(5)": lambda z: jaxopt.AndersonAcceleration(f, history_size=5, **tight).run(z).params,
        "Broyden": lambda z: jaxopt.Broyden(lambda z: f(z) - z, stepsize=1.0, **tight).run(z).params,
    }
    spent, waited = {}, {}
    for name, run in runs.items():
        jitted = jax.jit(run)
        start = time.perf_counter()
        jitted(z0).block_until_ready()
        waited[name] = round(time.perf_counter() - start, 1)
        times = []
        for _ in range(10):  # a block of solves at once: another thread of jax computes, and its CPU time comes late
            start = time.process_time()
            for _ in range(40):
                jitted(z0).block_until_ready()
            times.append((time.process_time() - start) / 40)
        spent[name] = statistics.median(times) / EVALS * 1e6
    print(json.dumps({"spent": spent, "waited": waited, "versions": {n: version(n) for n in ("jax", "jaxopt")}}))


if __name__ == "__main__":
    main()
