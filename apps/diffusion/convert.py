"""Convert a trained network: `python -m apps.diffusion.convert CHECKPOINT --out DIR [--to LAYOUT]`.

CHECKPOINT is a file (.pt, .pth, .bin or .safetensors) in the layout of the DiT repository, of the FPDM repository or of
diffusers; a folder (a diffusers model, a model that this command wrote, or a training run); or the name of a network of
the repository. LAYOUT determines the files in DIR and the call that loads them:

    ours        config.json, diffusion_pytorch_model.safetensors      DiT.from_pretrained(DIR) or FPDM...
    diffusers   the same two files                                    DiTTransformer2DModel.from_pretrained(DIR)
    dit, fpdm   model.pt, a plain state dict                          torch.load(DIR/model.pt)
    pipeline    a training run's network, scheduler and options       FixedPointPipeline.from_pretrained(DIR)

All layouts but pipeline add conversion.json, with the source and a description of the network. Nothing in a checkpoint
is executed. DIR is written completely or not at all, and must be new or empty.
"""

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from apps.diffusion.checkpoint import pretrained, state_dicts, trained_run, training_state
from apps.diffusion.checkpoint.readers import ReadOptions, read_network, refuse
from apps.diffusion.cli import run_request
from apps.diffusion.files import hashing
from apps.diffusion.files.atomic import atomic_path, make_folder
from apps.diffusion.models import build
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.pipeline import FixedPointPipeline

_AFTER = "Nothing was written. If the folder of --out cannot be written to, give another one."


@dataclass(frozen=True, kw_only=True)
class Request:
    """Convert a trained DiT or FPDM between the published layouts, diffusers and ours."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Checkpoint file, folder of a model or of a training run, or name of a network of the repository (mnist-fpdm)."""
    out: Path
    """Folder to write."""
    to: Literal["ours", "dit", "fpdm", "diffusers", "pipeline"] = "ours"
    """Layout to write."""
    options: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)
    """Settings that a checkpoint file does not determine."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code (see cli.py)."""

    def command(request: Request) -> None:
        check_out(request.out)
        make_folder(request.out.parent)
        request = replace(request, out=Path(os.path.realpath(request.out)))  # a link is kept, and its target written
        if request.to == "pipeline":
            print(write_pipeline(request))
        else:
            print(write(read_network(pretrained.locate(request.checkpoint), request.options), request))

    return run_request(Request, "convert", command, argv, after=_AFTER)


def check_out(out: Path) -> None:
    """Raises ValueError if the output folder exists and is not an empty folder, or is the working directory, which
    would be replaced.
    """
    if out.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is the working directory; give the name of a new folder.")
    if os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists, and nothing is overwritten; give another folder with --out.")


def write(model: DiT | FPDM, request: Request) -> str:
    """Write the network in the layout `request.to`; returns a sentence that reports the result.

    Raises:
        ValueError: the layout cannot hold this network, or the output folder is not empty.
    """
    layout = type(model).__name__.lower()
    if request.to in ("dit", "fpdm") and request.to != layout:
        raise ValueError(
            f"A network of the class {type(model).__name__} cannot be written as --to {request.to}; give --to {layout}."
        )
    result: Any = state_dicts.to_diffusers(model) if request.to == "diffusers" else model
    with atomic_path(request.out) as partial:
        partial.mkdir()
        if request.to in ("dit", "fpdm"):
            state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            torch.save(state, partial / "model.pt")
        else:
            result.save_pretrained(partial, max_shard_size="50GB")
        note: dict[str, Any] = {"source": _provenance(request), "to": request.to, "network": build.describe(model)}
        if (partial / "model.pt").exists():
            note["sha256"] = hashing.of_file(partial / "model.pt")
        (partial / "conversion.json").write_text(json.dumps(note, indent=2) + "\n")
    text = f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters is in {request.out}."
    if request.to == "diffusers":
        text += (
            " diffusers computes the time embedding with slightly other frequencies than DiT, so that the outputs "
            "differ by some percent; apps.diffusion.checkpoint.state_dicts.use_dit_frequencies(model) corrects the "
            "loaded model."
        )
    if request.to == "ours" and (request.checkpoint / "checkpoints").is_dir():
        text += " The noise schedule and the prediction target of the run are left out; --to pipeline keeps them."
    return text


def write_pipeline(request: Request) -> str:
    """Write a training run as a pipeline folder with the record of its training; returns a sentence that reports the
    result.

    Raises:
        ValueError: the folder holds no run, or an option is given that the run determines.
    """
    run = request.checkpoint
    if not (run / "checkpoints").is_dir():
        raise ValueError(
            f"{run} is no training run (it has no checkpoints); give the folder of a training run for --to pipeline."
        )
    refuse(request.options, run, "heads", "input_size", "condition_on_time", "weights")
    state, config = training_state.newest(run), trained_run.read_config(run)
    pipe = FixedPointPipeline.from_run(run)
    with atomic_path(request.out) as partial:
        partial.mkdir()
        pipe.save_pretrained(partial)
        done = {name: getattr(state.progress, name) for name in ("images", "steps", "seconds")}
        pretrained.write_record(partial, config, done)
    count = sum(p.numel() for p in pipe.model.parameters())
    return f"The pipeline of {type(pipe.model).__name__} with {count:,} parameters is in {request.out}."


def _provenance(request: Request) -> dict[str, Any]:
    path = request.checkpoint
    source = {"name": path.name, "weights": request.options.weights}
    return source | ({"sha256": hashing.of_file(path)} if path.is_file() else {})


if __name__ == "__main__":
    sys.exit(main())
