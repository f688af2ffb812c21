"""Peak training memory at XL/2, on fake tensors."""

from pathlib import Path
from typing import Any

from benchmarks.diffusion.memory import by_row, markdown
from benchmarks.report.formatting import NOTHING
from benchmarks.report.results import read

EXPECTED = "S-JFB (6, 6), near the expected draw"
HEAD = "## Training memory at XL/2"


def chapter(results: Path, images: Path) -> str:
    path = results / "memory_xl.json"
    found = read(path)
    measured = found.get("peaks", [])
    peaks = by_row(measured)
    lines = [
        f"{'With' if flag else 'Without'} checkpointing on both sides: {_less(peaks, flag)}."
        for flag in ("", "checkpointed")
    ]
    checks = [
        f"{v['case']['network']}, batch {v['case']['batch']}: {v['fake'] / v['real']:.3f}"
        for v in found.get("validation", [])
    ]
    return "\n\n".join(
        (
            HEAD,
            "Peak of weights, gradients, AdamW's state, activations and temporaries in a step, in GiB; float32 unless "
            "bf16 autocast is named; workspaces inside kernels and fragmentation are not included. The largest batch "
            "on a card follows from the line through the measured batches.",
            "The paper: *60 % less training memory than DiT-XL/2*. At batch 8: " + " ".join(lines),
            markdown(measured),
            f"Predicted peak over that of a real step on the CPU: {'; '.join(checks) or NOTHING}.",
            f"`{path.name}`: {_source(found)}.",
        )
    )


def _less(peaks: dict[tuple[str, str, str, str], dict[int, int]], flag: str) -> str:
    ours, dit = (peaks.get((name, grad, flag, "fp32"), {}).get(8) for name, grad in (("FPDM", EXPECTED), ("DiT", "")))
    return f"{100 * (1 - ours / dit):.0f} % less" if ours and dit else NOTHING


def _source(found: dict[str, Any]) -> str:
    if not found:
        return NOTHING
    return f"{found['command']}, {found['device']}, torch {found['versions']['torch']}, commit {found['commit']}"
