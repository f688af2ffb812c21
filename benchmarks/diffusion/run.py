"""Cost of a step of FPDM, compared with the same step written plainly, with DiT, and with other libraries.

python -m benchmarks.diffusion.run           writes benchmarks/results/diffusion.json and prints it
python -m benchmarks.diffusion.run --scale xl --precision bf16 --batch 32
                                               on a GPU: benchmarks/results/gpu_diffusion_bf16_32.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.diffusion import steps
from benchmarks.diffusion import tables as diffusion_tables
from benchmarks.diffusion.steps import CPU, XL, Scale
from benchmarks.harness import paired, peak_bytes, provenance, ratio, write_result

MIB = 2**20


@dataclass(frozen=True)
class Claim:
    """The claim that a step costs at most a given share of the same step written plainly.

    A training step has n iterations without and m with a graph; m = 0 is a sampling step of n iterations.
    """

    free: int
    tracked: int
    time: float
    memory: float | None = None

    @property
    def name(self) -> str:
        if self.tracked:
            return f"training, (n, m) = ({self.free}, {self.tracked})"
        return f"sampling, {self.free} iterations"

    def pair(self, scale: Scale) -> dict[str, steps.Step]:
        """Our step and the plain one, on the same weights and inputs."""
        network, batch = steps.fpdm(scale), steps.inputs(scale)
        if self.tracked:
            kind, chosen = steps.training, steps.draw(network, batch, self.free, self.tracked)
            return {
                "ours": kind(network, chosen, scale),
                "plain": kind(network, steps.plainly(network, batch, self.free, self.tracked), scale),
            }
        return {
            "ours": steps.sampling(steps.ours(network, batch, self.free), scale),
            "plain": steps.sampling(steps.plainly(network, batch, 0, self.free), scale),
        }


CLAIMS = (
    Claim(10, 0, time=0.95),
    Claim(26, 0, time=0.9),
    Claim(12, 1, time=0.92, memory=0.25),
    Claim(6, 6, time=1.0),
)
CHECKPOINTED = 0.15
"""Claim: peak memory of an FPDM step at (6, 6) with checkpointing, divided by that of DiT-28 without checkpointing."""


def against_plain(claim: Claim, scale: Scale, repeats: int) -> dict[str, Any]:
    """Time and memory of our step, divided by those of the plain step."""
    pair = claim.pair(scale)
    peaks = {name: peak_bytes(step, scale.device) for name, step in pair.items()}
    times = paired(pair, repeats, scale.device)
    return {
        "step": claim.name,
        "time ratio": ratio(times, "ours", "plain"),
        "time limit": claim.time,
        "memory ratio": round(peaks["ours"] / peaks["plain"], 3),
        "memory limit": claim.memory,
        "peak MiB": {name: round(peak / MIB, 1) for name, peak in peaks.items()},
        "fastest seconds": {name: round(min(t), 4) for name, t in times.items()},
    }


def checkpointed_memory(scale: Scale) -> dict[str, Any]:
    """Peak memory of FPDM at (6, 6) with every block and iteration checkpointed, divided by the DiT's."""
    batch = steps.inputs(scale)
    network, dit = steps.fpdm(scale, checkpointing=True), steps.dit(scale)
    ours = peak_bytes(steps.training(network, steps.draw(network, batch, 6, 6), scale), scale.device)
    theirs = peak_bytes(steps.training(dit, lambda: dit(*batch), scale), scale.device)
    return {
        "step": f"training, (n, m) = (6, 6), checkpointed, against DiT-{scale.depth}",
        "memory ratio": round(ours / theirs, 3),
        "memory limit": CHECKPOINTED,
        "peak MiB": {"FPDM": round(ours / MIB, 1), "DiT": round(theirs / MIB, 1)},
    }


TABLES: dict[str, Callable[[Scale, int], Any]] = {
    "against the plain step": lambda scale, repeats: [
        *(against_plain(claim, scale, repeats) for claim in CLAIMS),
        checkpointed_memory(scale),
    ],
    "training step": lambda scale, repeats: diffusion_tables.training(
        replace(scale, batch=min(4, scale.batch)) if scale.device == "cpu" else scale, repeats
    ),
    "sampling step": diffusion_tables.sampling,
    "around the block": diffusion_tables.around_the_block,
    "parameters": diffusion_tables.parameters,
}


SCALES = {"cpu": CPU, "xl": XL, "tiny": Scale(hidden=32, heads=2, side=8, depth=2, batch=2)}


def _file(name: str, scale: Scale) -> Path | None:
    """The result file of a scale; None for the scale tiny."""
    names = {"cpu": "diffusion", "xl": f"gpu_diffusion_{scale.precision}_{scale.batch}"}
    known = name in names and (name == "xl" or scale == CPU)
    return Path(__file__).parents[1] / "results" / f"{names[name]}.json" if known else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="xl needs a GPU; tiny tests the program")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="batch size; default: that of the scale")
    parser.add_argument("--out", type=Path, help="default: a file under benchmarks/results/; tiny has none")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tables", nargs="*", choices=TABLES, default=list(TABLES), help="others stay as they are")
    options = parser.parse_args(arguments)
    scale = replace(SCALES[options.scale], precision=options.precision)
    scale = replace(scale, batch=options.batch or scale.batch)
    options.out = options.out or _file(options.scale, scale)
    if options.out is None:
        parser.error(
            "--scale tiny, and fewer images or bf16 on a CPU, need --out, because their numbers are not results."
        )
    if scale.device == "cuda" and not torch.cuda.is_available():
        parser.error("--scale xl needs a CUDA device, and there is none here.")
    torch.set_num_threads(1)
    old = json.loads(options.out.read_text()) if options.out.exists() else {}
    tables = dict(old.get("tables", {}))
    about = {
        "command": "python -m benchmarks.diffusion.run"
        + (f" --scale {options.scale} --precision {scale.precision} --batch {scale.batch}" if scale != CPU else ""),
        "config": asdict(scale),
        "memory": "peak bytes that a step allocates (benchmarks.harness.MemoryTracker); on CUDA the allocator's count",
        "time": "CPU time of the process, steps in turn, on CUDA until it is done; ratios are medians of the pairs",
    }
    for name in options.tables:
        rows = TABLES[name](scale, options.repeats)
        tables[name] = provenance(scale.device, "diffusers", "torchdeq") | {"repeats": options.repeats, "rows": rows}
        print(json.dumps({name: rows}, indent=1), flush=True)
        write_result(options.out, about | {"tables": {name: tables[name] for name in TABLES if name in tables}})


if __name__ == "__main__":
    main()
