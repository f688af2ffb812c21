"""Convert a trained network: `python -m apps.diffusion.convert CHECKPOINT --out DIR [--to LAYOUT]`.

CHECKPOINT is a file (.pt, .pth, .bin or .safetensors) in the layout of the DiT or the FPDM repository or of
diffusers, or a folder: a diffusers model, a model that this command wrote, or a training run. DIR becomes

    ours        config.json, diffusion_pytorch_model.safetensors      DiT.from_pretrained(DIR) or FPDM...
    diffusers   the same two files                                    DiTTransformer2DModel.from_pretrained(DIR)
    dit, fpdm   model.pt, a plain state dict                          torch.load(DIR/model.pt)
    pipeline    a training run's network, scheduler and options       FixedPointPipeline.from_pretrained(DIR)

and conversion.json, which says what was converted. Nothing in a checkpoint is executed. DIR is written whole
or not at all, and never over something else.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from apps.diffusion.models.dit import DiT
    from apps.diffusion.models.fpdm import FPDM

_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True, kw_only=True)
class Request:
    """Convert a trained DiT or FPDM between the published layouts, diffusers and ours."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """File, or folder of a model or a training run."""
    out: Path
    """Folder to write."""
    to: Literal["ours", "dit", "fpdm", "diffusers", "pipeline"] = "ours"
    """Layout to write."""
    weights: Literal["ema", "model"] | None = None
    """Which weights, where the checkpoint holds both; ema, the averaged ones, by default."""
    heads: int | None = None
    """Attention heads, which no shape shows; by default those of the published size with the same hidden size
    (384: 6, 768: 12, 1024: 16, 1152: 16), or what the folder's config.json says.
    """
    input_size: tuple[int, int] | None = None
    """Height and width of the latent, where it is not a square."""
    condition_on_time: bool = False
    """The explicit blocks of this FPDM were trained to see the time as well as the class."""

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"--heads must be at least 1, got {self.heads}.")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 if the disk fails, 2 for bad input."""
    try:
        request = tyro.cli(Request, args=argv, prog="python -m apps.diffusion.convert")
        check_out(request.out)
        if request.to == "pipeline":
            print(write_pipeline(request))
            return 0
        model = read(request)
        print(write(model, request))
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: {error}; nothing was written.", file=sys.stderr)
        return 1
    return 0


def check_out(out: Path) -> None:
    """Raises ValueError where something stands in the way."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists, and nothing is overwritten; give another folder with --out.")


def read(request: Request) -> DiT | FPDM:
    """The network in the checkpoint.

    Raises:
        ValueError: it cannot be read, or is no DiT or FPDM; unknown and missing tensors are listed.
    """
    path = request.checkpoint
    if path.is_dir():
        return _read_folder(path, request)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a checkpoint file, or the folder of a model or a run.")
    return _assemble(read_tensors(path, request.weights), request, {})


def _read_folder(path: Path, request: Request) -> DiT | FPDM:
    from apps.diffusion.checkpoint import training_state as checkpoint

    if (path / "model.pt").is_file() and (path / "conversion.json").is_file():
        _refuse(request, path, "heads", "input_size", "condition_on_time", "weights")
        try:
            description = json.loads((path / "conversion.json").read_text())["network"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path / 'conversion.json'} is damaged ({error!r}); convert again.") from None
        return _rebuilt(description, read_tensors(path / "model.pt"), str(path))
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        _refuse(request, path, "heads", "input_size", "condition_on_time")
        state = checkpoint.load(path) if (path / "state.json").is_file() else checkpoint.newest(path)
        return _rebuilt(state.network, dict(state.model if request.weights == "model" else state.ema), str(path))
    file = path / "config.json"
    if not file.is_file() and (path / "transformer" / "config.json").is_file():
        return _read_folder(path / "transformer", request)
    if not file.is_file() and (path / "model" / "config.json").is_file():
        return _read_folder(path / "model", request)
    try:
        config = json.loads(file.read_text())
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} holds no model (a config.json with the model's class) and no training run; give a folder that "
            "does, or a checkpoint file."
        ) from None
    _refuse(request, path, "weights")
    tensors = _folder_tensors(path)
    if name in ("DiT", "FPDM"):
        _refuse(request, path, "heads", "input_size", "condition_on_time")
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        return _rebuilt({"class": name, "config": arguments}, tensors, str(path))
    if name != "DiTTransformer2DModel":
        raise ValueError(f"{path} holds a {name}; only DiTTransformer2DModel, DiT and FPDM can be converted.")
    for key, only in (
        ("norm_type", "ada_norm_zero"),
        ("activation_fn", "gelu-approximate"),
        ("norm_elementwise_affine", False),
        ("attention_bias", True),
    ):
        if config.get(key, only) != only:
            raise ValueError(f"{path} is not a DiT, because its {key} is {config[key]!r} instead of {only!r}.")
    return _assemble(tensors, request, config)


def _refuse(request: Request, path: Path, *names: str) -> None:
    """Raises ValueError where an option was given that this folder itself decides."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(request, name)]
    if given:
        raise ValueError(f"{path} says itself what {', '.join(given)} would; leave it out.")


