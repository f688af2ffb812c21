"""Peak memory of a training step at XL/2 without a GPU, predicted on fake tensors.

    python -m benchmarks.diffusion.memory                writes benchmarks/results/memory_xl.json and prints the tables
    python -m benchmarks.diffusion.memory --validate     compares predictions with real steps (14 GiB of free memory)
    python -m benchmarks.diffusion.memory --largest      searches the largest batch on each GPU with checkpointing

A step is forward, mean squared error, backward and fused AdamW, as in training; learned sigma, 4 x 32 x 32 latents.
`FakeTensorMode` runs the training code with shapes and storages only; `MemTracker` sums the storages that are alive:
parameters, gradients, optimizer state, activations and temporaries. The prediction leaves out workspaces inside kernels
and fragmentation of the allocator. On fake tensors IFT takes one product in its backward pass. In real steps on the CPU
`harness.MemoryTracker`, which shares no code with `MemTracker`, counts the same quantity.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from apps.diffusion.models import FPDM, DiT
from benchmarks.diffusion import steps
from benchmarks.diffusion.largest_batch import CARDS, Case, searched
from benchmarks.diffusion.memory_tables import by_row, markdown
from benchmarks.harness import RESULTS, MemoryTracker, provenance, read_result, write_result
from implicit import JFB, AbstractGrad, Unrolled

ESTIMATORS: dict[str, tuple[int, AbstractGrad]] = {
    "S-JFB (0, 1)": (1, Unrolled()),
    "S-JFB (6, 6), near the expected draw": (6, JFB(6)),
    "S-JFB (12, 12), the worst draw": (12, JFB(12)),
    "JFB": (12, JFB()),
    **{name: steps.ESTIMATORS[name] for name in ("IFT", "Reversible")},
}
"""Evaluations before those of the estimator, and the estimator. Counts are fixed, since fake tensors have no values."""
VALIDATED = "S-JFB (6, 6), near the expected draw"
SETTINGS = ((False, "fp32"), (True, "fp32"), (False, "bf16"), (True, "bf16"))
"""Checkpointing and precision of a row."""


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
    """The network, its optimizer, and a function that makes one step."""
    network = build(case, size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
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


class PeakTracker(MemTracker):
    """MemTracker without statistics by module, which take time in proportion to modules times operators."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        by_module, self.memory_tracking = self.memory_tracking, type(self.memory_tracking)()
        super()._update_peak_stats(peak_state)
        self.memory_tracking = by_module


def fake_peak(case: Case, size: Size = XL) -> int:
    """Predicted peak bytes of a step after the first, so that the optimizer's state exists."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, optimizer, step = training_step(case, size)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        tracker = PeakTracker()
        tracker.track_external(network, optimizer)
        with tracker:
            step()
        snapshot = tracker.get_tracker_snapshot("peak")
    return max(int(device["Total"]) for device in snapshot.values())


def real_peak(case: Case, size: Size = XL) -> int:
    """Counted peak bytes of a real step on the CPU: bytes of the storages alive at the peak of the second step."""
    gc.collect()
    with MemoryTracker() as memory:
        network, _, step = training_step(case, size)
        steps.draw_weights(network)  # with initial weights, every block is the identity and the gradient is zero
        step()
        memory.peak = memory.alive
        step()
    return memory.peak


def cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """DiT, diffusers' DiT, and FPDM by each estimator with a fixed count."""
    for batch, (checkpointed, precision) in itertools.product(batches, SETTINGS):
        yield Case("DiT", batch, "", checkpointed, precision)
        yield Case("diffusers' DiT", batch, "", checkpointed, precision)
        for estimator in ESTIMATORS:
            yield Case("FPDM", batch, estimator, checkpointed, precision)


def validated() -> Iterator[Case]:
    """The steps whose predictions are compared with counts; one step in bf16, which is slow on most CPUs."""
    for batch in (1, 2):
        yield Case("DiT", batch)
        yield Case("FPDM", batch, VALIDATED)
    yield Case("FPDM", 2, VALIDATED, checkpointed=True)
    for estimator in (VALIDATED, "IFT", "Reversible"):
        for batch in (4, 8):
            yield Case("FPDM", batch, estimator)
        yield Case("FPDM", 4, estimator, checkpointed=True)
    yield Case("FPDM", 4, "IFT", precision="bf16")


def searched_cases() -> Iterator[Case]:
    """The rows with checkpointing, whose largest batch is searched for."""
    for precision in ("fp32", "bf16"):
        for estimator in ESTIMATORS:
            yield Case("FPDM", 0, estimator, True, precision)
        yield Case("DiT", 0, "", True, precision)
        yield Case("diffusers' DiT", 0, "", True, precision)


def _searched(case: Case, peaks: dict[int, int]) -> dict[str, Any]:
    """The largest batch of a row on each GPU, with the peak at this batch and at one sample more."""
    found = {}
    for card, capacity in CARDS.items():
        batch, shown = searched(peaks, capacity, lambda batch: fake_peak(replace(case, batch=batch)))
        found[card] = {"batch": batch, "peak bytes": shown[batch], "with one more": shown[batch + 1]}
    return {"largest": found}


def measure(
    result: dict[str, Any], out: Path, entry: str, found: Iterable[Case], peak: Callable[[Case], dict[str, Any]]
) -> None:
    """Call `peak` for the cases that `result[entry]` lacks, add its result, and write the file after each case."""
    known = {Case(**one["case"]) for one in result[entry]}
    for case in found:
        if case in known:
            continue
        start = time.perf_counter()
        result[entry].append({"case": asdict(case), **peak(case)})
        write_result(out, result)
        print(f"{entry}: {result[entry][-1]}, {time.perf_counter() - start:.0f} s", flush=True)


def _predicted(case: Case) -> dict[str, int]:
    return {"peak bytes": fake_peak(case)}


def _compared(case: Case) -> dict[str, int]:
    return {"fake": fake_peak(case), "real": real_peak(case)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "memory_xl.json", help="result file; resumed if it exists"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 8, 1], help="batch sizes of the predictions")
    parser.add_argument("--validate", action="store_true", help="compare predictions with real steps")
    parser.add_argument("--largest", action="store_true", help="search for the largest batches with checkpointing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    old = read_result(options.out)
    result = {
        "command": "python -m benchmarks.diffusion.memory --validate --largest",
        "size": asdict(XL),
        "optimizer": "fused AdamW, float32",
        **provenance("cpu", "diffusers"),
        **{entry: old.get(entry, []) for entry in ("peaks", "validation", "largest")},
    }
    measure(result, options.out, "peaks", cases(tuple(options.batches)), _predicted)
    measure(result, options.out, "validation", validated() if options.validate else (), _compared)
    peaks = by_row(result["peaks"])
    searches = searched_cases() if options.largest else ()
    measure(result, options.out, "largest", searches, lambda case: _searched(case, peaks[case.row]))
    print(markdown(result["peaks"], result["largest"]))


if __name__ == "__main__":
    main()
