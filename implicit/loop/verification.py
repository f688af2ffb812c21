"""Verification: CONVERGED and `residual` are true of the value that a solve with a tolerance returns.

If no evaluation has measured all returned values in one batch, that batch is evaluated once more. Where a sample misses
its tolerance there, f is evaluated again at the same z: two different values mean noise in f, equal values mean that f
couples the samples.
"""

import warnings

import numpy as np
import torch

from implicit.convergence import RUNNING, ConvergenceMonitor
from implicit.evaluation import FlatMap, JointMap
from implicit.loop.observation import compare, fetch
from implicit.loop.repeated_points import differs, repeats
from implicit.pytree import Flat, to_device
from implicit.solution import Result
from implicit.solvers.base import Point
from implicit.stopping import classify

COUPLED = (
    "f takes one sample of the batch into another (nodes of a graph as rows, batch normalization in training mode, a "
    "mean over the batch), so samples that had converged missed the tolerance when others moved. The solve went on "
    "with the whole batch as one system, which takes more evaluations: pass batch_dims=0."
)


def is_noise(f: FlatMap | JointMap, monitor: ConvergenceMonitor, point: Point) -> bool:
    """Whether f gives another value at the z of `point` than before; a batch of one sample has no other cause.

    The evaluation is outside of the budget.
    """
    if len(monitor.code) == 1:
        return True
    with torch.no_grad():
        return differs(monitor.criterion, f.repeat(point.z).fz, point.fz)


def must_continue(f: FlatMap, monitor: ConvergenceMonitor, compact: bool, image: bool = False) -> bool:
    """Measure the batch that is returned; True if a converged sample misses the tolerance there and budget is left.

    The cause is coupling of the samples or, after a solve with compaction, an argument that was cut by mistake. With
    `image` f(z) is returned, which `image_of_best` measures in any case.
    """
    coupled = monitor.inconsistent
    if coupled and f.remaining > 0:
        return True
    spend_budget(monitor)
    # with no budget left and no converged sample, f is not called once more for the residuals of coupled samples
    claimed = (monitor.code == Result.CONVERGED).any()
    if not coupled and (_verified(monitor, image) or (f.remaining <= 0 and not claimed)):
        return False
    with torch.no_grad():
        point = f.evaluate(monitor.best.z)
    before, stalled = monitor.best.residual.copy(), monitor.code == Result.STALLED
    lost, _ = measure_claims(monitor, point)
    lost |= stalled & ~repeats(monitor.criterion, before, monitor.best.residual, monitor.best.size)
    if not lost.any() and not coupled:
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
        point = f.evaluate(monitor.best.fz.detach())
    before, code = monitor.best.residual.copy(), monitor.code.copy()
    worse = _worse(before, *measure_claims(monitor, point))
    if not worse.any():
        return monitor.best.fz
    monitor.code = code.copy()
    monitor.best.residual[worse] = before[worse]
    mask = to_device(worse, f.layout.device).unsqueeze(1)
    value = torch.where(mask, monitor.best.z, monitor.best.fz)
    # f may couple samples, so a batch of z for some samples and f(z) for others has to be measured too
    with torch.no_grad():
        point = f.evaluate(value.detach())
    if not _worse(before, *measure_claims(monitor, point)).any():
        return value
    monitor.best.residual, monitor.code = before, code
    return monitor.best.z


def _worse(before: np.ndarray, lost: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Which samples are no longer converged, or had a finite residual `before` and have none now."""
    return lost | (~finite & np.isfinite(before))


def _verified(monitor: ConvergenceMonitor, image: bool) -> bool:
    """Whether an evaluation was at the best iterates of all samples, so that it has measured all of them.

    All samples must have been there at once, since f may couple them: a residual measured beside other values of the
    other samples says nothing about the batch that is returned.
    """
    since = monitor.best.since
    if (image or (since == since[:1]).all()) and not (monitor.code == Result.CONVERGED).any():
        return True
    if monitor.last is None:
        return False
    rows, held, calls = monitor.last
    tested = np.zeros(len(monitor.code), dtype=bool)
    tested[rows[held]] = True
    return bool((tested | (since == calls)).all())


def measure_claims(monitor: ConvergenceMonitor, point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Enter the residuals at `point`, and CONVERGED for samples that meet the tolerance there only.

    Returns:
        Which converged samples miss the tolerance at `point`, and which residuals are finite.
    """
    rows = np.arange(len(monitor.code))
    r, _, tolerance = compare(monitor.criterion, point, fetch(monitor.criterion, point).arrived(), rows)
    finite = np.isfinite(r)
    met, code = classify(r, tolerance) == Result.CONVERGED, monitor.code
    lost = (code == Result.CONVERGED) & ~met
    code[met & ((code == Result.MAX_EVALS) | (code == Result.STALLED))] = Result.CONVERGED
    monitor.best.residual[finite] = r[finite]
    monitor.evals += 1
    return lost, finite


def enter_joint(monitor: ConvergenceMonitor, joint: ConvergenceMonitor, calls: int) -> None:
    """Enter the outcome of `joint`, a solve of all samples as one system, after `calls` evaluations."""
    best, rows = monitor.best, len(monitor.code)
    best.z, best.fz = joint.best.z.reshape(rows, -1), joint.best.fz.reshape(rows, -1)
    point = Point(best.z, best.fz)
    sizes = fetch(monitor.criterion, point).arrived()
    best.residual, _, tolerance = compare(monitor.criterion, point, sizes, np.arange(rows))
    found = classify(best.residual, tolerance)
    monitor.evals[:], monitor.code = calls, np.where(found == Result.CONVERGED, found, joint.code[0])


def spend_budget(monitor: ConvergenceMonitor) -> None:
    """End the solve: running samples get their `Result`, and the better of two attempts is kept."""
    code, best = monitor.code, monitor.best
    best.flush()
    before = best.residual.copy()
    best.take_back((code != Result.CONVERGED) & (code != Result.STOPPED))
    if monitor.last is not None:  # the last evaluation was not made at the best iterate of a first attempt
        rows, held, calls = monitor.last
        monitor.last = rows, held & (best.residual[rows] == before[rows]), calls
    left = code == RUNNING
    monitor.evals[left] = monitor.calls
    code[left] = Result.NONDETERMINISTIC if monitor.noisy else Result.MAX_EVALS