def _assemble(tensors: dict[str, Tensor], request: Request, config: dict[str, Any]) -> DiT | FPDM:
    """The network with these tensors; `config` is diffusers' where there is one."""
    from apps.diffusion.checkpoint import state_dicts as layouts

    heads, size = request.heads or config.get("num_attention_heads"), request.input_size
    layout = layouts.layout_of(tensors)
    if request.condition_on_time and layout != "fpdm":
        raise ValueError("--condition-on-time is for an FPDM, and this is a DiT; leave it out.")
    if layout == "diffusers":
        if size is None and config.get("sample_size"):
            size = (config["sample_size"], config["sample_size"])
        if size is None:
            raise ValueError(
                "A file in diffusers' layout does not say how large the latent is; give the folder with its "
                "config.json, or say it with --input-size, such as --input-size 32 32."
            )
        tensors = layouts.from_diffusers(tensors, size)
    return layouts.network(tensors, heads=heads, input_size=size, condition_on_time=request.condition_on_time)


def _rebuilt(description: dict[str, Any], tensors: dict[str, Tensor], where: str) -> DiT | FPDM:
    """A network of ours by its description."""
    import torch

    from apps.diffusion.checkpoint import state_dicts as layouts
    from apps.diffusion.models import build

    try:
        with torch.device("meta"):
            model = build.rebuild(description)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} does not describe a network of this version ({error}); it cannot be read.") from None
    layouts.check_names(tensors, model.state_dict())
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights in {where} do not fit its description: {error}.") from None
    return model


def read_tensors(path: Path, which: str | None = None) -> dict[str, Tensor]:
    """The tensors of a network in a file, by name; nothing in the file is executed.

    Args:
        path: .safetensors, or anything else for what torch.save wrote: a state dict, or a dict of such.
        which: "ema" or "model" where there are several; None prefers the averaged weights.

    Raises:
        ValueError: not such a file, damaged, or it holds objects that would have to be executed.
    """
    import torch

    found = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} instead of tensors by name; save a state dict.")
    parts = {
        name: part for name, part in found.items() if isinstance(part, dict) and name in ("ema", "model", "state_dict")
    }
    if parts:
        wanted = which or ("ema" if "ema" in parts else next(iter(parts)))
        if wanted not in parts:
            raise ValueError(f"{path} holds no weights called {wanted}, but {', '.join(parts)}; choose with --weights.")
        found = parts[wanted]
    elif which is not None:
        raise ValueError(f"{path} holds one set of weights only; leave out --weights.")
    foreign = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if foreign or not found:
        raise ValueError(
            f"{path} is no state dict: {', '.join(map(str, foreign)) or 'it is empty'}; give tensors by name."
        )
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it may be truncated: fetch it again.") from None


