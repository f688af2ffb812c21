"""The table that `gradient_bias` returns."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class BiasRow:
    """One estimator on one batch.

    Attributes:
        name: its label.
        cosine: of its gradient and the exact one; 1 is the right direction.
        error: ||gradient - exact|| / ||exact||.
        saved: bytes held between the forward and the backward pass, the value included, parameters and inputs not.
        peak: most bytes in use at once, likewise; workspaces inside operators are not seen.
        evals: evaluations of f on the whole batch, forward and backward together.
        products: vector-Jacobian products with f on the whole batch.
        time: of forward and backward, as a ratio to the forward solve without gradients.
        note: warnings, or why there is no gradient (then cosine and error are NaN).
    """

    name: str
    cosine: float
    error: float
    saved: float
    peak: float
    evals: float
    products: float
    time: float
    note: str = ""


@dataclass(frozen=True)
class GradientBias:
    """Estimators beside the exact gradient: ``table["JFB"].cosine``; printed, it is a Markdown table.

    Attributes:
        rows: one per estimator.
        truth: how the exact gradient was found.
    """

    rows: tuple[BiasRow, ...]
    truth: str

    def __getitem__(self, name: str) -> BiasRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def __str__(self) -> str:
        return markdown(HEAD, [cells(row) for row in self.rows])


HEAD = ("estimator", "cosine", "error", "saved", "peak", "f", "VJPs", "time", "note")


def cells(row: BiasRow) -> tuple[str, ...]:
    """A row as text, in the order of `HEAD`."""
    return (
        row.name,
        _number(row.cosine, ".4f"),
        _number(row.error, ".1e"),
        size(row.saved),
        size(row.peak),
        _number(row.evals, ".4g"),
        _number(row.products, ".4g"),
        _number(row.time, ".2f"),
        _short(row.note),
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def markdown(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """An aligned Markdown table, names left and numbers right; an empty last column is left out."""
    if not any(line[-1] for line in body):
        head, body = head[:-1], [line[:-1] for line in body]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    left = {0} | ({len(head) - 1} if head[-1] == "note" else set())

    def line(texts: tuple[str, ...]) -> str:
        padded = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(texts) for texts in body)])


def _number(x: float, form: str) -> str:
    return "-" if math.isnan(x) else format(x, form)


def _short(note: str, most: int = 80) -> str:
    note = note.replace("|", "/").replace("\n", " ")
    return note if len(note) <= most else note[: most - 3].rsplit(" ", 1)[0] + " ..."
