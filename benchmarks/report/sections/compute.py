"""Work, roofline, kernels and CPU times at XL/2."""

from pathlib import Path
from typing import Any

from benchmarks.diffusion.compute import BARE, OURS
from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, table
from benchmarks.report.sections import gpu

HEAD = "## Compute at XL/2"


def section(results: Path, images: Path) -> str:
    path = results / "compute_xl.json"
    found = read_result(path)
    cards = found.get("cards", [])
    sources = "; ".join(f"{card['name']}: {card['source']}" for card in cards)
    return "\n\n".join(
        (
            HEAD,
            "Counted multiply-accumulates; the sum of the bytes that each operator reads and writes; and the "
            "roofline time, the longer of the times at a GPU's peak arithmetic and at its peak bandwidth, which is a "
            "lower bound for eager kernels. bf16: weights and activations in bfloat16 (float16 on a T4). Training "
            f"steps leave out the optimizer. Times on a GPU: {gpu.where(results)}.",
            _counts(found, [card["name"] for card in cards]) if cards else NOTHING,
            f"Data sheets, without sparsity: {sources or NOTHING}.",
            _kernels(found.get("kernels", {})),
            "CPU time of one thread, batch 1, float32, medians; other processes were running on the machine.",
            _times(found) if found.get("cpu") else NOTHING,
            _overhead(found),
            f"`{path.name}`: {_source(found)}.",
        )
    )


def _counts(found: dict[str, Any], cards: list[str]) -> str:
    rows = [
        [
            row["work"],
            str(row["batch"]),
            row["precision"],
            f"{row['MACs'] / 1e9:.4g}",
            f"{row['bytes'] / 1e9:.3g}",
            *(f"{row['roofline ms'][card]:.3g}" for card in cards),
        ]
        for row in found["counts"]
    ]
    return table(["work", "batch", "precision", "GMACs", "GB", *(f"{card}, ms" for card in cards)], rows)


def _kernels(found: dict[str, list[int]]) -> str:
    parts = [f"{ours} over {loop} at {name}" for name, (ours, loop) in found.items()]
    return (
        "Kernels of a step beside those of the same network with its layer written as a loop, iterations: "
        f"{'; '.join(parts) or NOTHING}. Host synchronizations of either, with a fixed number of iterations: "
        f"{'0' if found else NOTHING}."
    )


def _times(found: dict[str, Any]) -> str:
    macs = {row["work"]: row["MACs"] for row in found["counts"] if (row["batch"], row["precision"]) == (1, "fp32")}
    macs[BARE] = macs[OURS]
    rows = [
        [row["work"], f"{row['seconds']:.3g}", f"{macs[row['work']] / row['seconds'] / 1e9:.3g}"]
        for row in found["cpu"]
    ]
    return table(["work", "seconds", "GMACs per second"], rows)


def _overhead(found: dict[str, Any]) -> str:
    pair = found.get("beside a bare loop")
    shown = (
        "{median:.3f} (quartiles {lower quartile:.3f} to {upper quartile:.3f})".format_map(pair) if pair else NOTHING
    )
    return f"Time of a sampling step over that of the same blocks and iterations in a bare loop, in pairs: {shown}."


def _source(found: dict[str, Any]) -> str:
    if not found:
        return NOTHING
    return f"{found['command']}, {found['device']}, torch {found['versions']['torch']}, commit {found['commit']}"
