"""The safeguard in stages: resets to the best iterate, and other steps where acceleration gains nothing.

For every sample, on the host, from the residuals that the loop reads anyway:

    blow-up    ||r|| > `blown` times the smallest so far, or not finite: reset to the best iterate. The solver may use
               the pair of the two points. After a second blow-up without a smaller residual in between, a quarter of
               the next step is taken, then a sixteenth, and so on; a sample that is not finite `tries` times in a row
               has failed. In the Newton-Krylov stage residuals may grow; a value that is not finite ends it, as a
               blow-up ends a plain stage.
    run-away   ||r|| exceeds the smallest so far, at ||f(z)|| 1e4 times that of the best iterate, 1e8 times in the
               Newton-Krylov stage: as a blow-up, and no convergence where it meets the tolerance, for a relative one
               admits any ||r|| of a state that is large enough.
    stall      the smallest residual has not fallen to `gain` of what it was within `patience` evaluations: the next
               stage, from the best iterate,

                   accelerated -> cautious -> plain steps z' = f(z) -> Newton-Krylov steps -> accelerated ...

               A stage lasts as long as it gains. Plain steps are measured after 8: they go on if that rate, kept up for
               twice the patience, would reach `gain`. After a round of all stages the patience doubles.
    new start  the stages after the first accelerated one have not halved the smallest residual: the next round begins
               at the start of the solve, with plain steps, and the one after it at the best iterate of all
               (`implicit.loop.best_iterates`). Those plain steps (for states of at most 20 numbers, those from the
               fourth round on) are measured every 6 patiences. The first measurement always passes, because a residual
               may stay or rise long before it falls; every later one must reach `gain`.

The Newton-Krylov stage lasts two patiences and 12 steps of a small state, 4 of a large one. States of more than 20
numbers skip it in the first round. With a solver that has a cautious stage, a sample that has blown up twice takes it
next, before the cautious and the plain stage. Maps that cannot be differentiated have no such stage. Solvers without a
cautious stage lose their history with every reset, and have other `Limits`, and no new start. In a solve without a
tolerance no residual is read, and the safeguard is off.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_SHORTER = 0.25
_RUN_AWAY, _NEWTON_AWAY = 1e4, 1e8  # growth of ||f(z)|| that is no way to a fixed point: of a claim, of a Newton step
_NO_GAIN = 0.5  # the share of the residual that the stages after the accelerated one must reach
_LONG = 6  # in `patience`, the length over which a plain stage from the start of the solve is measured, without a trial
_LATE = 3  # the round from which a small state has one
_SMALL = 20  # numbers of a state whose Newton-Krylov steps cost little


class Stage(IntEnum):
    """Which steps a sample takes."""

    ACCELERATED = 0
    CAUTIOUS = 1
    PLAIN = 2
    NEWTON = 3


@dataclass(frozen=True)
class Limits:
    """When a stage ends.

    Attributes:
        gain: the share of the residual that a stage must reach.
        blown: a residual of that many times the smallest is a blow-up.
        tries: values in a row that are not finite, after which a sample has failed.
        plain: length of the plain stage, in `patience`.
        trial: plain steps after which their gain is projected to the whole stage; 0, not before its end.
        new_start: whether a round that gained nothing is followed by one from the start of the solve.
    """

    gain: float
    blown: float
    tries: int
    plain: int
    trial: int
    new_start: bool


CAUTIOUS = Limits(gain=0.1, blown=1e4, tries=8, plain=2, trial=8, new_start=True)
HISTORY_LOST = Limits(gain=0.5, blown=1e3, tries=2, plain=6, trial=0, new_start=False)


class StagedSafeguard:
    """The stage of each sample, and which samples must be reset to their best iterate.

    Args:
        size: number of samples.
        patience: evaluations that an accelerated stage may take to gain.
        numbers: N, the size of a sample's state.
        limits: `CAUTIOUS` for solvers with a cautious stage, `HISTORY_LOST` for others.
    """

    def __init__(self, size: int, patience: int, numbers: int, limits: Limits = CAUTIOUS) -> None:
        self.limits = limits
        self.small = numbers <= _SMALL
        self.newton_length = max(12 * (min(numbers, 10) + 1), 4 * (min(numbers, 60) + 1))
        self.stages = list(Stage)
        self.patience = np.full(size, patience)
        self.stage = np.zeros(size, dtype=np.int8)
        self.scale = np.ones(size)  # share of the next step to take
        self.resets = np.zeros(size, dtype=bool)
        self.pending = False  # whether `resets` holds a sample
        self.failures = np.zeros(size, dtype=np.int64)  # blow-ups in a row, and
        self.broken = np.zeros(size, dtype=np.int64)  # of these, how many were not finite
        self.failing = False
        self.blown = np.zeros(size, dtype=np.int64)  # blow-ups in all
        self.rounds = np.zeros(size, dtype=np.int64)
        self.over = np.zeros(size, dtype=bool)  # samples that begin again at the start of the solve,
        self.back = np.zeros(size, dtype=bool)  # and those that return from there to their best iterate
        self.long = np.zeros(size, dtype=bool)  # samples in such a plain stage
        self.turned = np.full(size, np.inf)  # the smallest residual when the accelerated stage of this round ended
        self.mark = np.full(size, np.inf)  # the smallest residual when the present stage began
        self.begun = False
        self.due = np.full(size, patience)
        self.next_due = patience

    def on(self, stage: Stage) -> np.ndarray:
        """Which samples are in `stage`."""
        return self.stage == stage

    def pop_resets(self) -> np.ndarray:
        """Which samples must be reset; cleared by the call."""
        resets, self.resets, self.pending = self.resets, np.zeros_like(self.resets), False
        return resets

    def pop_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Which samples begin again at the start of the solve, and which return from there; cleared by the call."""
        over, back = self.over, self.back
        self.over, self.back = np.zeros_like(over), np.zeros_like(back)
        return over, back

    def leave_out(self, stage: Stage) -> None:
        """No sample enters `stage` any more: the solver has none, or f cannot be differentiated."""
        if stage in self.stages:
            self.stages.remove(stage)
        self.stage[self.stage == stage] = Stage.ACCELERATED

    def _schedule_reset(self, rows: np.ndarray) -> None:
        if len(rows):
            self.resets[rows] = self.pending = True

    def ran_away(
        self, rows: np.ndarray, r: np.ndarray, s: np.ndarray, best: np.ndarray, size: np.ndarray, met: np.ndarray
    ) -> np.ndarray:
        """Which of `rows` are far off, at the norm s of f(z) where their best iterates have `size`.

        `met` are those whose residual r meets the tolerance.
        """
        newton = self.stage[rows] == Stage.NEWTON
        return (r > best) & (met | newton) & (s > np.where(met, _RUN_AWAY, _NEWTON_AWAY) * size)

    def allow_retry(self, rows: np.ndarray, broken: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Of the samples whose f(z) is not finite, those that may go back and try again."""
        self.broken[rows] = np.where(broken, self.broken[rows] + 1, 0)
        again = broken & (self.broken[rows] < self.limits.tries) & np.isfinite(best[rows])
        self._fail(rows[again])
        return again

    def _fail(self, rows: np.ndarray) -> None:
        """Reset `rows`, and shorten their next step if they failed before it."""
        if not len(rows):
            return
        self.failures[rows] += 1
        self.blown[rows] += 1
        self.failing = True
        self.scale[rows] = np.where(self.failures[rows] > 1, self.scale[rows] * _SHORTER, 1.0)
        # plain and Newton-Krylov steps that fail end their stage
        ended = rows[self.stage[rows] >= Stage.PLAIN]
        if len(ended):
            self.due[ended] = self.next_due = 0
        self._schedule_reset(rows)

    def update(
        self, rows: np.ndarray, r: np.ndarray, best: np.ndarray, before: np.ndarray, calls: int, away: np.ndarray
    ) -> None:
        """Take in the finite residuals r of `rows`, the smallest ones of all samples, now and `before` this reading,
        and which `rows` ran away.
        """
        if not self.begun:
            self.mark, self.begun = best.copy(), True
        blown = (r > self.limits.blown * best[rows]) & (self.stage[rows] != Stage.NEWTON) | away
        self._fail(rows[blown])
        if self.failing:
            better = rows[best[rows] < before[rows]]
            self._schedule_reset(better[(self.scale[better] < 1) & (self.stage[better] == Stage.NEWTON)])
            self.failures[better], self.scale[better] = 0, 1.0
            self.failing = bool(self.failures.any())
        if calls >= self.next_due:
            due = rows[calls >= self.due[rows]]
            if len(due):
                self._turn(due, best, calls)
            # of all samples: those that are not finite now are due at a later call
            self.next_due = int(self.due.min(initial=np.iinfo(np.int64).max))

    def _turn(self, due: np.ndarray, best: np.ndarray, calls: int) -> None:
        """The next stage for those of `due` that have not gained."""
        # a plain trial has gained if its rate, kept up for the whole stage, would
        plain = self.limits.plain * self.patience[due]
        share = np.where((self.stage[due] == Stage.PLAIN) & (self.limits.trial > 0), self.limits.trial / plain, 1.0)
        share = np.where(self.long[due], 1.0, share)
        stuck = due[~(best[due] <= self.limits.gain**share * self.mark[due])]
        first, before = stuck[self.stage[stuck] == Stage.ACCELERATED], self.rounds[stuck].copy()
        self.turned[first] = best[first]
        self.long[stuck] = False
        self.stage[stuck] = self._following(stuck)
        self._start_over(stuck[self.rounds[stuck] > before], best)
        self.scale[stuck], self.failures[stuck] = 1.0, 0
        self._schedule_reset(stuck)
        self.mark[due] = best[due]
        self.mark[due[self.over[due] & self.long[due]]] = np.inf
        patience = self.patience[due]
        trial = np.full(len(due), self.limits.trial) if self.limits.trial else self.limits.plain * patience
        lengths = [patience, patience, trial, 2 * patience + self.newton_length]
        self.due[due] = calls + np.where(self.long[due], _LONG * patience, np.choose(self.stage[due], lengths))

    def _start_over(self, wrapped: np.ndarray, best: np.ndarray) -> None:
        """Of samples that have completed a round, those that begin again at the start, and those that did so before."""
        if not self.limits.new_start or not len(wrapped):
            return
        odd = self.rounds[wrapped] % 2 == 1
        over = wrapped[odd & (best[wrapped] > _NO_GAIN * self.turned[wrapped])]
        self.over[over], self.stage[over] = True, Stage.PLAIN
        self.long[over] = self.rounds[over] >= (_LATE if self.small else 1)
        self.back[wrapped[~odd]] = True

    def _following(self, rows: np.ndarray) -> np.ndarray:
        """The stage after the present one; a completed round doubles the patience."""
        order = np.array(self.stages)
        place, blown = np.searchsorted(order, self.stage[rows]) + 1, self.blown[rows] >= 2
        if Stage.NEWTON in self.stages:
            newton = len(order) - 1
            # next after blow-ups; else a large state waits for the second round
            if Stage.CAUTIOUS in self.stages:
                place = np.where(blown & (place < newton), newton, place)
            place = place + ((place == newton) & ~blown & (self.rounds[rows] == 0) & (not self.small))
        wrapped = rows[place >= len(order)]
        self.patience[wrapped] *= 2
        self.rounds[wrapped] += 1
        return order[place % len(order)]
