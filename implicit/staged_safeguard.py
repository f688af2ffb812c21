"""The safeguard in stages: resets to the best iterate, and other steps where acceleration gains nothing.

For each sample the host decides from the residuals that the loop reads for the stopping criterion:

    blow-up    ||r|| > `blown` times the smallest so far, or not finite: the sample is reset to its best iterate. The
               solver may keep the difference of the two points as a pair of its history. After a second blow-up
               without a smaller residual in between, a quarter of the next step is taken, then a sixteenth, and so on.
               A sample whose f(z) is not finite `tries` times in a row has failed. In the Newton-Krylov stage residuals
               may grow, and only a value that is not finite ends the stage; any blow-up ends a plain stage.
    run-away   ||r|| exceeds the smallest so far but meets the tolerance, and ||f(z)|| is above 1e4 times that of the
               best iterate: handled as a blow-up instead of CONVERGED, since a relative tolerance admits any ||r|| once
               the state is large enough. In the Newton-Krylov stage 1e8 times is a run-away at any larger ||r||.
    stall      within `patience` evaluations the smallest residual has not fallen to the share `gain` of its value: the
               sample enters the next stage from its best iterate,

                   accelerated -> cautious -> plain steps z' = f(z) -> Newton-Krylov steps -> accelerated ...

               A stage lasts as long as it gains. The gain of plain steps is measured after 8 steps: the stage goes on
               if the same rate over twice the patience would reach `gain`. After a round of all stages the patience
               doubles.
    new start  the stages after the first accelerated one have not halved the smallest residual: the next round begins
               at the start of the solve, with plain steps, and the round after that at the best iterate of both
               attempts (`implicit.loop.best_iterates`). In this round plain and accelerated stages alternate, two
               patiences each, since accelerated steps may need few evaluations from the iterate that plain steps have
               reached. The alternation ends with accelerated steps that reach `gain`, which go on, or with plain steps
               that miss it. The first plain stage always passes, because a residual may stay or rise long before it
               falls. States of at most 20 numbers alternate from the fourth round on, six patiences each.

The Newton-Krylov stage lasts two patiences plus the evaluations of 12 Newton steps of a small state, 4 of a large one.
States of more than 20 numbers skip this stage in the first round. If the solver has a cautious stage, a sample that has
blown up twice enters the Newton-Krylov stage next, before the cautious and the plain stage. Maps that cannot be
differentiated have no Newton-Krylov stage. Solvers without a cautious stage lose their history with every reset: they
have other `Limits` and no new start. A solve without a tolerance reads no residual and has no safeguard.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

_SHORTER = 0.25  # factor on the length of the next step, for each blow-up in a row after the first
_RUN_AWAY = 1e4  # ||f(z)|| above this multiple of that of the best iterate, with r within the tolerance, is a run-away
_NEWTON_AWAY = 1e8  # likewise in the Newton-Krylov stage, with r above the tolerance
_NO_GAIN = 0.5  # stages after the accelerated one that leave more than this share of the residual cause a new start
_TURN, _SMALL_TURN = 2, 6  # length of the alternating stages from a new start, in units of `patience`; of small states
_LATE = 3  # completed rounds before the stages from a small state's new start alternate; large states: 1
_SMALL = 20  # largest number of entries N of a small state


class Stage(IntEnum):
    """The kind of steps that a sample takes."""

    ACCELERATED = 0
    CAUTIOUS = 1
    PLAIN = 2
    NEWTON = 3


@dataclass(frozen=True)
class Limits:
    """Thresholds at which a stage, or a sample, ends.

    Attributes:
        gain: a stage has gained if the smallest residual falls to this share of its value when the stage began.
        blown: a residual above this multiple of the smallest one is a blow-up.
        tries: a sample has failed after so many evaluations in a row whose f(z) is not finite.
        plain: length of the plain stage, in units of `patience`.
        trial: plain steps after which their gain is projected to the whole stage; 0: the whole stage is measured.
        new_start: whether a round that gained nothing is followed by a round from the start of the solve.
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
        patience: evaluations within which an accelerated stage must gain.
        numbers: N, the size of a sample's state.
        limits: `CAUTIOUS` for solvers with a cautious stage, `HISTORY_LOST` for others.
    """

    def __init__(self, size: int, patience: int, numbers: int, limits: Limits = CAUTIOUS) -> None:
        self.limits = limits
        self.small = numbers <= _SMALL
        self.turn = _SMALL_TURN if self.small else _TURN
        self.newton_length = max(12 * (min(numbers, 10) + 1), 4 * (min(numbers, 60) + 1))
        self.stages = list(Stage)
        self.patience = np.full(size, patience)
        self.stage = np.zeros(size, dtype=np.int8)
        self.scale = np.ones(size)  # share of the next step to take
        self.resets = np.zeros(size, dtype=bool)
        self.pending = False  # whether a sample must be reset or has changed its stage
        self.failures = np.zeros(size, dtype=np.int64)  # blow-ups without a smaller residual in between
        self.broken = np.zeros(size, dtype=np.int64)  # evaluations in a row whose f(z) was not finite
        self.retrying = False  # whether a sample was reset since its last f(z) was not finite
        self.failing = False  # whether a sample in `failures` is above 0
        self.blown = np.zeros(size, dtype=np.int64)  # blow-ups of the whole solve
        self.rounds = np.zeros(size, dtype=np.int64)  # completed rounds
        self.starting_over = np.zeros(size, dtype=bool)  # samples that begin again at the start of the solve
        self.returning = np.zeros(size, dtype=bool)  # samples that end such an attempt and return to their best iterate
        self.alternating = np.zeros(size, dtype=bool)  # samples in plain and accelerated stages that take turns
        self.accelerated_end = np.full(size, np.inf)  # smallest residual at the end of this round's accelerated stage
        self.stage_begin = np.full(size, np.inf)  # smallest residual when the present stage began
        self.begun = False  # whether `stage_begin` is set
        self.due = np.full(size, patience)  # number of the evaluation at which the stage is measured
        self.next_due = patience  # the smallest entry of `due`

    def on(self, stage: Stage) -> np.ndarray:
        """Which samples are in `stage`."""
        return self.stage == stage

    def pop_resets(self) -> np.ndarray:
        """Which samples must be reset; cleared by the call."""
        resets, self.resets, self.pending = self.resets, np.zeros_like(self.resets), False
        return resets

    def pop_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Which samples begin again at the start of the solve, and which end such an attempt; cleared by the call."""
        starting, returning = self.starting_over, self.returning
        self.starting_over, self.returning = np.zeros_like(starting), np.zeros_like(returning)
        return starting, returning

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
        """Which of `rows` have run away.

        r and s are the norms of f(z) - z and f(z); `best` and `size` are the same norms at the best iterates; `met`
        marks the samples whose r meets the tolerance.
        """
        newton = self.stage[rows] == Stage.NEWTON
        with np.errstate(over="ignore"):  # no number exceeds a limit that is out of range
            limit = np.where(met, _RUN_AWAY, _NEWTON_AWAY) * size
        return (r > best) & (met | newton) & (s > limit)

    def allow_retry(self, rows: np.ndarray, broken: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Which of the samples `broken`, whose f(z) is not finite, are reset to their best iterate; the rest failed."""
        self.broken[rows] = np.where(broken, self.broken[rows] + 1, 0)
        again = broken & (self.broken[rows] < self.limits.tries) & np.isfinite(best[rows])
        self._fail(rows[again])
        self.broken[rows[broken & ~again]] = self.limits.tries
        self.retrying = bool(((self.broken > 0) & (self.broken < self.limits.tries)).any())
        return again

    def _fail(self, rows: np.ndarray) -> None:
        """Reset `rows` after a blow-up, with a shorter next step if it was not the first in a row."""
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
        """Resets and stages after a reading at evaluation number `calls`.

        r are the finite residuals of `rows`; `best` and `before` are the smallest residuals of all samples with and
        without this reading; `away` marks the `rows` that ran away.
        """
        if not self.begun:
            self.stage_begin, self.begun = best.copy(), True
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
            # over all samples, since samples whose f(z) is not finite now are not in `rows`
            self.next_due = int(self.due.min(initial=np.iinfo(np.int64).max))

    def _turn(self, due: np.ndarray, best: np.ndarray, calls: int) -> None:
        """Move the samples of `due` that have not gained, or that alternate, to their next stage."""
        # a plain trial must reach the share of `gain` that belongs to its part of the whole stage
        plain = self.limits.plain * self.patience[due]
        share = np.where((self.stage[due] == Stage.PLAIN) & (self.limits.trial > 0), self.limits.trial / plain, 1.0)
        share = np.where(self.alternating[due], 1.0, share)
        gained = best[due] <= self.limits.gain**share * self.stage_begin[due]
        changed = self._alternate(due, gained)
        stuck = due[~changed & ~gained]
        first, before = stuck[self.stage[stuck] == Stage.ACCELERATED], self.rounds[stuck].copy()
        self.accelerated_end[first] = best[first]
        self.stage[stuck] = self._following(stuck)
        self._start_over(stuck[self.rounds[stuck] > before], best)
        moved = due[changed | ~gained]
        self.scale[moved], self.failures[moved] = 1.0, 0
        self._schedule_reset(stuck)
        self.stage_begin[due] = best[due]
        self.stage_begin[due[self.starting_over[due] & self.alternating[due]]] = np.inf
        patience = self.patience[due]
        trial = np.full(len(due), self.limits.trial) if self.limits.trial else self.limits.plain * patience
        lengths = [patience, patience, trial, 2 * patience + self.newton_length]
        length = np.where(self.alternating[due], self.turn * patience, np.choose(self.stage[due], lengths))
        self.due[due] = calls + length

    def _alternate(self, due: np.ndarray, gained: np.ndarray) -> np.ndarray:
        """Which of the samples `due` change between the plain and the accelerated stage of a new start.

        The alternation ends for those whose accelerated steps have `gained`, or whose plain steps have not.
        """
        plain = self.stage[due] == Stage.PLAIN
        change = self.alternating[due] & (plain == gained)
        self.alternating[due] &= change
        # accelerated steps begin at the present iterate, plain ones at the best
        self.stage[due[change & plain]] = Stage.ACCELERATED
        self.stage[due[change & ~plain]] = Stage.PLAIN
        self._schedule_reset(due[change & ~plain])
        self.pending |= bool(change.any())
        return change

    def _start_over(self, wrapped: np.ndarray, best: np.ndarray) -> None:
        """Of samples that have completed a round, mark those that begin at the start, and those that return from it."""
        if not self.limits.new_start or not len(wrapped):
            return
        odd = self.rounds[wrapped] % 2 == 1
        over = wrapped[odd & (best[wrapped] > _NO_GAIN * self.accelerated_end[wrapped])]
        self.starting_over[over], self.stage[over] = True, Stage.PLAIN
        self.alternating[over] = self.rounds[over] >= (_LATE if self.small else 1)
        self.returning[wrapped[~odd]] = True

    def _following(self, rows: np.ndarray) -> np.ndarray:
        """The stage after the present one; a completed round doubles the patience."""
        order = np.array(self.stages)
        place, blown = np.searchsorted(order, self.stage[rows]) + 1, self.blown[rows] >= 2
        if Stage.NEWTON in self.stages:
            newton = len(order) - 1
            # after two blow-ups the Newton-Krylov stage is next; else a large state skips it in the first round
            if Stage.CAUTIOUS in self.stages:
                place = np.where(blown & (place < newton), newton, place)
            place = place + ((place == newton) & ~blown & (self.rounds[rows] == 0) & (not self.small))
        wrapped = rows[place >= len(order)]
        self.patience[wrapped] *= 2
        self.rounds[wrapped] += 1
        return order[place % len(order)]
