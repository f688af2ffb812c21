"""One to three explicit blocks before and after the fixed-point layer."""

from benchmarks.experiments.common import SCALES, Cell, Way, fixed, fpdm

PAIRS = tuple((before, behind) for before in (1, 2, 3) for behind in (1, 2, 3))


def cells(scale: str) -> list[Cell]:
    ways = (Way("20 x 10", 20, fixed(10)),)
    return [Cell(f"pre={a} post={b}", fpdm(SCALES[scale]["outer-blocks"], pre=a, post=b), ways) for a, b in PAIRS]
