"""Verification of claims: CONVERGED and `residual` are true of the value that a solve with a tolerance returns.

A claim that no evaluation at the value has tested is tested by one evaluation more. Where it does not hold, f is
evaluated once more at the same z: two values there are noise in f, one value is coupling of the samples.
"""

import warnings

import numpy as np
import torch

from implicit.convergence import REPEATABLE, ConvergenceMonitor
from implicit.evaluation import FlatMap, JointMap
from implicit.pytree import Flat, to_device, to_host
from implicit.solution import Result
from implicit.solvers.base import Point
from implicit.stopping import Criterion

COUPLED = (
    "f takes one sample of the batch into another (nodes of a graph as rows, batch normalization in training mode, a "
    "mean over the batch), so that samples which had converged lost it again. The whole batch was solved on as one "
    "system, which takes more evaluations: pass batch_dims=0."
)


def is_noise(f: FlatMap | JointMap, monitor: ConvergenceMonitor, point: Point) -> bool:
    """Whether f gives another value at the z of `point` than before; one sample alone can have no other cause."""
    if len(monitor.code) == 1:
        return True
    with torch.no_grad():
        return _differs(monitor.criterion, f.evaluate(point.z).fz, point.fz)


def must_continue(f: FlatMap, monitor: ConvergenceMonitor, compact: bool) -> bool:
    """Test the claims of convergence that are not tested yet; whether some do not hold and budget is left.

    The cause is coupling of the samples or, after a solve with compaction, an argument that was cut by mistake.
    """
    coupled = monitor.inconsistent
    if coupled and f.remaining > 0:
        return True
    monitor.close()
    if not coupled and _verified(monitor):
        return False
    with torch.no_grad():
        point = f.evaluate(monitor.best_z)
    lost = monitor.verify(point)
    if not len(lost) and not coupled:
        return False
    if not coupled and is_noise(f, monitor, point):
        monitor.code[lost] = Result.NONDETERMINISTIC
        return False
    if f.remaining > 0:
        return True
    if not compact:
        warnings.warn(COUPLED, RuntimeWarning, stacklevel=2)
    monitor.code[lost] = Result.MAX_EVALS
    return False


def image_of_best(f: FlatMap, monitor: ConvergenceMonitor) -> Flat:
    """f(z) of the best iterates with its own residual, or z for a sample of which only z meets the tolerance."""
    with torch.no_grad():
        point = f.evaluate(monitor.best_fz.detach())
    claimed, before = monitor.code == Result.CONVERGED, monitor.residual.copy()
    lost = np.zeros(len(claimed), dtype=bool)
    lost[monitor.verify(point)] = True
    if not lost.any():
        return monitor.best_fz
    monitor.residual[lost] = before[lost]
    mask = to_device(lost, f.layout.device).unsqueeze(1)
    value = torch.where(mask, monitor.best_z, monitor.best_fz)
    # f may take one sample into another, so that z beside f(z) is a value of its own
    with torch.no_grad():
        point = f.evaluate(value.detach())
    if not len(monitor.verify(point)):
        return value
    monitor.residual = before
    return monitor.best_z


def _verified(monitor: ConvergenceMonitor) -> bool:
    """Whether the last evaluation was at the best iterates of all samples, so that it has tested every claim.

    A sample without a claim counts too: where it stood elsewhere, a claim of another one may be due to that.
    """
    if monitor.last is None or not (monitor.code == Result.CONVERGED).any():
        return True
    rows, held, calls = monitor.last
    tested = np.zeros(len(monitor.code), dtype=bool)
    tested[rows[held]] = True
    return bool((tested | (monitor.since == calls)).all())


def _differs(criterion: Criterion, a: Flat, b: Flat) -> bool:
    """Whether a and b, values of f at one z, differ by more than rounding in a row where both are finite."""
    with torch.no_grad():
        off, size = to_host(criterion.measure(a - b)), to_host(criterion.measure(b))
    with np.errstate(all="ignore"):
        return bool((off > REPEATABLE * criterion.layout.eps * size).any())
