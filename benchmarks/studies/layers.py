"""Explicit blocks before and behind the fixed point, one to three."""

from .base import SCALES, Cell, Way, fixed, fpdm

PAIRS = ((1, 1), (2, 2), (3, 3), (1, 3), (3, 1))


def cells(scale: str) -> list[Cell]:
    ways = (Way("20 x 10", 20, fixed(10)),)
    return [Cell(f"pre={a} post={b}", fpdm(SCALES[scale]["layers"], pre=a, post=b), ways) for a, b in PAIRS]
