"""Peak training memory at XL/2, predicted on fake tensors and, for some rows, counted in real steps."""

from pathlib import Path
from typing import Any

from benchmarks.diffusion.largest_batch import CARDS, GIB, Case
from benchmarks.diffusion.memory_tables import by_row, fits, markdown
from benchmarks.harness import read_result
from benchmarks.report.formatting import NOTHING, table
from benchmarks.report.sections import gpu

EXPECTED = "S-JFB (6, 6), near the expected draw"
WORST = "S-JFB (12, 12), the worst draw"
HEAD = "## Training memory at XL/2"
Row = tuple[str, str, str, str]
Peaks = dict[Row, dict[int, int]]


def section(results: Path, images: Path) -> str:
    path = results / "memory_xl.json"
    found = read_result(path)
    peaks = by_row(found.get("peaks", []))
    checks = [
        f"{_named(v['case'])}, batch {v['case']['batch']}: {v['fake'] / v['real']:.4f}"
        for v in found.get("validation", [])
    ]
    return "\n\n".join(
        (
            HEAD,
            "Peak of weights, gradients, AdamW's state, activations and temporaries in a step, in GiB; float32 "
            "unless bf16 autocast is named; workspaces inside kernels and fragmentation are not included. The "
            "largest batch on a GPU follows from the line through the peaks at the two largest batches of a row. "
            "With checkpointing the peak is a convex function of the batch, and the line gives a bound only, "
            "marked by *at least* or *at most*; any other number is exact: the peak at this batch fits, and the peak "
            "at one sample more does not. 80 GB and 16 GB are nominal.",
            f"The paper: *60 % less training memory than DiT-XL/2*. Here: {_verdict(peaks)}.",
            _less(peaks),
            fitting(found),
            markdown(found.get("peaks", []), found.get("largest", [])),
            f"IFT takes one product of its linear solve here; the counts below are of whole solves. {_short(found)}",
            f"Predicted peak over the count of a real step on the CPU: {'; '.join(checks) or NOTHING}.",
            f"On a GPU: {gpu.where(results)}. `{path.name}`: {_source(found)}.",
        )
    )


SETTINGS = tuple((flag, precision) for precision in ("fp32", "bf16") for flag in ("", "checkpointed"))
ROWS = (("FPDM", EXPECTED), ("FPDM", WORST), ("DiT", ""), ("diffusers' DiT", ""))
_HEAD = tuple(", ".join(filter(None, reversed(setting))) for setting in SETTINGS)


def at_batch(found: dict[str, Any], batch: int) -> str:
    """Predicted peaks at a batch by network, checkpointing and precision, in GiB."""
    peaks = by_row(found.get("peaks", []))
    lines = []
    for row in ROWS:
        cells = [peaks.get((*row, *setting), {}).get(batch) for setting in SETTINGS]
        lines.append([", ".join(filter(None, row)), *(f"{at / GIB:.1f}" if at else NOTHING for at in cells)])
    return table(["GiB", *_HEAD], lines)


def fitting(found: dict[str, Any]) -> str:
    """The largest batch by network, card, checkpointing and precision."""
    peaks = by_row(found.get("peaks", []))
    lines = []
    for card in CARDS:
        for row in ROWS:
            cells = [
                fits((*row, *setting), peaks.get((*row, *setting), {}), card, found.get("largest", []))
                for setting in SETTINGS
            ]
            lines.append([card, ", ".join(filter(None, row)), *cells])
    return table(["card", "largest batch", *_HEAD], lines)


def _verdict(peaks: Peaks) -> str:
    """The share of DiT's memory that FPDM saves at the expected and at the worst draw, over batches and options."""
    shares = {}
    for draw in (EXPECTED, WORST):
        pairs = [(("FPDM", draw, *setting), ("DiT", "", *setting)) for setting in SETTINGS]
        found = [_share(peaks, *pair, batch) for pair in pairs for batch in (8, 64)]
        shares[draw] = [share for share in found if share is not None]
    if not all(shares.values()):
        return NOTHING
    ranges = (f"{100 * min(found):.0f} to {100 * max(found):.0f} % less in {draw}" for draw, found in shares.items())
    return f"{'; '.join(ranges)}: predicted at batch 8 and 64, the same options on both sides"


def _less(peaks: Peaks) -> str:
    """Memory that FPDM saves, by batch, checkpointing and precision."""
    lines = []
    for flag in ("", "checkpointed"):
        for precision in ("fp32", "bf16"):
            for draw in (EXPECTED, WORST):
                cells = [
                    _saved(peaks, ("FPDM", draw, flag, precision), (base, "", flag, precision), batch)
                    for base in ("DiT", "diffusers' DiT")
                    for batch in (8, 64)
                ]
                lines.append([", ".join(filter(None, (draw, flag, precision))), *cells])
    return table(
        [
            "FPDM",
            "less than DiT, batch 8",
            "less than DiT, batch 64",
            "less than diffusers' DiT, batch 8",
            "less than diffusers' DiT, batch 64",
        ],
        lines,
    )


def _share(peaks: Peaks, ours: Row, base: Row, batch: int) -> float | None:
    mine, theirs = (peaks.get(row, {}).get(batch) for row in (ours, base))
    return 1 - mine / theirs if mine and theirs else None


def _saved(peaks: Peaks, ours: Row, base: Row, batch: int) -> str:
    share = _share(peaks, ours, base, batch)
    return NOTHING if share is None else f"{100 * share:.0f} %"


def _short(found: dict[str, Any]) -> str:
    """A sentence on how far the prediction for Reversible is below the count."""
    counts = [one for one in found.get("validation", []) if one["case"]["estimator"] == "Reversible"]
    short = [(one["real"] - one["fake"]) / one["case"]["batch"] / 1e6 for one in counts]
    if not short:
        return f"Difference between count and prediction for Reversible: {NOTHING}."
    return (
        f"For Reversible the prediction is too low, by up to {max(short):.1f} MB per sample in the counted steps, so "
        "its largest batches are upper bounds."
    )


def _named(case: dict[str, Any]) -> str:
    return ", ".join(filter(None, Case(**case).row))


def _source(found: dict[str, Any]) -> str:
    if not found:
        return NOTHING
    return f"{found['command']}, {found['device']}, torch {found['versions']['torch']}, commit {found['commit']}"
