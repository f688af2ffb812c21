"""Several fixed points: solves from other starts, whose answers are compared with the first one.

Setting: z the first answer, y the answer from another start, r the residuals, J = df/dz at z. If the two were one fixed
point, they would differ by about the error that their residuals allow, (||r_z|| + ||r_y||) / min |1 - lambda|. They are
two if ||y - z|| exceeds ten times that error by a share of the larger norm, and if a solve to a tighter tolerance that
starts at y stays there. (A map that saturates, such as a gate, has small residuals far from any fixed point: an answer
there runs away.) Where z attracts plain iteration, y has to do so too: fixed points that repel it, such as weights of 0
in an EM iteration, are no answers that a solve would end at. On a line of fixed points an eigenvalue is 1 up to
rounding and the error has no bound; one is set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.map_checks import normal, root_mean_square
from implicit.diagnostics.diagnose.solutions import PLAIN, attracted
from implicit.diagnostics.diagnose.solver_trials import SolverTrials, Trial, attainable, relative
from implicit.pytree import Flat, PerSample, norm
from implicit.solution import Solution
from implicit.stopping import Stop

_EACH = 150  # largest number of evaluations from one start
COST = 5 * (_EACH + 5) + PLAIN + 5  # largest number of evaluations from four starts, and of the tests of the farthest
_APART = 1e-2  # two answers differ if their relative distance exceeds this and their error
_CLEAR = 5.0  # and certainly if it exceeds this multiple
_SINGULAR = 0.1  # min |1 - lambda| is taken to be at least this multiple of sqrt(eps)
_STAYS = 0.1  # an answer stays where it is if it moves by at most this share of the distance


@dataclass(frozen=True, eq=False)
class OtherStarts:
    """The solves from other starts, and what their answers are compared with.

    Attributes:
        trials: the problem.
        stop: the criterion of the caller.
        first: the best solve from z0.
        found: (B,) whether its value is a fixed point.
        gap: (B,) min |1 - lambda| there; None: unknown.
        attracts: (B,) whether all |lambda| < 1.
        typical: (B, N) root mean square of a typical state.
    """

    trials: SolverTrials
    stop: Stop
    first: Solution
    found: Tensor
    gap: PerSample | None
    attracts: Tensor
    typical: Flat

    def findings(self, answer: Trial) -> list[Finding]:
        """Compare the answers from a wide pair of starts about z0 and a narrow pair about 0."""
        layout, solver = self.trials.layout, answer.row.solver
        z = layout.pack(self.first.value)
        gap = torch.ones_like(z[:, 0]) if self.gap is None else self.gap.to(z)
        gap = gap.clamp_min(_SINGULAR * layout.eps**0.5)
        # to a hundredth of the tolerance, and near an eigenvalue of 1 to less, as far as rounding permits
        rtol = max(min(0.01 * self.stop.rtol, 1e-3 * float(gap.min())), attainable(layout))
        stop = Stop(rtol=rtol, atol=0.01 * self.stop.atol, norm=self.stop.norm, max_evals=_EACH)
        most, distance, farthest, seen = torch.zeros_like(gap), torch.zeros_like(gap), z, 0
        for start in self._starts(z):
            if self.trials.budget.remaining < _EACH + 5:
                break
            other = self.trials.run(solver, stop, layout.unpack(start)).solution
            if other is None:
                continue
            seen += 1
            y, apart, error = self._compared(z, other, gap)
            share = torch.where(other.converged & self.found, apart / (_APART + error), 0.0).nan_to_num(nan=0.0)
            farthest = torch.where((share > most).unsqueeze(1), y, farthest)
            distance = torch.where(share > most, apart, distance)
            most = torch.maximum(most, share)
        mask = most > 1
        if bool(mask.any()):
            mask &= self._stays(answer, stop, z, farthest)
        if bool((mask & self.attracts).any()) and self.trials.budget.remaining >= PLAIN:
            mask &= ~self.attracts | attracted(self.trials, farthest, self.typical)
        if not bool(mask.any()):
            return []
        evidence = f"{seen} other starts gave answers up to {float(distance[mask].max()):.2g} of their norm away"
        return [Finding.of(Condition.SEVERAL_FIXED_POINTS, evidence, mask, bool((most[mask] > _CLEAR).all()))]

    def _starts(self, z: Flat) -> Iterator[Flat]:
        layout = self.trials.layout
        start = layout.pack(self.trials.problem.z0)
        scale = 2 * (root_mean_square(z, layout) + root_mean_square(z - start, layout))
        scale = torch.where(scale > 0, scale, self.typical)
        wide, narrow = scale * normal(z, 10), 0.5 * scale * normal(z, 11).clamp(-1, 1)
        yield from (start + wide, start - wide, narrow, -narrow)

    def _compared(self, z: Flat, other: Solution, gap: PerSample) -> tuple[Flat, PerSample, PerSample]:
        """The other answer, its relative distance to z, and the relative error that the residuals allow."""
        layout = self.trials.layout
        y, least = layout.pack(other.value), layout.eps**0.5 * norm(self.typical)
        size = torch.maximum(torch.maximum(norm(z), norm(y)), least)
        kind = self.stop.norm
        residuals = relative(other, layout, kind) * norm(y) + relative(self.first, layout, kind) * norm(z)
        return y, norm(y - z) / size, 10 * residuals / size / gap

    def _stays(self, answer: Trial, stop: Stop, z: Flat, y: Flat) -> Tensor:
        """(B,) whether a solve from y to a tighter tolerance ends near y."""
        layout = self.trials.layout
        tighter = replace(stop, rtol=max(0.01 * stop.rtol, 4 * layout.eps), atol=0.01 * stop.atol)
        end = self.trials.run(answer.row.solver, tighter, layout.unpack(y)).solution
        return norm(y - z) > 0 if end is None else norm(layout.pack(end.value) - y) <= _STAYS * norm(y - z)
