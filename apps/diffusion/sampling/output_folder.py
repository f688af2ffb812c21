"""The output folder of the sampling command, into which several processes may write at once.

    00042-class-7.png      sample 42 (00042.png without classes); an interruption leaves no incomplete file
    settings.json          the settings that all samples depend on
    grid.png               the first samples, enlarged
    samples.npz            all samples for the ADM evaluation suite, with --npz
    allocation.json        residual curves and the iterations allocated by them, with --allocation measured
    effort.json            the cost of all samples, the sum of .effort-RANK.jsonl (one line for each part)

The content, apart from the cost, does not depend on the number of processes.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from apps.diffusion.files.atomic import atomic_path, make_folder, write_text
from apps.diffusion.files.images import columns_by_class, grid, read, to_pil
from apps.diffusion.files.json_file import read_object, write_object, write_or_compare
from apps.diffusion.sampling.residual_curves import ResidualCurves
from apps.diffusion.sampling.sampler import SampleResult

GRID = 100  # largest number of images in grid.png
CURVES = "allocation.json"


@dataclass(frozen=True)
class OutputFolder:
    """Samples number 0 ... n - 1 in a folder.

    Attributes:
        folder: the folder.
        labels: class of each sample; None for samples without classes.
    """

    folder: Path
    labels: Sequence[int | None]

    def name(self, i: int) -> str:
        """The file name of sample i."""
        y = self.labels[i]
        return f"{i:05d}.png" if y is None else f"{i:05d}-class-{y}.png"

    def missing(self) -> list[int]:
        """Numbers of the samples whose files do not exist."""
        return [i for i in range(len(self.labels)) if not (self.folder / self.name(i)).exists()]

    def write_or_check_settings(self, settings: dict[str, Any]) -> None:
        """Make the folder and write settings.json, or compare an existing settings.json with `settings`.

        Raises:
            ValueError: the folder holds images of other settings, or other files; nothing is written then.
        """
        note, remedy = self.folder / "settings.json", "give another folder with --out."
        if self.folder.exists() and (
            not self.folder.is_dir() or any(not p.name.startswith(".settings.json.") for p in self.folder.iterdir())
        ):
            if not note.exists():  # checked last: another process may write the settings at this time
                raise ValueError(f"{self.folder} holds files that are no samples; {remedy}")
        make_folder(self.folder)
        write_or_compare(note, settings, remedy)

    def read_curves(self) -> ResidualCurves | None:
        """The residual curves in allocation.json, by which an earlier command allocated iterations; None without it."""
        file = self.folder / CURVES
        try:
            return ResidualCurves.from_json(read_object(file)) if file.exists() else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}); give another folder with --out.") from None

    def write_curves(self, curves: ResidualCurves, iterations: Sequence[int]) -> None:
        """Write allocation.json: the residual curves, and the iterations allocated by them."""
        write_text(self.folder / CURVES, json.dumps({**vars(curves), "iterations": list(iterations)}) + "\n")

    def others(self) -> int:
        """The number of images in the folder that are not samples 0 ... n - 1."""
        return sum(file.name[:5].isdigit() for file in self.folder.glob("*.png")) - len(self.labels)

    def write(self, i: int, image: Any) -> None:
        """Write sample i, an image (C, H, W) in [-1, 1]."""
        with atomic_path(self.folder / self.name(i)) as partial:
            to_pil(image).save(partial, format="PNG")

    def read(self, i: int) -> Image.Image:
        """Sample i.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return read(self.folder / self.name(i))
        except PermissionError:
            raise
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(
                f"{self.folder / self.name(i)} cannot be read ({error}); delete it and give the same command again, "
                "which samples it again."
            ) from None

    def write_grid(self) -> None:
        """Write grid.png: the first images, with a column for each class (2 to 20 classes), else in rows of ten."""
        known = [-1 if y is None else y for y in self.labels]
        classes = sorted(set(known))
        by_class = 1 < len(classes) <= 20
        columns = len(classes) if by_class else min(10, len(known))
        order = columns_by_class(known, GRID // columns) if by_class else list(range(min(GRID, len(known))))
        head = [str(y) for y in classes] if by_class else ()
        with atomic_path(self.folder / "grid.png") as partial:
            grid([self.read(i) for i in order], columns, head=head).save(partial, format="PNG")

    def write_npz(self) -> None:
        """Write samples.npz: arr_0 (n, H, W, 3) uint8, with three equal channels for gray, and arr_1 (n,) the classes.

        Images are written one at a time, so that little memory is needed. Equal images give equal files.
        """
        width, height = self.read(0).size
        with atomic_path(self.folder / "samples.npz") as partial, zipfile.ZipFile(partial, "w") as archive:
            with _member(archive, "arr_0.npy", (len(self.labels), height, width, 3), "|u1") as file:
                for i in range(len(self.labels)):
                    image = self.read(i)
                    if image.size != (width, height):
                        raise ValueError(
                            f"The sizes of {self.name(i)} and {self.name(0)} differ; delete the file that is wrong."
                        )
                    file.write(np.asarray(image.convert("RGB")).tobytes())
            if self.labels[0] is not None:
                with _member(archive, "arr_1.npy", (len(self.labels),), "<i8") as file:
                    file.write(np.asarray(self.labels, dtype="<i8").tobytes())

    def add_effort(self, rank: int, result: SampleResult, wanted: Sequence[int]) -> None:
        """Append the effort of one part to .effort-RANK.jsonl of process `rank`, for the samples `wanted` only."""
        effort = result.effort.of([result.indices.index(i) for i in wanted])
        residuals = effort.residuals.double()
        line = {
            "indices": list(wanted),
            "block_passes": int(effort.block_passes.sum()),
            "macs": int(effort.macs.sum()),
            "computed": effort.computed,
            "evaluations": effort.evaluations.sum(0).tolist(),
            "residual_sum": residuals.sum(0).tolist() if residuals.isfinite().all() else None,
            "residual_max": residuals.amax(0).tolist() if residuals.isfinite().all() else None,
            "rounds": int(effort.rounds.sum()) if effort.rounds is not None else 0,
            "seconds": effort.seconds,
        }
        with (self.folder / f".effort-{rank}.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
            cut_off = file.read(1) not in (b"", b"\n")  # a killed process left an incomplete line: begin a new line
            file.write(("\n" * cut_off + json.dumps(line) + "\n").encode())

    def write_effort(self, timesteps: Sequence[int]) -> dict[str, Any]:
        """Write effort.json, the cost of all images of this folder over all processes and commands; see `summed`."""
        files = sorted(self.folder.glob(".effort-*.jsonl"))
        texts = [text for file in files for text in file.read_text(errors="replace").splitlines()]
        lines = [line for text in texts if (line := _effort_line(text, len(timesteps))) is not None]
        total = summed(lines, timesteps)
        write_object(self.folder / "effort.json", total)
        return total


def _effort_line(text: str, steps: int) -> dict[str, Any] | None:
    """An entry of .effort-RANK.jsonl; None for a line that is damaged, or that a killed process left incomplete."""
    names = {"block_passes", "macs", "computed", "residual_sum", "residual_max", "seconds"}
    try:
        line = json.loads(text)
        return line if names <= set(line) and len(line["evaluations"]) == steps else None
    except (ValueError, KeyError, TypeError):
        return None


def summed(lines: Sequence[dict[str, Any]], timesteps: Sequence[int]) -> dict[str, Any]:
    """The content of effort.json, from the lines of .effort-RANK.jsonl.

    images                   number of different samples
    sampled                  number of samples computed; a sample that was computed twice counts twice
    per_image                means: block passes, MACs, evaluations of the fixed-point layer, rounds (successive calls
                             of the network)
    block_passes_computed    block passes of all rows of all chunks, including rows that are not requested
    by_timestep              mean evaluations; mean and largest relative residual at the end of the solves
    seconds                  seconds in the sampling loop, summed over processes
    """
    sampled = sum(line["images"] if "images" in line else len(line["indices"]) for line in lines)
    if not sampled:
        return {"images": 0, "seconds": 0.0}
    different = {i for line in lines for i in line.get("indices", ())}

    def column(name: str) -> list[Any]:
        return [line[name] for line in lines]

    evaluations = np.sum(column("evaluations"), axis=0)
    by_timestep: dict[str, Any] = {"timestep": list(timesteps)}
    if evaluations.any():
        by_timestep["evaluations"] = (evaluations / sampled).tolist()
    if all(column("residual_sum")):
        by_timestep["residual_mean"] = (np.sum(column("residual_sum"), axis=0) / sampled).tolist()
        by_timestep["residual_max"] = np.max(column("residual_max"), axis=0).tolist()
    return {
        "images": len(different) or sampled,
        "sampled": sampled,
        "per_image": {
            "block_passes": sum(column("block_passes")) / sampled,
            "macs": sum(column("macs")) / sampled,
            "evaluations": float(evaluations.sum()) / sampled,
            "rounds": sum(line.get("rounds", 0) for line in lines) / sampled,
        },
        "block_passes_computed": sum(column("computed")),
        "by_timestep": by_timestep,
        "seconds": sum(column("seconds")),
    }


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> Any:
    """An array in an .npz archive, open for writing its values; the header is written already."""
    # ZipInfo's default date is 1980, so the file does not depend on the clock
    file = archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})  # pyright: ignore
    return file
