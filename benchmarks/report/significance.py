"""t tests over seeds (by scipy), which decide whether a difference of two means is more than chance.

If the two sets of numbers come from different networks, Welch's test is used; if both come from the same networks,
sampled in two ways, Student's test of the differences.
"""

import statistics

from scipy import stats

from benchmarks.report.formatting import NOTHING, mean_and_deviation

LEVEL = 0.05
"""A difference is called decided if p is smaller."""
UNTRAINED = {"digits": 5.0, "mnist": 30.0}
"""Fréchet distances, in the features of each task's classifier, above which samples show few digits."""


def p_value(some: list[float], others: list[float], paired: bool) -> float:
    """Two-sided p of the hypothesis of equal means."""
    if len(set(some)) == len(set(others)) == 1:  # no spread: the t statistic is 0 / 0 or infinite
        return float(some[0] == others[0])
    if paired and len({a - b for a, b in zip(some, others, strict=True)}) == 1:
        return float(some[0] == others[0])
    test = stats.ttest_rel(some, others) if paired else stats.ttest_ind(some, others, equal_var=False)
    return float(test.pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def decision(better: list[float], worse: list[float], paired: bool = False, task: str = "digits") -> str:
    """The verdict, as text, on whether the mean of `better` is below that of `worse` by more than the spread of seeds.

    paired: both come from the same networks, in the same order. task: a key of `UNTRAINED`.
    """
    if not better or not worse:
        return NOTHING
    if min(len(better), len(worse)) < 2:
        return "**undecided**, one seed has no spread"
    if min(map(statistics.fmean, (better, worse))) > UNTRAINED[task]:
        return "**undecided**, neither network generates digits after this training time"
    p = p_value(better, worse, paired and len(better) == len(worse))
    if p >= LEVEL:
        return f"**within the spread of seeds** (p = {p:.2f})"
    word = "**yes**" if statistics.fmean(better) < statistics.fmean(worse) else "**no, the reverse**"
    return f"{word} (p {f'= {p:.3f}' if p >= 0.001 else '< 0.001'})"


def verdict(claim: str, better: list[float], worse: list[float], paired: bool = False, task: str = "digits") -> str:
    """A claim, its verdict, and the numbers behind it."""
    if not better or not worse:
        return f"*{claim}*: {NOTHING}."
    numbers = f"Fréchet distance {mean_and_deviation(better)} against {mean_and_deviation(worse)}"
    return f"*{claim}*: {decision(better, worse, paired, task)}; {numbers}."
