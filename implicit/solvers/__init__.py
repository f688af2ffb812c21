"""Solvers, which propose the next iterate. Each file has one algorithm."""

from implicit.solvers.anderson import Anderson as Anderson
from implicit.solvers.anderson_gs import AndersonGS as AndersonGS
from implicit.solvers.bad_broyden import BadBroyden as BadBroyden
from implicit.solvers.base import AbstractSolver as AbstractSolver
from implicit.solvers.base import Point as Point
from implicit.solvers.broyden import Broyden as Broyden
from implicit.solvers.multisecant import Multisecant as Multisecant
from implicit.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from implicit.solvers.picard import Picard as Picard
