"""Tables of `benchmarks/diffusion/run.py`: training steps, sampling steps, the solver around the block, parameters.

Every function takes the scale and the number of repeats and returns rows; the steps of a table are timed in turn.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdeq.solver import anderson_solver, broyden_solver, fixed_point_iter

from apps.diffusion.models import FPDM, DiT
from benchmarks.diffusion import steps
from benchmarks.diffusion.steps import Inputs, Scale, Step
from benchmarks.harness import paired, peak_bytes
from implicit import AbstractSolver, Anderson, AndersonGS, Broyden, Picard, Stop, fixed_point

MIB = 2**20
SAMPLING = (1, 3, 10, 26)
"""Iterations of the sampling steps."""


@dataclass(frozen=True)
class Trained:
    """A training step of a network, with an estimator of `steps.ESTIMATORS` or `steps.TORCHDEQ`."""

    network: str
    estimator: str = ""
    checkpointed: bool = False

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.network, self.estimator, "checkpointed" if self.checkpointed else "")))

    def step(self, scale: Scale) -> Step:
        batch, checkpointing = steps.inputs(scale), self.checkpointed
        if self.network in EXPLICIT:
            explicit = EXPLICIT[self.network](scale, checkpointing=checkpointing)
            return steps.training(explicit, _called(explicit, batch), scale)
        network = steps.fpdm(scale, checkpointing=checkpointing)
        if self.network == "FPDM":
            return steps.training(network, steps.ours(network, batch, *steps.ESTIMATORS[self.estimator]), scale)
        solve = steps.by_torchdeq(steps.BUDGET, **steps.TORCHDEQ[self.estimator])
        return steps.training(network, steps.solved_by(network, batch, solve), scale)


EXPLICIT = {"DiT": steps.dit, "diffusers' DiT": steps.diffusers_dit}
TRAINED = (
    *(Trained(network, checkpointed=flag) for network in EXPLICIT for flag in (False, True)),
    *(Trained("FPDM", name) for name in steps.ESTIMATORS),
    *(Trained("FPDM", name, True) for name in steps.ESTIMATORS if name.startswith(("S-JFB", "Unrolled"))),
    *(Trained("FPDM by torchdeq", name) for name in steps.TORCHDEQ),
)
"""The first is DiT without checkpointing, with which the others are compared."""


def training(scale: Scale, repeats: int) -> list[dict[str, Any]]:
    """Forward and backward pass: peak memory, time, images per second, and memory and time divided by the DiT's."""
    rows = {row.name: row.step(scale) for row in TRAINED}
    peaks = {name: peak_bytes(step, scale.device) for name, step in rows.items()}
    times = paired(rows, repeats, scale.device)
    base = TRAINED[0].name
    return [
        {
            "network": row.network,
            "estimator": row.estimator,
            "checkpointed": row.checkpointed,
            "batch": scale.batch,
            "peak MiB": round(peaks[row.name] / MIB, 1),
            "peak / DiT": round(peaks[row.name] / peaks[base], 3),
            "seconds": round(statistics.median(times[row.name]), 4),
            "time / DiT": _ratio(times[row.name], times[base]),
            "images per second": round(scale.batch / statistics.median(times[row.name]), 2),
        }
        for row in TRAINED
    ]


def _called(network: nn.Module, batch: Inputs) -> Callable[[], Tensor]:
    """The network's prediction, also for diffusers' DiT, which returns it in an object."""

    def predict() -> Tensor:
        answer = network(*batch)
        return answer if isinstance(answer, Tensor) else answer.sample

    return predict


def sampling(scale: Scale, repeats: int) -> list[dict[str, Any]]:
    """One evaluation of the network: time, block passes per second, and time divided by that of the eager DiT.

    "floor": the time divided by that of the same blocks and iterations in a bare loop.
    """
    batch = steps.inputs(scale)
    table: list[dict[str, Any]] = []
    modes = ["eager", "compiled"] + (["compiled, one CUDA graph"] if scale.device == "cuda" else [])
    base: list[float] = []
    for mode in modes:
        dit, fpdm = steps.dit(scale), steps.fpdm(scale)
        if mode != "eager":
            torch.compiler.reset()
            dit.compile_blocks()
            fpdm.compile_blocks()
        wrap = steps.captured if "graph" in mode else _same
        chosen = {"DiT": steps.sampling(_called(dit, batch), scale)}
        if mode == "eager":
            peer = steps.diffusers_dit(scale)
            chosen["diffusers' DiT"] = steps.sampling(_called(peer, batch), scale)
        for k in SAMPLING:
            chosen[f"FPDM {k}"] = steps.sampling(steps.ours(fpdm, batch, k), scale)
            chosen[f"floor {k}"] = steps.sampling(steps.floor(fpdm, batch, k), scale)
        times = paired({name: wrap(step) for name, step in chosen.items()}, repeats, scale.device)
        base = base or times["DiT"]
        table += [_sampling_row(scale, mode, name, times, base, dit, fpdm) for name in chosen if "floor" not in name]
    return table