def _load_pickle(path: Path) -> Any:
    import argparse
    import pickle
    import zipfile

    import torch

    try:
        # training scripts store their arguments beside the weights: a Namespace holds values and runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[-1 if "Unsupported" in str(error) else 0]
        raise ValueError(
            f"{path} is damaged, or holds objects that would have to be executed, which is refused "
            f"({reason.strip()[:300]}). Save its tensors alone, with safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({str(error)[:300]}); it may be truncated: fetch it again.") from None


def _folder_tensors(path: Path) -> dict[str, Tensor]:
    """Of the one or several weight files of a diffusers model."""
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors")) or sorted(
        path.glob("diffusion_pytorch_model*.bin")
    )
    if len(files) > 1 and not any("-of-" in file.name for file in files):
        files = [file for file in files if file.stem == "diffusion_pytorch_model"] or files[:1]  # others: fp16, ...
    if not files:
        raise ValueError(f"{path} has a config.json but no weights (diffusion_pytorch_model.safetensors).")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors


def write(model: DiT | FPDM, request: Request) -> str:
    """Write the folder; returns what there is to say about it.

    Raises:
        ValueError: a network that the layout has no place for, or something stands in the way.
    """
    import torch

    from apps.diffusion.checkpoint import state_dicts as layouts
    from apps.diffusion.files.atomic import atomic_path
    from apps.diffusion.models import build

    layout = {"DiT": "dit", "FPDM": "fpdm"}[type(model).__name__]
    if request.to in ("dit", "fpdm") and request.to != layout:
        raise ValueError(
            f"This is a {type(model).__name__}, which cannot be written as --to {request.to}; take {layout}."
        )
    result: Any = layouts.to_diffusers(model) if request.to == "diffusers" else model
    with atomic_path(request.out) as partial:
        partial.mkdir()
        if request.to in ("dit", "fpdm"):
            state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
            torch.save(state, partial / "model.pt")
        else:
            result.save_pretrained(partial, max_shard_size="50GB")
        note = {"source": _provenance(request), "to": request.to, "network": build.describe(model)}
        (partial / "conversion.json").write_text(json.dumps(note, indent=2) + "\n")
    said = f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters is in {request.out}."
    if request.to == "diffusers":
        said += (
            " diffusers computes the time embedding with slightly other frequencies than DiT, so its outputs differ by "
            "some percent until apps.diffusion.checkpoint.state_dicts.use_dit_frequencies(model) is called on the "
            "loaded model."
        )
    return said


def write_pipeline(request: Request) -> str:
    """Write a training run as a pipeline folder with the record of its training; returns what there is to say about it.

    Raises:
        ValueError: no run, or options that a run decides itself.
    """
    from apps.diffusion.checkpoint import pretrained, trained_run, training_state
    from apps.diffusion.files.atomic import atomic_path
    from apps.diffusion.pipeline import FixedPointPipeline

    run = request.checkpoint
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} is no training run (it has no checkpoints); --to pipeline takes the folder of one.")
    _refuse(request, run, "heads", "input_size", "condition_on_time", "weights")
    state, config = training_state.newest(run), trained_run.read_config(run)
    pipe = FixedPointPipeline.from_run(run)
    with atomic_path(request.out) as partial:
        pipe.save_pretrained(partial)
        done = {name: getattr(state.progress, name) for name in ("images", "steps", "seconds")}
        pretrained.write_record(partial, config, done)
    count = sum(p.numel() for p in pipe.model.parameters())
    return f"The pipeline of {type(pipe.model).__name__} with {count:,} parameters is in {request.out}."


def _provenance(request: Request) -> dict[str, Any]:
    path = request.checkpoint
    source: dict[str, Any] = {"name": path.name, "weights": request.weights}
    if path.is_file():
        with path.open("rb") as file:
            source["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return source


if __name__ == "__main__":
    sys.exit(main())
