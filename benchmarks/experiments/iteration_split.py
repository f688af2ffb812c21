"""S-JFB's N and M, the largest numbers of iterations without and with a graph."""

from benchmarks.experiments.common import SCALES, Cell, Way, fixed, fpdm
from implicit import StochasticJFB

FREE, TRACKED = (0, 3, 6, 12), (1, 3, 6, 12)


def cells(scale: str) -> list[Cell]:
    ways = (Way("20 x 10", 20, fixed(10)),)
    seconds = SCALES[scale]["iteration-split"]
    return [Cell(f"N={n} M={m}", fpdm(seconds, StochasticJFB(N=n, M=m)), ways) for n in FREE for m in TRACKED]