def _sampling_row(
    scale: Scale, mode: str, name: str, times: dict[str, list[float]], base: list[float], dit: DiT, fpdm: FPDM
) -> dict[str, Any]:
    median = statistics.median(times[name])
    k = int(name.split()[1]) if name.startswith("FPDM") else None
    passes, macs = (dit.block_passes(), dit.macs()) if k is None else (fpdm.block_passes(k), fpdm.macs(k))
    return {
        "network": name.split()[0] if k else f"{name}-{scale.depth}",
        "iterations": k,
        "mode": mode,
        "seconds": round(median, 4),
        "time / DiT": _ratio(times[name], base),
        "MACs / DiT": round(macs / dit.macs(), 3),
        "block passes per second": round(scale.batch * passes / median, 1),
        "time / floor": _ratio(times[name], times[f"floor {k}"]) if k else None,
    }


def _same(step: Step) -> Step:
    return step


SOLVERS: dict[str, AbstractSolver[Any]] = {
    "Picard": Picard(),
    "Anderson": Anderson(),
    "AndersonGS": AndersonGS(),
    "Broyden": Broyden(),
}


def around_the_block(scale: Scale, repeats: int) -> list[dict[str, Any]]:
    """Time of a solve of 12 evaluations without a graph, divided by the time of these evaluations in a bare loop."""
    network, batch = steps.fpdm(scale), steps.inputs(scale)
    layer, z0 = steps.layer(network, batch)
    count, calls = steps.BUDGET, 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return layer(z)

    def bare() -> Tensor:
        z = z0
        for _ in range(count):
            z = f(z)
        return z

    chosen: dict[str, Callable[[], Any]] = {"bare loop": bare}
    for name, solver in SOLVERS.items():
        for kind, rtol in (("fixed count", 0.0), ("tolerance", 1e-30)):
            stop = Stop(rtol=rtol, atol=0.0, max_evals=count)
            chosen[f"{name}, {kind}"] = lambda solver=solver, stop=stop: fixed_point(f, z0, solver=solver, stop=stop)
    for solve in (fixed_point_iter, anderson_solver, broyden_solver):
        run = partial(solve, f, z0, max_iter=count, tol=0.0, stop_mode="rel")
        chosen[f"torchdeq {solve.__name__}, tolerance"] = run
    run_once = {name: steps.sampling(run, scale) for name, run in chosen.items()}
    evaluations = {}
    for name, run in run_once.items():
        calls = 0
        run()
        evaluations[name] = calls
    times = paired(run_once, repeats, scale.device)
    each = {name: [seconds / evaluations[name] for seconds in t] for name, t in times.items()}
    return [
        {
            "solver": name,
            "evaluations": evaluations[name],
            "seconds per evaluation": round(statistics.median(t), 5),
            "over the bare loop": _ratio(t, each["bare loop"]),
        }
        for name, t in each.items()
    ]


def parameters(scale: Scale, repeats: int) -> list[dict[str, Any]]:
    """Number of weights, and bytes of weights, gradients and AdamW's moments in float32, at this scale and at XL/2."""
    rows: list[dict[str, Any]] = []
    for name, size in (("XL/2", steps.XL), (f"hidden {scale.hidden}", scale)):
        with torch.device("meta"):
            common = {"input_size": size.side, "hidden_size": size.hidden, "num_heads": size.heads, "learn_sigma": True}
            networks = {"DiT": DiT(**common, depth=size.depth), "FPDM": FPDM(**common)}
        counts = {kind: sum(p.numel() for p in network.parameters()) for kind, network in networks.items()}
        for kind, count in counts.items():
            rows.append(
                {
                    "network": f"{kind} {name}",
                    "parameters": count,
                    "of DiT's": round(count / counts["DiT"], 4),
                    "weights, gradients and optimizer GB": round(16 * count / 1e9, 3),
                }
            )
    return rows


def _ratio(times: list[float], base: list[float]) -> float:
    """Median over the pairs."""
    return round(statistics.median(a / b for a, b in zip(times, base, strict=True)), 3)
