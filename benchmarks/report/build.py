"""Writes docs/report.md and its figures from the result files: `python -m benchmarks.report.build`.

The sections are in `benchmarks/report/sections/`, one file each.
"""

import argparse
from pathlib import Path

from benchmarks.diffusion import shipped_sampling
from benchmarks.harness import read_result
from benchmarks.report.claims import claims
from benchmarks.report.formatting import NOTHING
from benchmarks.report.gradients import mark
from benchmarks.report.sections import (
    allocation,
    budgets,
    compute,
    core_gradients,
    core_solvers,
    costs,
    default_run,
    depth,
    estimators,
    gpu,
    iteration_split,
    layers,
    memory,
    noise,
    objectives,
    reuse,
    settings,
    shipped,
    size_and_memory,
    solvers_in_sampling,
)

ROOT = Path(__file__).parents[2]
SECTIONS = (
    size_and_memory,
    memory,
    compute,
    noise,
    depth,
    settings,
    objectives,
    budgets,
    estimators,
    reuse,
    iteration_split,
    layers,
    allocation,
    solvers_in_sampling,
    default_run,
    shipped,
    costs,
    core_solvers,
    core_gradients,
    gpu,
)


_QUALITY = (
    "Scores of the networks in the repository (`python -m benchmarks.diffusion.shipped`), with the same seeds in all "
    "rows; right labels and Fréchet distance by a LeNet trained on the held-out digits, pixels in 0..1:"
)
_COST = "CPU time with and without `--reproducible` (`python -m benchmarks.diffusion.shipped`):"


def build(results: Path, out: Path) -> str:
    """Writes the report to `out` and its figures to the folder `images` beside it; returns the text."""
    images = out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [part.section(results, images) for part in SECTIONS]
    head = (
        "# Report\n\nTests of the paper's claims about Fixed Point Diffusion Models at the scale of handwritten "
        "digits, and the cost of the core. `python -m benchmarks.report.build` writes this page from the files in "
        "`benchmarks/results/`, which name command, device, versions and commit. Numbers are means and standard "
        "deviations over seeds; there are three seeds unless another number is given. A claim is called decided if p "
        "< 0.05 by a t test over seeds: Welch's test, or the test of the differences if the same networks are "
        "sampled in two ways. All networks of a comparison are trained for the same CPU time of one thread, a budget "
        "on which other work on the machine has little effect. Lower Fréchet distances (features of a digits "
        "classifier) are better."
    )
    return "\n\n".join((head, claims(parts), *parts)) + "\n"


def guide(result: Path, page: Path) -> None:
    """Puts the solvers' tables into the guide on solvers, if the result file and the page exist."""
    if result.exists() and page.exists():
        found = read_result(result)
        text = mark(page.read_text(), "peers", core_solvers.counts(found))
        text = mark(text, "overhead", core_solvers.beside_torchdeq(found))
        text = mark(text, "traffic", core_solvers.traffic(found)) if "bytes moved" in found else text
        public = read_result(result.with_name("public_problems.json"))
        text = mark(text, "public problems", core_solvers.public(public)) if public else text
        cases = read_result(result.with_name("contractions.json"))
        text = mark(text, "contractions", core_solvers.contractions(cases)) if cases else text
        compiled = read_result(result.with_name("compiled.json"))
        page.write_text(mark(text, "compiled", core_solvers.compiled(compiled)) if compiled else text)


def sampling(result: Path, page: Path) -> None:
    """Puts the tables of the networks in the repository into the page on sampling."""
    found = read_result(result)
    if found and page.exists():
        text = mark(page.read_text(), "precision", f"{_QUALITY}\n\n{shipped.quality(found)}")
        text = mark(text, "reproducible", f"{_COST}\n\n{shipped.reproducible(found)}")
        page.write_text(text)
    ways = read_result(result.with_name("shipped_sampling.json"))
    if ways and page.exists():
        text = page.read_text()
        for marker, rows in shipped_sampling.tables(ways).items():
            text = mark(text, marker, rows)
        page.write_text(text)


def recipe(result: Path, page: Path) -> None:
    """Puts the memory of a training step at batch 64 into the ImageNet recipe."""
    found = read_result(result)
    if found and page.exists():
        text = mark(page.read_text(), "memory", memory.at_batch(found, 64))
        page.write_text(mark(text, "fits", memory.fitting(found)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.build", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "report.md")
    options = parser.parse_args(arguments)
    text = build(options.results, options.out)
    options.out.write_text(text)
    guide(options.results / "solvers.json", options.out.parent / "solvers.md")
    recipe(options.results / "memory_xl.json", options.out.parent / "imagenet.md")
    sampling(options.results / "shipped.json", options.out.parent / "sampling.md")
    print(f"{options.out}: {text.count(NOTHING)} entries {NOTHING}.")


if __name__ == "__main__":
    main()
