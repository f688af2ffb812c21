"""Diagnose the fixed point of a trained FPDM over the timesteps: `python -m apps.diffusion.diagnose RUN --out DIR`.

The command writes diagnosis.md, a table with a row for each timestep (kind of fixed point, spectral radius of df/dz,
iterations of the plain iteration to each tolerance, evaluations of f by each solver), diagnosis.json with the same
numbers, and diagnosis.png.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.pretrained import output_folder
from apps.diffusion.checkpoint.readers import Weights
from apps.diffusion.cli import device_of, run_request
from apps.diffusion.config.checks import at_least
from apps.diffusion.config.sampling import SamplingOptions
from apps.diffusion.files.atomic import atomic_path, make_folder, write_text
from apps.diffusion.files.plots import timestep_curves
from apps.diffusion.sampling.diagnosis import TimestepDiagnosis, diagnose_timesteps, table
from apps.diffusion.sampling.plan import plan

_FILES = ("diagnosis.md", "diagnosis.json", "diagnosis.png")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Diagnose the fixed point of a trained FPDM at each timestep. Sampling options default to those of the training
    run.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a training run, a pipeline or a model, or the name of a network of the repository (mnist-fpdm)."""
    num: int = 4
    """Number of samples; with guidance each sample has two rows of the batch, with its class and with the null class.
    """
    classes: tuple[str, ...] = ()
    """Classes to cycle through, by number or name; default: all."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """Options of the sampling run whose noisy images are the inputs of the layer."""
    tolerance: float = 1e-4
    """Relative tolerance that the solvers have to meet."""
    budget: int = 1000
    """Maximum number of evaluations of the layer and products with its Jacobian, together, at each timestep."""
    seed: int = 0
    """Random seed of the samples."""
    weights: Weights = "ema"
    """Weights of a training run: ema, the averaged weights, or model, the weights after the last step."""
    out: Path | None = None
    """Output folder; default: RUN/diagnosis, or diagnosis/NAME for a network by name."""
    device: str = "auto"
    """Device by name, such as cpu or cuda; auto: the first available of cuda, mps, xpu and cpu."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num", "budget")
        at_least(self, 0, "seed")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance must lie between 0 and 1, got {self.tolerance}.")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""
    return run_request(Request, "diagnose", run, argv)


def run(request: Request) -> None:
    """Diagnose, write the files and print the table.

    Raises:
        ValueError: the folder holds no FPDM, or an option does not fit the network.
    """
    out = request.out or output_folder(request.run, "diagnosis")
    if found := [name for name in _FILES if (out / name).exists()]:
        raise ValueError(f"{out} holds {found[0]} already, and nothing is overwritten; give another folder with --out.")
    device = device_of(request.device)
    opened = open_network(request.run, request.weights)
    opened.to(device)
    chosen = plan(opened.model, opened.scheduler, request.sampling, defaults=opened.options)
    classes = opened.class_cycle(request.classes)
    rows = diagnose_timesteps(
        opened.model,  # pyright: ignore[reportArgumentType]: a DiT is refused there
        chosen,
        [classes[i % len(classes)] for i in range(request.num)] if classes else None,
        num=request.num,
        seed=request.seed,
        tolerance=request.tolerance,
        budget=request.budget,
        device=device,
    )
    _write(out, request, rows)
    print(table(rows))
    print(
        "Columns 1e-01 to 1e-04: iterations of the plain iteration to this relative residual; columns of solvers: "
        f"evaluations to {request.tolerance:g}."
    )
    print(f"diagnosis.md, diagnosis.json and diagnosis.png are in {out}")


def _write(out: Path, request: Request, rows: list[TimestepDiagnosis]) -> None:
    make_folder(out)
    try:
        _write_files(out, request, rows)
    except BaseException:  # the same command would refuse the files that were written before the disk was full
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        raise


def _write_files(out: Path, request: Request, rows: list[TimestepDiagnosis]) -> None:
    settings = {"num": request.num, "seed": request.seed, "tolerance": request.tolerance, "budget": request.budget}
    content = {"settings": settings, "timesteps": [row.summary() for row in rows]}
    write_text(out / "diagnosis.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "diagnosis.md", table(rows) + "\n")
    radius = {
        "largest": [max(row.radius, default=float("nan")) for row in rows],
        "smallest": [min(row.radius, default=float("nan")) for row in rows],
    }
    evaluations = {
        name: [float("nan") if (n := row.solvers()[name]) is None else float(n) for row in rows]
        for name in rows[0].solvers()
    }
    panels = {
        "spectral radius of df/dz": radius,
        f"evaluations to a relative residual of {request.tolerance:g}": evaluations,
    }
    with atomic_path(out / "diagnosis.png") as partial:
        timestep_curves([row.t for row in rows], panels, partial)


if __name__ == "__main__":
    sys.exit(main())
