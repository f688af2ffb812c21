"""Gradient estimators of `implicit` and torchdeq on four layers: error, direction, time, memory, evaluations, products.

python -m benchmarks.gradients.run            writes benchmarks/results/gradients.json and prints it as tables
python -m benchmarks.report.gradients           writes the tables and the figure from that file
"""

import argparse
import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gradients.contenders import CONTENDERS, STOP, Ours, Theirs, forwards
from benchmarks.gradients.layers import LAYERS
from benchmarks.harness import paired, provenance, ratio, write_result
from benchmarks.report.gradients import RESULT, tables
from implicit import AndersonGS, StochasticJFB, Stop, fixed_point
from implicit.diagnostics import spectral_radius
from implicit.diagnostics.gradient_bias import row
from implicit.diagnostics.profiling import Measured, measure
from implicit.diagnostics.reference_gradient import exact_gradient
from implicit.options import Problem
from implicit.pytree import Layout

DRAWS = 16
COMMON_FORWARD = "implicit Picard"
COMMON = f"time over {COMMON_FORWARD}"


def target(value: Tensor) -> Tensor:
    """A loss with a random gradient: the projection of the solution on a fixed random vector."""
    v = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(value)
    return (v * value).sum() / value.shape[0]


def loss(contender: Ours | Theirs, x: Tensor, f: Callable[..., Tensor]) -> Tensor:
    return target(contender.value(f, torch.zeros_like(x), x))


def truth(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, str, float]:
    """The exact gradient in float64, the method that computed it, and the spectral radius."""
    f, x = copy.deepcopy(layer).double(), x.double()
    z0 = torch.zeros_like(x)
    gradient, kind = exact_gradient(Problem(f, z0, (x,)), tuple(f.parameters()), target, AndersonGS(), Layout.of(z0))
    few = x[:8]
    with torch.no_grad():
        z = fixed_point(f, torch.zeros_like(few), few, stop=Stop(rtol=1e-12, atol=0, max_evals=1000)).value
    return gradient, kind, float(spectral_radius(f, z, few, products=200, tol=0.05).max())


def table(name: str, repeats: int) -> dict[str, Any]:
    """One layer's rows."""
    layer = LAYERS[name]()
    x, params = layer.x, list(layer.parameters())
    exact, kind, radius = truth(layer, x)
    taken: dict[str, list[Measured]] = {}
    runs: dict[str, Callable[[], object]] = {**forwards(layer, torch.zeros_like(x), x)}
    for label, contender in CONTENDERS.items():
        draws = DRAWS if isinstance(contender, Ours) and isinstance(contender.grad, StochasticJFB) else 1
        taken[label] = [measure(partial(loss, contender, x), layer, params) for _ in range(draws)]
        if all(one.gradient is not None for one in taken[label]):
            runs[label] = partial(_gradient, partial(loss, contender, x), layer, params)
    times = paired(runs, repeats)
    rows = []
    for label, contender in CONTENDERS.items():
        over = {
            base: ratio(times, label, base)["median"] if label in times else None for base in forwards_of(contender)
        }
        found = asdict(row(label, taken[label], exact, math.nan))
        found |= {"forward": contender.forward, "time": over[contender.forward], COMMON: over[COMMON_FORWARD]}
        rows.append({key: None if value != value else value for key, value in found.items()})  # NaN is not JSON
    return {
        "layer": name,
        "state": list(x.shape),
        "parameters": sum(p.numel() for p in params),
        "spectral radius": round(radius, 3),
        "truth": f"float64, {kind}",
        "forward milliseconds": {key: round(1e3 * min(times[key]), 2) for key in times if key not in CONTENDERS},
        "rows": rows,
    }


def forwards_of(contender: Ours | Theirs) -> set[str]:
    """Names of the forward solves by whose time a contender's time is divided."""
    return {contender.forward, COMMON_FORWARD}


def _gradient(forward: Callable[..., Tensor], f: Callable[..., Tensor], params: Sequence[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows record failed solves
        torch.autograd.grad(forward(f), params, allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS), help="others stay as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(options.out.read_text())["tables"] if options.out.exists() else {}
    for name in options.layers:
        old[name] = provenance("cpu", "torchdeq") | {"repeats": options.repeats} | table(name, options.repeats)
        print(f"{name}: done", flush=True)
        save(old, options.out)
    print(tables(json.loads(options.out.read_text())))


def save(found: dict[str, Any], path: Path) -> None:
    """Write the results measured so far."""
    result = {
        "command": "python -m benchmarks.gradients.run",
        "config": {"stop": asdict(STOP), "draws of StochasticJFB": DRAWS, "dtype": "float32"},
        "error": "relative, of the gradient with respect to all parameters, to the exact one in float64",
        "saved, peak": "bytes of tensors alive between the passes and at the peak of both, parameters and inputs not "
        "counted (implicit.diagnostics.profiling.Bytes); workspaces inside operators are not seen",
        "time": "CPU time of forward and backward over that of the forward solve without gradients, by the same "
        "library and solver; runs take turns, medians of the ratios",
        "tables": {name: found[name] for name in LAYERS if name in found},
    }
    write_result(path, result)


if __name__ == "__main__":
    main()
