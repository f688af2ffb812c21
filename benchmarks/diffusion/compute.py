"""Cost of sampling and training steps at XL/2: multiply-accumulates, bytes, roofline times of GPUs, kernels, CPU times.

    python -m benchmarks.diffusion.compute          writes benchmarks/results/compute_xl.json in some minutes

The counts are made by running the models on tensors without values. MACs and bytes are counted on fake tensors, with
attention as one kernel. Kernels are counted on the meta device, where a read of a value by the host raises; a step that
runs there therefore has no host synchronization.

    MACs     half of what torch's FlopCounterMode counts in matrix products, convolutions and attention
    bytes    sum of the bytes that each operator reads and writes, as without kernel fusion
    time     >= max(2 MACs / peak, bytes / bandwidth)         the roofline (Williams et al. 2009)
    kernels  operators other than views

A bare loop is the same network with the fixed-point layer written as a `for` loop. A solve of k evaluations has
`SOLVE[0] + SOLVE[1] k` more kernels than the bare loop, most of them on one number per sample. A training step of n
evaluations without and m with a graph has `TRAINING[0] + TRAINING[1] n + TRAINING[2] m` more kernels.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from apps.diffusion.models import FPDM, DiT, layers
from benchmarks.diffusion import steps
from benchmarks.diffusion.steps import Scale, Step
from benchmarks.harness import RESULTS, VIEWS, OperatorCounter, paired, provenance, ratio, read_result, write_result
from implicit import JFB, Unrolled

XL = replace(steps.XL, device="cpu", batch=1)
SOLVE = (21, 9)
TRAINING = (39, 9, 14)
SAMPLED = 26
"""Iterations of the sampling step: 28 block passes, as many as the DiT's."""
OURS = f"sampling step, FPDM, {SAMPLED} iterations"
BARE = f"{OURS}, as a bare loop"
TRAINED = (6, 7)
"""(n, m) of the training step: the expected draw of S-JFB with N = M = 12."""


@dataclass(frozen=True)
class Card:
    """Peak numbers of a GPU, without sparsity, from its data sheet.

    Attributes:
        half: operations per second of the matrix units in bfloat16 or float16.
        single: operations per second in float32.
        bandwidth: memory bandwidth in bytes per second.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    source: str


CARDS = (
    Card("A100 80GB SXM", 312e12, 19.5e12, 2039e9, "NVIDIA A100 Tensor Core GPU data sheet, 2021"),
    Card("H100 SXM", 989e12, 67e12, 3350e9, "NVIDIA H100 Tensor Core GPU data sheet, 2023"),
    Card("T4 16GB", 65e12, 8.1e12, 320e9, "NVIDIA T4 data sheet, 2019; half is float16"),
)

ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}
"""FLOP counts of a CPU's fused attention, with the formula of a GPU's: the backward pass computes the scores again."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators other than views read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.itemsize for t in tensors)
        return out


def network(kind: type[DiT] | type[FPDM], scale: Scale) -> Any:
    """The network on the scale's device."""
    depth: dict[str, Any] = {"depth": scale.depth} if kind is DiT else {}
    made: Any
    with torch.device(scale.device):
        made = kind(input_size=scale.side, hidden_size=scale.hidden, num_heads=scale.heads, learn_sigma=True, **depth)
    return made


def works(scale: Scale) -> dict[str, tuple[nn.Module, Step, int]]:
    """Name of a step -> the network, a function that makes the step once, and its MACs by the formula of the models."""
    fpdm, dit, batch = (
        steps.draw_weights(network(FPDM, scale)),
        steps.draw_weights(network(DiT, scale)),
        steps.inputs(scale),
    )
    free, tracked = TRAINED
    tokens = torch.zeros(scale.batch, fpdm.tokens, scale.hidden, device=scale.device, dtype=fpdm.dtype)
    condition = torch.zeros(scale.batch, scale.hidden, device=scale.device, dtype=fpdm.dtype)
    with torch.no_grad():
        prepared = fpdm.prepare(tokens, condition)
    block, (one, more) = fpdm.blocks_pre[0], (fpdm.macs(1), fpdm.macs(2))
    return {
        "block": (block, steps.sampling(lambda: block(tokens, condition), scale), dit.block_macs()),
        "iteration": (fpdm, steps.sampling(lambda: fpdm.iteration(tokens, *prepared), scale), more - one),
        "sampling step, DiT": (dit, steps.sampling(lambda: dit(*batch), scale), dit.macs()),
        OURS: (
            fpdm,
            steps.sampling(steps.ours(fpdm, batch, SAMPLED), scale),
            fpdm.macs(SAMPLED),
        ),
        "training step, DiT": (dit, steps.training(dit, lambda: dit(*batch), scale), 3 * dit.macs()),
        f"training step, FPDM, (n, m) = {TRAINED}": (
            fpdm,
            steps.training(fpdm, steps.ours(fpdm, batch, free, JFB(tracked)), scale),
            3 * fpdm.macs(tracked) + free * (more - one),
        ),
    }


