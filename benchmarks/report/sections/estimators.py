"""Gradient estimators at equal training time."""

from pathlib import Path

from apps.diffusion.config.training import Config
from benchmarks.experiments.estimators import GRADS
from benchmarks.report import figures
from benchmarks.report.formatting import DIGITS_ALONE, mean_and_deviation, table
from benchmarks.report.results import Study
from benchmarks.report.significance import verdict


def section(results: Path, images: Path) -> str:
    study = Study(results, "estimators")
    rows = [
        (
            name,
            mean_and_deviation(study.values(name, "20 x 10", "frechet")),
            mean_and_deviation(study.values(name, "20 x 10", "accuracy"), 1, 100),
            mean_and_deviation(study.values(name, "", "steps"), 0),
            mean_and_deviation(study.values(name, "", "loss"), 3),
        )
        for name in GRADS
    ]
    distances = {name: study.values(name, "20 x 10", "frechet") for name in GRADS}
    stop = Config().stop
    solve = (
        f"IFT, JFB, Phantom, Reversible and Unrolled solve to a relative residual of {stop.rtol:g} in at most "
        f"{stop.max_evals} evaluations of the plain iteration; S-JFB draws its numbers of iterations at random. In the "
        "same time an estimator with more expensive steps makes fewer of them: see the column `steps`."
    )
    figures.estimators(distances, images / "report_estimators.png")
    return "\n\n".join(
        (
            "## Gradient estimators at equal training time",
            "![Fréchet distance by estimator](images/report_estimators.png)",
            solve,
            DIGITS_ALONE,
            table(("estimator", "Fréchet distance", "right label, %", "steps", "last loss"), rows),
            "The paper: " + verdict("S-JFB beats JFB", distances["S-JFB(6, 3)"], distances["JFB"]),
            verdict("The exact gradient beats S-JFB", distances["IFT"], distances["S-JFB(6, 3)"]),
            study.source(),
        )
    )
