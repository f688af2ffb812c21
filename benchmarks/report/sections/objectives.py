"""Training objectives of FPDM and of a DiT at equal CPU time."""

from pathlib import Path

from benchmarks.experiments.objectives import (
    BASE,
    FIXED_POINT,
    ITERATIONS,
    ON_IMAGE,
    ON_MNIST,
    SHARED,
    SHORT_ON_IMAGE,
    SHORT_ON_MNIST,
)
from benchmarks.report.formatting import NOTHING, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import decision, verdict

RIVALS = ("DiT 6", "DiT 3")
BEST = "x0"
SHORT = "mnist, 4 minutes, "
HEAD = (
    "objective",
    "steps",
    *(f"{k} iterations" for k in ITERATIONS),
    "2 iterations, reused",
    "2 over 12",
    "2 reused over 12",
    "right label, %",
    *(f"{network}{column}" for network in RIVALS for column in ("", ": right label, %")),
)
ABOUT = (
    "Fréchet distances after 2 CPU minutes on digits, and after 10 or 4 on mnist; 20 timesteps by DDIM, or by Euler's "
    "steps of a rectified flow. FPDM is trained by S-JFB (2, 2) with a contractive start. FPDM has a column for each "
    "number of iterations (reused: solves start from the previous timestep's solution); right labels are counted at "
    f"5 iterations. *{BASE}* is the velocity with zero terminal SNR. Every other row differs from it in one option, "
    "or in the target and one option; flags and sources are in [the guide](diffusion.md). Weights: any-time 0.3, "
    "terminal 0.1, consistent 0.3, Jacobian 0.01, noise of the start 0.3. Growing: N and M rise over the whole "
    "training. With one seed, differences of a tenth are not significant."
)
ABOUT_SHORT = (
    f"On mnist after 4 CPU minutes: options in addition to *{BEST}*, and rectified flow with logit-normal timesteps. "
    f"The last column compares the distances at 12 iterations with those of *{BEST}*: is the option better? "
    "Growing iterations on mnist are under *Settings of training*."
)


def section(results: Path, images: Path) -> str:
    study = Study(results, "objectives")
    digits = [_row(study, "", name) for name in SHARED | FIXED_POINT | ON_IMAGE]
    large = [_row(study, "mnist, ", name) for name in ON_MNIST]
    tables = (table(HEAD, digits), "On mnist after 10 CPU minutes:", table(HEAD, large), ABOUT_SHORT, _short(study))
    return "\n\n".join(("## Objectives", ABOUT, *tables, *_verdicts(study), *_every_budget(study), study.source()))


def _short(study: Study) -> str:
    """The study of 4 minutes on mnist: FPDM with every option, the DiT of three blocks with those for both networks."""
    rows = [
        (*_row(study, SHORT, name, ("DiT 3",)), _against_best(study, name)) for name in SHORT_ON_MNIST | SHORT_ON_IMAGE
    ]
    return table((*HEAD[:-4], *HEAD[-2:], f"FPDM better than {BEST}"), rows)


def _against_best(study: Study, name: str) -> str:
    """Whether an option of the 4 minutes has smaller distances than the image as target alone."""
    option, best = (study.values(f"{SHORT}FPDM: {one}", "20 x 12", "frechet") for one in (name, BEST))
    return "-" if name == BEST else decision(option, best, task="mnist")


def _every_budget(study: Study) -> list[str]:
    """Sentences on whether one FPDM is as good at few iterations: distance at 2 divided by that at 12, by seed."""
    starts = {"the previous timestep's solution": "20 x 2, reused", "a fresh start": "20 x 2"}
    lines = []
    for task in ("digits", "mnist"):
        cell = f"{'' if task == 'digits' else 'mnist, '}FPDM: {BEST}"
        few = {start: study.values(cell, way, "frechet") for start, way in starts.items()}
        many = study.values(cell, "20 x 12", "frechet")
        ratios = {start: [f"{a / b:.2f}" for a, b in zip(values, many, strict=True)] for start, values in few.items()}
        found = [f"from {start} {', '.join(values) or NOTHING}" for start, values in ratios.items()]
        lines.append(
            f"One model for every budget ({task}, {BEST}): the distance at 2 iterations divided by that at 12, by "
            f"seed, is {'; '.join(found)}. The aim is at most 1.1."
        )
    return lines


def _verdicts(study: Study) -> list[str]:
    """Verdicts on FPDM against both DiTs at equal training time, each with its best objective."""
    ours = study.values(f"FPDM: {BEST}", "20 x 12", "frechet")
    before = study.values(f"FPDM: {BASE}", "20 x 12", "frechet")
    claims = {rival: f"FPDM beats {rival} at equal training time (digits, {BEST})" for rival in RIVALS}
    theirs = {rival: study.values(f"{rival}: {BEST}", "20 steps", "frechet") for rival in RIVALS}
    return [f"Beyond the paper: {verdict(claim, ours, theirs[rival])}" for rival, claim in claims.items()] + [
        f"{BEST} in place of {BASE}, FPDM: " + verdict("a smaller distance", ours, before)
    ]


def _row(study: Study, task: str, name: str, rivals: tuple[str, ...] = RIVALS) -> tuple[str, ...]:
    cell = f"{task}FPDM: {name}"
    few, reused, many = (study.mean(cell, f"20 x {way}", "frechet") for way in ("2", "2, reused", "12"))
    ours = (
        mean_and_deviation(study.values(cell, "", "steps"), 0),
        *(mean_and_deviation(study.values(cell, f"20 x {k}", "frechet")) for k in ITERATIONS),
        mean_and_deviation(study.values(cell, "20 x 2, reused", "frechet")),
        *(f"{some / many:.2f}" if some and many else NOTHING for some in (few, reused)),
        mean_and_deviation(study.values(cell, "20 x 5", "accuracy"), 1, 100),
    )
    theirs = (
        text
        for network in rivals
        for text in (
            mean_and_deviation(study.values(f"{task}{network}: {name}", "20 steps", "frechet")),
            mean_and_deviation(study.values(f"{task}{network}: {name}", "20 steps", "accuracy"), 1, 100),
        )
    )
    return (name, *ours, *(theirs if name in SHARED | SHORT_ON_MNIST else ("-",) * (2 * len(rivals))))