@contextmanager
def _without_values() -> Iterator[None]:
    """Fake tensors, with `gelu` as the one kernel of an accelerator instead of the sigmoid form of a CPU."""
    kernel = partial(F.gelu, approximate="tanh")
    with FakeTensorMode(), mock.patch.object(layers, "gelu", kernel):
        yield


def counted(scale: Scale) -> list[dict[str, Any]]:
    """For each step: MACs by count and by formula, bytes, and the roofline time of each GPU."""
    rows = []
    with _without_values():
        for name, (module, step, formula) in works(scale).items():
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
                step()
            with Traffic() as traffic:
                step()
            macs = flops.get_total_flops() // 2
            for precision, size in (("fp32", 4), ("bf16", 2)):  # numbers of half the size
                row = {"work": name, "batch": scale.batch, "precision": precision, "MACs": macs}
                row |= {"MACs by formula": formula * scale.batch, "bytes": traffic.bytes * size // 4}
                rows.append(row | {"roofline ms": {card.name: 1e3 * roofline(card, row) for card in CARDS}})
    return rows


def roofline(card: Card, row: dict[str, Any]) -> float:
    """The roofline time of a row on a GPU, in seconds."""
    peak = card.half if row["precision"] == "bf16" else card.single
    return max(2 * row["MACs"] / peak, row["bytes"] / card.bandwidth)


def kernels_over_a_bare_loop(scale: Scale, free: int, tracked: int) -> tuple[int, int]:
    """Kernels of our step and of a bare loop; with tracked = 0, of a sampling step of `free` iterations."""
    fpdm = network(FPDM, replace(scale, device="meta"))
    x, t, y = (part.to("meta") for part in steps.inputs(scale))
    batch = (x, t, y)
    for parameter in fpdm.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def bare(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(free):
                z = f(z)
        for _ in range(tracked):
            z = f(z)
        return z

    loop = steps.solved_by(fpdm, batch, bare)
    if tracked:
        solve = steps.ours(fpdm, batch, free, JFB(tracked)) if free else steps.ours(fpdm, batch, tracked, Unrolled())
        pair = [steps.training(fpdm, predict, scale) for predict in (solve, loop)]
    else:
        pair = [steps.sampling(predict, scale) for predict in (steps.ours(fpdm, batch, free), loop)]
    counts = []
    for step in pair:
        with OperatorCounter() as counter:
            step()
        counts.append(counter.count)
    return counts[0], counts[1]


def timed(repeats: int, scale: Scale, save: Callable[[dict[str, Any]], None], known: dict[str, Any]) -> None:
    """Measures median CPU seconds of the steps that `known` lacks, alternating between steps of the same kind, and the
    ratio of our sampling step to the bare loop. `save` is called after each kind.
    """
    found = {name: known[name] for name in ("cpu", "beside a bare loop") if name in known}
    chosen = works(scale)
    fpdm: Any = chosen[OURS][0]
    kinds = {name: step for name, (_, step, _) in chosen.items()}
    kinds[BARE] = steps.sampling(steps.floor(fpdm, steps.inputs(scale), SAMPLED), scale)
    for prefixes in (("block", "iteration"), ("sampling",), ("training",)):
        group = {name: step for name, step in kinds.items() if name.startswith(prefixes)}
        if group.keys() <= {row["work"] for row in found.get("cpu", [])}:
            continue
        times = paired(group, repeats)
        rows = [{"work": name, "seconds": statistics.median(each), "all": each} for name, each in times.items()]
        found = found | {"cpu": found.get("cpu", []) + rows}
        if OURS in group:
            found["beside a bare loop"] = ratio(times, OURS, BARE)
        save(found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "compute_xl.json", help="result file; resumed if it exists"
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each timed step; 0: no timing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    old = read_result(options.out)
    result: dict[str, Any] = old | {
        "command": "python -m benchmarks.diffusion.compute",
        **provenance("cpu", "diffusers"),
        "cards": [vars(card) for card in CARDS],
        "counts": old.get("counts", []),
    }
    for batch in (1, 64):
        if batch not in {row["batch"] for row in result["counts"]}:
            result["counts"] += counted(replace(XL, batch=batch))
            write_result(options.out, result)
    result["kernels"] = {
        f"{free} free, {tracked} tracked": kernels_over_a_bare_loop(XL, free, tracked)
        for free, tracked in ((SAMPLED, 0), TRAINED)
    }
    write_result(options.out, result)
    if options.repeats:
        timed(options.repeats, XL, lambda found: write_result(options.out, result | found), result)


if __name__ == "__main__":
    main()
