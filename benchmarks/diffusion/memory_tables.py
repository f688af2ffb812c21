"""Tables of peak memory by batch, of its ratio to the DiT's, and of the largest batch on each GPU."""

from typing import Any

from benchmarks.diffusion.largest_batch import CARDS, GIB, Case, largest_batch
from benchmarks.report.formatting import table


def fits(row: tuple[str, ...], peaks: dict[int, int], card: str, largest: list[dict[str, Any]]) -> str:
    """The largest batch of a row on a GPU, by the search or by the line through two batches. With checkpointing, the
    peak moves from the end of the backward pass to its beginning as the batch grows, and is a convex function of the
    batch. The line then gives an upper bound beyond the two batches, and a lower bound between them.
    """
    settled = [one["largest"][card]["batch"] for one in largest if Case(**one["case"]).row == row]
    if settled:
        return str(settled[0])
    if len(peaks) < 2:
        return "-"
    found = largest_batch(peaks, CARDS[card])
    bound = "at least " if found < max(peaks) else "at most "
    return f"{bound if 'checkpointed' in row else ''}{found}"


def by_row(measured: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], dict[int, int]]:
    """Row -> batch -> peak bytes."""
    rows: dict[tuple[str, str, str, str], dict[int, int]] = {}
    for found in measured:
        case = Case(**found["case"])
        rows.setdefault(case.row, {})[case.batch] = found["peak bytes"]
    return rows


def markdown(measured: list[dict[str, Any]], largest: list[dict[str, Any]]) -> str:
    """Peaks in GiB by batch, share of the DiT's, and the largest batch on each card."""
    rows = by_row(measured)
    batches = sorted({batch for peaks in rows.values() for batch in peaks})
    lines = []
    for row, peaks in rows.items():
        base = rows.get(("DiT", "", *row[2:]), {})
        both = max(peaks.keys() & base.keys(), default=None)
        share = "-" if both is None else f"{peaks[both] / base[both]:.2f} (batch {both})"
        cards = [fits(row, peaks, card, largest) for card in CARDS]
        sizes = [f"{peaks[b] / GIB:.2f}" if b in peaks else "-" for b in batches]
        lines.append([", ".join(filter(None, row)), *sizes, share, *cards])
    head = ["training step", *(f"batch {b}" for b in batches), "of the same DiT"]
    return table([*head, *(f"largest batch, {card}" for card in CARDS)], lines)
