"""How the report says a number, a table, a verdict."""

import statistics
from collections.abc import Iterable
from typing import Any

NOTHING = "not measured"
_UNTRAINED = 5.0  # the pictures of networks above this distance show few digits


def told(values: list[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean and standard deviation over seeds, and their number where it is not three."""
    if not values:
        return NOTHING
    values = [factor * v for v in values]
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text if len(values) == 3 else f"{text} ({len(values)} seed{'s' if len(values) > 1 else ''})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict(claim: str, better: list[float], worse: list[float]) -> str:
    """Whether `better` is the smaller of two sets of distances, and by more than their spread."""
    if not better or not worse:
        return f"*{claim}*: {NOTHING}."
    gain = statistics.fmean(worse) - statistics.fmean(better)
    if min(len(better), len(worse)) < 2:
        word = "**undecided**, one seed has no spread"
    elif min(map(statistics.fmean, (better, worse))) > _UNTRAINED:
        word = "**undecided**, neither has learnt to draw digits in this time"
    elif abs(gain) <= max(map(statistics.stdev, (better, worse))):
        word = "**within the spread of seeds**"
    else:
        word = "**yes**" if gain > 0 else "**no, the reverse**"
    return f"*{claim}*: {word} (Fréchet distance {told(better)} against {told(worse)})."


def short(value: Any) -> str:
    """A number or a small record, legible in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
