"""Peak memory of a training step at XL/2, computed on fake tensors: no GPU and no allocation of the weights.

    python -m benchmarks.diffusion.memory              writes benchmarks/results/memory_xl.json and prints the table
    python -m benchmarks.diffusion.memory --validate   also runs real steps on the CPU at batch 1 (a 24 GiB machine)

A step is forward, mean squared error, backward and AdamW, learned sigma, 4 x 32 x 32 latents. `FakeTensorMode` carries
shapes and storages through the very code that trains; `MemTracker` adds the storages alive: parameters, gradients,
optimizer state, activations and temporaries. Workspaces inside kernels and fragmentation of an allocator are not in it.
The validation counts the same quantity on real tensors with `harness.MemoryTracker`, which shares no code with it.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from apps.diffusion.models import FPDM, DiT
from benchmarks.harness import RESULTS, MemoryTracker, provenance, read_result, write_result
from benchmarks.report.formatting import table
from implicit import JFB, AbstractGrad, Unrolled

GIB = 2**30
CARDS = {"80 GB": 80e9, "16 GB": 16e9}
"""Nominal capacities in bytes; the share that a CUDA context and fragmentation take is not subtracted."""

ESTIMATORS: dict[str, tuple[int, AbstractGrad]] = {
    "S-JFB (0, 1)": (1, Unrolled()),
    "S-JFB (6, 6), near the expected draw": (6, JFB(6)),
    "S-JFB (12, 12), the worst draw": (12, JFB(12)),
    "JFB": (12, JFB()),
}
"""Evaluations before the estimator's own, and the estimator. Counts are fixed, as fake tensors have no values; IFT and
Reversible read values in their backward passes and are therefore missing here."""


@dataclass(frozen=True)
class Case:
    """One training step."""

    network: str
    batch: int
    estimator: str = ""
    checkpointed: bool = False
    precision: str = "fp32"

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.network, self.estimator, "checkpointed" if self.checkpointed else "", self.precision


@dataclass(frozen=True)
class Size:
    hidden: int = 1152
    heads: int = 16
    depth: int = 28
    side: int = 32


XL = Size()


def build(case: Case, size: Size) -> nn.Module:
    shape = {"input_size": size.side, "hidden_size": size.hidden, "num_heads": size.heads, "learn_sigma": True}
    if case.network == "FPDM":
        network: nn.Module = FPDM(**shape)
    elif case.network == "DiT":
        network = DiT(depth=size.depth, **shape)
    else:
        network = DiTTransformer2DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.hidden // size.heads,
            in_channels=4,
            out_channels=8,
            num_layers=size.depth,
            sample_size=size.side,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    if case.checkpointed:
        network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]: diffusers' models have it
    return network


def training_step(case: Case, size: Size) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    """The network, its optimizer, and a closure that makes one step."""
    network = build(case, size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, foreach=False)
    x = torch.randn(case.batch, 4, size.side, size.side)
    t, y = torch.randint(1000, (case.batch,)), torch.randint(1000, (case.batch,))
    options: dict[str, Any] = {}
    if case.network == "FPDM":
        free, grad = ESTIMATORS[case.estimator]
        options = {"iterations": free, "grad": grad}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            if case.network == "diffusers' DiT":
                out = network(x, timestep=t, class_labels=y).sample
            else:
                out = network(x, t, y, **options)
            loss = out.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return network, optimizer, step


def fake_peak(case: Case, size: Size = XL) -> int:
    """Peak bytes of the second step, when the optimizer's state exists."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, optimizer, step = training_step(case, size)
        tracker = MemTracker()
        tracker.track_external(network, optimizer)
        with tracker:
            step()
            tracker.reset_mod_stats()
            step()
        snapshot = tracker.get_tracker_snapshot("peak")
    return max(int(device["Total"]) for device in snapshot.values())


def real_peak(case: Case, size: Size = XL) -> int:
    """The same on real tensors on the CPU: bytes of storages alive."""
    gc.collect()
    with MemoryTracker() as memory:
        _, _, step = training_step(case, size)
        step()
        step()
    return memory.peak


def cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """DiT, diffusers' DiT, and FPDM by each estimator; checkpointing where every estimator supports it."""
    flags = ((False, "fp32"), (True, "fp32"), (False, "bf16"), (True, "bf16"))
    for batch, (checkpointed, precision) in itertools.product(batches, flags):
        yield Case("DiT", batch, "", checkpointed, precision)
        for estimator in ESTIMATORS:
            if checkpointed and not estimator.startswith("S-JFB"):
                continue
            yield Case("FPDM", batch, estimator, checkpointed, precision)
    for batch, checkpointed in itertools.product(batches, (False, True)):
        yield Case("diffusers' DiT", batch, "", checkpointed)


def largest_batch(peaks: dict[int, int], capacity: float) -> int:
    """The largest batch that fits, from peaks at several batches: memory is affine in the batch size."""
    (a, low), (b, high) = min(peaks.items()), max(peaks.items())
    slope = (high - low) / (b - a)
    return max(0, int((capacity - (low - slope * a)) // slope))


def by_row(measured: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[int, int]]:
    """Row -> batch -> peak bytes."""
    rows: dict[tuple[str, str, str, str], dict[int, int]] = {}
    for found in measured:
        case = Case(**found["case"])
        rows.setdefault(case.row, {})[case.batch] = found["peak bytes"]
    return rows


def markdown(measured: list[dict[str, Any]]) -> str:
    """Peaks in GiB by batch, share of the DiT's, and the largest batch on each card."""
    rows = by_row(measured)
    batches = sorted({batch for peaks in rows.values() for batch in peaks})
    lines = []
    for row, peaks in rows.items():
        base = rows.get(("DiT", "", *row[2:]), {})
        at = 8 if 8 in peaks and 8 in base else None
        share = f"{peaks[at] / base[at]:.2f}" if at else "-"
        fits = [str(largest_batch(peaks, size)) if len(peaks) > 1 else "-" for size in CARDS.values()]
        sizes = [f"{peaks[b] / GIB:.2f}" if b in peaks else "-" for b in batches]
        lines.append([", ".join(filter(None, row)), *sizes, share, *fits])
    head = ["training step", *(f"batch {b}" for b in batches), "of the same DiT, batch 8"]
    return table([*head, *(f"largest batch, {card}" for card in CARDS)], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "memory_xl.json", help="result file; resumed if it exists"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64], help="batch sizes")
    parser.add_argument("--validate", action="store_true", help="compare with real steps on the CPU at batch 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = {
        "command": "python -m benchmarks.diffusion.memory",
        "size": asdict(XL),
        "optimizer": "AdamW, float32",
        **provenance("cpu", "diffusers"),
        "peaks": read_result(options.out).get("peaks", []),
        "validation": read_result(options.out).get("validation", []),
    }
    known = {Case(**found["case"]) for found in result["peaks"]}
    for case in cases(tuple(options.batches)):
        if case in known:
            continue
        start = time.perf_counter()
        result["peaks"].append({"case": asdict(case), "peak bytes": fake_peak(case)})
        write_result(options.out, result)
        print(
            f"{case}: {result['peaks'][-1]['peak bytes'] / GIB:.2f} GiB, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    if options.validate:
        for case in (Case("DiT", 1), Case("FPDM", 1, "S-JFB (6, 6), near the expected draw")):
            found = {"case": asdict(case), "fake": fake_peak(case), "real": real_peak(case)}
            result["validation"] = [v for v in result["validation"] if v["case"] != asdict(case)] + [found]
            write_result(options.out, result)
    print(markdown(result["peaks"]))


if __name__ == "__main__":
    main()
