"""The networks in the repository: allocation of iterations, starts of the solves, and parallel-in-time sampling.

python -m benchmarks.diffusion.shipped_sampling     writes benchmarks/results/shipped_sampling.json, and prints tables

All tables are for 16 images (seed 0, classes in turn), 20 timesteps and the network's guidance. They have root mean
square differences of pixels in 0..1 from samples with 40 Anderson iterations per timestep, or from sequential sampling.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.checkpoint.open_network import OpenedNetwork, open_network
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.models import FPDM
from apps.diffusion.sampling.plan import plan
from apps.diffusion.sampling.sampler import SampleResult, sample
from benchmarks.harness import RESULTS, provenance, write_result
from benchmarks.report.formatting import table
from implicit import Anderson, AndersonGS, Picard

IMAGES, STEPS = 16, 20
TOTALS = (30, 40, 60, 80)
ALLOCATIONS = ("constant", "increasing", "decreasing", "measured")
SOLVERS = {"Picard": Picard(), "Anderson(5)": Anderson(memory=5), "AndersonGS": AndersonGS()}
STARTS = {"fresh start": "off", "previous solution": "on", "previous solution and history": "history"}
TOLERANCES = (1e-2, 1e-3, 1e-4)


def draw(opened: OpenedNetwork, count: int = IMAGES, **options: Any) -> SampleResult:
    """`count` samples of the seed 0, classes in turn, with these sampling options and the network's guidance."""
    given = SamplingOptions(**({"sampler": "ddim", "steps": STEPS} | options))
    chosen = plan(opened.model, opened.scheduler, given, defaults=opened.options)
    labels, device = [i % 10 for i in range(count)], opened.model.device
    return sample(
        opened.model, range(count), labels, plan=chosen, seed=0, chunk=count, reproducible=False, device=device
    )


def distance(one: Tensor, other: Tensor) -> Tensor:
    """|one - other| of pixels in 0..1."""
    return (one.clamp(-1, 1) - other.clamp(-1, 1)).abs() / 2


def rms(one: Tensor, other: Tensor) -> float:
    return distance(one, other).square().mean().sqrt().item()


def allocations(opened: OpenedNetwork, solved: Tensor) -> dict[str, dict[str, float]]:
    """Iterations of the complete trajectory -> allocation -> RMS difference from `solved`."""
    assert isinstance(opened.model, FPDM)
    rows = 2 if opened.options.value("guidance") != 1 else 1
    found = {}
    for total in TOTALS:
        budget = rows * (STEPS * (opened.model.block_passes(1) - 1) + total)
        ways = {name: draw(opened, block_passes=budget, allocation=name) for name in ALLOCATIONS}
        found[str(total)] = {name: rms(way.samples, solved) for name, way in ways.items()}
    return found


def starts(opened: OpenedNetwork, solved: Tensor) -> dict[str, dict[str, dict[str, float]]]:
    """Solver -> start -> RMS difference from `solved` and mean relative residual, at three iterations per timestep."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, solver in SOLVERS.items():
        for start, reuse in STARTS.items():
            if reuse == "history" and name == "Picard":  # Picard has no solver state
                continue
            result = draw(opened, iterations=(3,), solver=solver, reuse=reuse)
            cell = {"RMS": rms(result.samples, solved), "residual": result.effort.residuals.mean().item()}
            found.setdefault(name, {})[start] = cell
    return found


def parallel(opened: OpenedNetwork) -> dict[str, dict[str, dict[str, float]]]:
    """Sampler and solver -> tolerance -> rounds, RMS and largest difference from the sequential sampler."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for sampler in ("ddim", "ddpm"):
        sequential = draw(opened, sampler=sampler).samples
        for solver in ("anderson", "picard"):
            for rtol in TOLERANCES:
                result = draw(opened, sampler=sampler, parallel=solver, parallel_rtol=rtol)
                assert result.effort.rounds is not None
                found.setdefault(f"{sampler}, {solver}", {})[f"{rtol:g}"] = {
                    "rounds": result.effort.rounds.max().item(),
                    "RMS": rms(result.samples, sequential),
                    "largest": distance(result.samples, sequential).max().item(),
                }
    return found


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Marker in docs/sampling.md -> its table."""
    fpdm, names = found["mnist-fpdm"], [f"{rtol:g}" for rtol in TOLERANCES]
    shares = [[total, *(f"{row[name]:.4f}" for name in ALLOCATIONS)] for total, row in fpdm["allocations"].items()]
    solves = [
        [name, *(f"{row[s]['RMS']:.4f} ({row[s]['residual']:.3f})" if s in row else "-" for s in STARTS)]
        for name, row in fpdm["starts"].items()
    ]
    rounds = [
        [
            f"{network}, {way}",
            *(f"{row[rtol]['rounds']:.0f}" for rtol in names),
            *(f"{row[rtol]['RMS']:.4f}" for rtol in names),
            f"{row['0.001']['largest']:.3f}",
        ]
        for network in ("mnist-dit", "mnist-fpdm")
        for way, row in found[network]["parallel"].items()
    ]
    head = (f"rounds of {STEPS} timesteps, `rtol` {names[0]}", *names[1:], f"RMS difference of pixels at {names[0]}")
    return {
        "allocations": table(("iterations in all", *ALLOCATIONS), shares),
        "starts": table(("3 iterations a timestep", *STARTS), solves),
        "parallel": table(("network, sampler", *head, *names[1:], "largest at 0.001"), rounds),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "shipped_sampling.json", help="result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    fpdm, dit = open_network("mnist-fpdm"), open_network("mnist-dit")
    solved = draw(fpdm, iterations=(40,), solver=Anderson(memory=5)).samples
    found = {
        "command": "python -m benchmarks.diffusion.shipped_sampling",
        **provenance("cpu"),
        "guidance": fpdm.options.value("guidance"),
        "mnist-fpdm": {
            "allocations": allocations(fpdm, solved),
            "starts": starts(fpdm, solved),
            "parallel": parallel(fpdm),
        },
        "mnist-dit": {"parallel": parallel(dit)},
    }
    write_result(options.out, found)
    print("\n\n".join(tables(found).values()))


if __name__ == "__main__":
    main()
