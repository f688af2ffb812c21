"""How the report says a number, a table, a verdict."""

import statistics
from collections.abc import Iterable
from typing import Any

from scipy.stats import t

NOTHING = "not measured"
_CHANCE = 0.05  # p below which a difference between seeds is called decided
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


def chance(some: list[float], others: list[float], paired: bool) -> float:
    """Two-sided p of equal means: Student's t of the differences where values come in pairs, else Welch's t."""
    n, k = len(some), len(others)
    if paired:
        differences = [a - b for a, b in zip(some, others, strict=True)]
        error, freedom = statistics.stdev(differences) / n**0.5, n - 1.0
    else:
        a, b = statistics.variance(some) / n, statistics.variance(others) / k
        error = (a + b) ** 0.5
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (k - 1)) if error else 1.0
    gap = abs(statistics.fmean(some) - statistics.fmean(others))
    return float(2 * t.sf(gap / error, freedom)) if error else float(gap == 0)


def decision(better: list[float], worse: list[float], paired: bool = False) -> str:
    """Whether `better` is the smaller of two sets of distances, by more than chance among seeds explains.

    paired: both come from the same networks, in the same order.
    """
    if not better or not worse:
        return NOTHING
    if min(len(better), len(worse)) < 2:
        return "**undecided**, one seed has no spread"
    if min(map(statistics.fmean, (better, worse))) > _UNTRAINED:
        return "**undecided**, neither has learnt to draw digits in this time"
    p = chance(better, worse, paired and len(better) == len(worse))
    if p >= _CHANCE:
        return f"**within the spread of seeds** (p = {p:.2f})"
    word = "**yes**" if statistics.fmean(better) < statistics.fmean(worse) else "**no, the reverse**"
    return f"{word} (p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'})"


def verdict(claim: str, better: list[float], worse: list[float], paired: bool = False) -> str:
    """A claim, what the numbers say of it, and the numbers."""
    if not better or not worse:
        return f"*{claim}*: {NOTHING}."
    return f"*{claim}*: {decision(better, worse, paired)}; Fréchet distance {told(better)} against {told(worse)}."


def short(value: Any) -> str:
    """A number or a small record, legible in a table; "-" where there is no such thing."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
