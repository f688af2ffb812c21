"""Numbers and tables as Markdown."""

import statistics
from collections.abc import Iterable
from typing import Any

NOTHING = "not measured"
DIGITS_ALONE = (
    "This study is made on digits only. A study is meaningful if the distances of its networks are at most 1.5 times "
    "the distance of the network in the repository. On mnist, without guidance, 1.5 times this distance is 2.85 (500 "
    "samples, DDIM, 20 steps), and the distance after ten CPU minutes of training is 5.2 (*Depth*)."
)
"""The reason, in the report, why a study is not repeated on mnist."""


def mean_and_deviation(values: list[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean and standard deviation over seeds, and the number of seeds if it is not three."""
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


def short(value: Any) -> str:
    """A number or a small record as the text of a table cell; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(one)}" for key, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
