"""Sample from a trained run: `python -m apps.diffusion.sample RUN --num 100 --out DIR`.

Writes one PNG per image at its own size, 00042-class-7.png, and grid.png, enlarged. Sample number i depends
on (seed, i), its class and the settings alone, so files that exist are kept, and an interrupted command goes
on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .config import Config, Sampling

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

GRID = 100  # most images in grid.png
PART = 64  # images sampled before their files are written


@dataclass(frozen=True, kw_only=True)
class Request:
    """Sample images from a trained run. What is left out is done as in the run's own samples."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    num: int = 100
    """Images in all."""
    classes: tuple[int, ...] = ()
    """Classes to go through in turn; all by default."""
    sampler: Literal["ddim", "ddpm"] | None = None
    """ddim: deterministic; ddpm: ancestral."""
    steps: int | None = None
    """Timesteps."""
    iterations: int | None = None
    """Iterations of the fixed-point layer per timestep; FPDM only."""
    reuse: bool | None = None
    """Start each solve from the solution of the timestep before; FPDM only."""
    guidance: float | None = None
    """Weight of classifier-free guidance; 1 is none."""
    seed: int = 0
    """Seed of the samples."""
    out: Path | None = None
    """Folder for the images; samples, inside the run, by default."""
    device: str = "cpu"
    """Where to compute, such as cpu or cuda."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.seed < 0:
            raise ValueError(f"--num must be at least 1 and --seed at least 0, got {self.num} and {self.seed}.")

    def sampling(self, default: Sampling) -> Sampling:
        """How to sample: what was asked for, and the run's own choice for the rest."""
        names = ("sampler", "steps", "iterations", "reuse", "guidance")
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(default, **asked)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for bad input."""
    try:
        run(tyro.cli(Request, args=argv, prog="python -m apps.diffusion.sample"))
    except ValueError as error:
        print(f"sample: {error}", file=sys.stderr)
        return 2
    return 0


def run(request: Request) -> None:
    """Write the images that are not there yet, and the grid.

    Raises:
        ValueError: no run in the folder, a class that it does not know, a folder with samples made otherwise.
    """
    config = _config(request.run)
    sampling = request.sampling(config.sampling)
    dataclasses.replace(config, sampling=sampling)  # raises where the two do not fit
    import torch

    from . import build
    from .checkpoint import newest

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    state = newest(request.run)
    model = build.rebuild(state.network)
    model.load_state_dict(state.ema)
    model = model.eval()
    torch.nn.Module.to(model, torch.device(request.device))
    out = request.out or request.run / "samples"
    labels = _labels(request, model.num_classes)
    names = [f"{i:05d}.png" if y is None else f"{i:05d}-class-{y}.png" for i, y in enumerate(labels)]
    _settle(out, request, sampling, state)
    missing = [i for i, name in enumerate(names) if not (out / name).exists()]
    _write(out, names, labels, missing, request, config, sampling, model)
    _write_grid(out, names, labels)
    kept = len(names) - len(missing)
    print(f"{len(missing)} new images" + (f", {kept} kept," if kept else "") + f" and grid.png are in {out}")


def _config(folder: Path) -> Config:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no run (it has no config.json); train one: python -m apps.diffusion.train --out {folder}"
        )
    return Config.from_json(file.read_text())


def _labels(request: Request, num_classes: int) -> list[int | None]:
    """The class of each image; None for all of an unconditional network."""
    if num_classes == 0:
        if request.classes:
            raise ValueError("This run knows no classes; leave out --classes.")
        return [None] * request.num
    wrong = [y for y in request.classes if not 0 <= y < num_classes]
    if wrong:
        raise ValueError(f"--classes {wrong[0]} does not exist: this run knows the classes 0 to {num_classes - 1}.")
    classes = request.classes or range(num_classes)
    return [classes[i % len(classes)] for i in range(request.num)]


def _settle(out: Path, request: Request, sampling: Sampling, state: Checkpoint) -> None:
    """Make the folder and note in it how its images are made; refuse one whose images are made otherwise."""
    from .checkpoint import write_atomically

    settings: dict[str, Any] = {
        "seed": request.seed,
        "classes": list(request.classes),
        **{k: v for k, v in dataclasses.asdict(sampling).items() if k != "images"},
        "network": state.network["class"],
        "trained_images": state.progress.images,
    }
    note = out / "settings.json"
    if note.exists():
        before = json.loads(note.read_text())
        changed = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{out} holds samples made otherwise ({'; '.join(changed)}); give another folder with --out."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else than samples; give another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(settings, indent=2) + "\n")


def _write(
    out: Path,
    names: list[str],
    labels: list[int | None],
    missing: list[int],
    request: Request,
    config: Config,
    sampling: Sampling,
    model: Any,
) -> None:
    """Sample the missing images, part by part, and write each as soon as it is there."""
    from tqdm import tqdm

    from .generate import generate
    from .pictures import to_pil

    with tqdm(total=len(missing), unit="img", desc="sampling", disable=not missing) as bar:
        for group in sorted({i // PART for i in missing}):
            part = [i for i in missing if i // PART == group]
            classes = [y for i in part if (y := labels[i]) is not None] or None
            result = generate(model, config, sampling, part, classes, request.seed, request.device)
            for i, image in zip(part, result.samples, strict=True):
                partial = out / f".{names[i]}.partial"
                to_pil(image).save(partial, format="PNG")
                os.replace(partial, out / names[i])
            bar.update(len(part))


def _write_grid(out: Path, names: list[str], labels: list[int | None]) -> None:
    """The first images, ten to a row or one class to a column."""
    from .pictures import columns_by_class, grid, read

    known = [-1 if y is None else y for y in labels]
    classes = sorted(set(known))
    by_class = 1 < len(classes) <= 20
    columns = len(classes) if by_class else min(10, len(names))
    order = columns_by_class(known, GRID // columns) if by_class else list(range(min(GRID, len(names))))
    head = [str(y) for y in classes] if by_class else ()
    partial = out / ".grid.png.partial"
    grid([read(out / names[i]) for i in order], columns, head=head).save(partial, format="PNG")
    os.replace(partial, out / "grid.png")


if __name__ == "__main__":
    sys.exit(main())
