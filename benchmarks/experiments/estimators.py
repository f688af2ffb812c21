"""JFB, S-JFB, IFT, Phantom, Reversible and full unrolling at equal training time."""

from apps.diffusion.config.training import Grad
from benchmarks.experiments.common import SCALES, Cell, Way, fixed, fpdm
from implicit import IFT, JFB, Phantom, Reversible, StochasticJFB, Unrolled

GRADS: dict[str, Grad] = {
    "JFB": JFB(),
    "S-JFB(6, 3)": StochasticJFB(N=6, M=3),
    "IFT": IFT(on_failure="ignore"),
    "Phantom": Phantom(),
    "Reversible": Reversible(on_drift="ignore"),
    "Unrolled": Unrolled(),
}


def cells(scale: str) -> list[Cell]:
    ways = (Way("20 x 10", 20, fixed(10)),)
    return [Cell(name, fpdm(SCALES[scale]["estimators"], grad), ways) for name, grad in GRADS.items()]
