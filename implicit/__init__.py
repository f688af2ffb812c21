"""Fixed points in PyTorch: solvers x gradient estimators x diagnostics."""

from typing import TYPE_CHECKING, Any

from implicit.deq import DEQ as DEQ
from implicit.fixed_point import fixed_point as fixed_point
from implicit.grads import GMRES as GMRES
from implicit.grads import IFT as IFT
from implicit.grads import JFB as JFB
from implicit.grads import SHINE as SHINE
from implicit.grads import AbstractGrad as AbstractGrad
from implicit.grads import Neumann as Neumann
from implicit.grads import Phantom as Phantom
from implicit.grads import Reversible as Reversible
from implicit.grads import StochasticJFB as StochasticJFB
from implicit.grads import Unrolled as Unrolled
from implicit.iterate import iterate as iterate
from implicit.options import SolveOptions as SolveOptions
from implicit.solution import Adjoint as Adjoint
from implicit.solution import NotConverged as NotConverged
from implicit.solution import Result as Result
from implicit.solution import Solution as Solution
from implicit.solvers import AbstractSolver as AbstractSolver
from implicit.solvers import Anderson as Anderson
from implicit.solvers import AndersonGS as AndersonGS
from implicit.solvers import BadBroyden as BadBroyden
from implicit.solvers import Broyden as Broyden
from implicit.solvers import Multisecant as Multisecant
from implicit.solvers import NewtonKrylov as NewtonKrylov
from implicit.solvers import Picard as Picard
from implicit.stopping import Stop as Stop

__version__ = "0.2.0"

if TYPE_CHECKING:
    from implicit.diagnostics import Diagnosis as Diagnosis
    from implicit.diagnostics import diagnose as diagnose


def __getattr__(name: str) -> Any:
    """`diagnose` and `Diagnosis`, imported when they are first used."""
    if name not in ("diagnose", "Diagnosis"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from implicit import diagnostics

    return getattr(diagnostics, name)
