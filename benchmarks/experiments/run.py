"""Studies on handwritten digits, resumable: `python -m benchmarks.experiments.run NAME` (or all).

Every cell is trained for the same CPU time of one thread, a budget on which other work on the machine has little
effect. Finished cells are kept, so that an interrupted study continues. Trained networks are kept too, in a folder that
git ignores, so that new sampling settings of a study are scored without training again.
"""

import argparse
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.harness import RESULTS

NETWORKS = Path(__file__).parents[2] / "runs" / "studies"
NAMES = ("sampling", "estimators", "outer-blocks", "iteration-split", "depth", "settings", "objectives")


def study(name: str) -> ModuleType:
    """The module of a study."""
    from importlib import import_module

    return import_module(f"benchmarks.experiments.{name.replace('-', '_')}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.run", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, "all"), help="name of the study; sampling has four studies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--networks", type=Path, default=NETWORKS, help="folder of the trained networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", default="", help="run only cells whose names begin with this text")
    parser.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny: runs of seconds, to test the program"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in NAMES if options.name == "all" else (options.name,):
        complete(name, options)


def complete(name: str, options: Any) -> None:
    """Run the cells of one study that have no record yet."""
    import torch
    from tqdm import tqdm

    from benchmarks.experiments.common import SCALES, Records, floor, run, scorer
    from benchmarks.harness import provenance

    torch.set_num_threads(1)
    count = int(SCALES[options.scale]["samples"])
    images, held_out, image_scorer = scorer()
    about = {
        "command": f"python -m benchmarks.experiments.run {name}"
        + (" --scale tiny" if options.scale == "tiny" else ""),
        "scale": options.scale,
        **provenance("cpu", "diffusers", "scikit-learn"),
        "training_cpu_seconds": SCALES[options.scale][name],
        "samples": count,
        "real": {
            "held out": vars(image_scorer.score(held_out.x, held_out.y)),
            "as many training images as a score has samples": floor(images, image_scorer, count),
        },
    }
    records = Records(options.results / f"experiment_{name}.json", about)
    cells = [cell for cell in study(name).cells(options.scale) if cell.name.startswith(options.cells)]
    todo = [(cell, seed) for seed in options.seeds for cell in cells]
    for cell, seed in tqdm(todo, desc=name, unit="cell"):
        key = f"{cell.name}, seed {seed}"
        known = records.cells.get(key)
        found = run(cell, seed, count, options.networks / options.scale / name / f"{key}.pt", known)
        if found is not known:
            records.enter(key, found)


if __name__ == "__main__":
    main()
