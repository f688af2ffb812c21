"""Networks and tensors from files: state dicts of the published layouts, model folders, training runs.

Nothing in a checkpoint is executed. From Python, a published state dict is loaded by

    tensors = read_tensors(Path("DiT-XL-2-256x256.pt"))
    model = state_dicts.network(tensors)
"""

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apps.diffusion.checkpoint import state_dicts, training_state
from apps.diffusion.config.checks import at_least, flag
from apps.diffusion.files.hashing import check_model_checksums, of_file
from apps.diffusion.files.json_file import read_object
from apps.diffusion.files.names import first_names, reason
from apps.diffusion.models import build
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM

Weights = Literal["ema", "model"]
_ALLOWED = ("torch._utils.", "collections.OrderedDict")  # objects of every state dict, which torch.load takes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile add to names


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Settings that a state dict does not determine; the configuration in a folder determines them."""

    weights: Weights | None = None
    """Weights to read from a checkpoint with two sets: ema, the averaged weights, or model. Default: ema."""
    heads: int | None = None
    """Number of attention heads, which the shapes of the tensors do not determine; default: the number in the folder's
    config.json, or that of the published network with the same hidden size (384: 6, 768: 12, 1024: 16, 1152: 16).
    """
    input_size: tuple[int, int] | None = None
    """Height and width of the latent; default: a square."""
    condition_on_time: bool = False
    """Whether the explicit blocks of this FPDM are conditioned on the time as well as the class."""

    def __post_init__(self) -> None:
        at_least(self, 1, "heads")


def read_model_folder(path: Path) -> DiT | FPDM:
    """The network in a model folder that `save_pretrained`, the convert command or diffusers wrote.

    Raises:
        ValueError: the network cannot be read, or is no DiT or FPDM.
    """
    return _read_folder(path, ReadOptions())


def read_network(path: Path, options: ReadOptions = ReadOptions()) -> DiT | FPDM:
    """The network in a checkpoint file, a model folder or a training run.

    Raises:
        ValueError: the network cannot be read, or is no DiT or FPDM; the message lists unknown and missing tensors.
    """
    if path.is_dir():
        return _read_folder(path, options)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a checkpoint file, or the folder of a model or a run.")
    return _assemble(read_tensors(path, options.weights), options, {})


def _read_folder(path: Path, options: ReadOptions) -> DiT | FPDM:
    if (path / "model.pt").is_file() and (path / "conversion.json").is_file():
        refuse(options, path, "heads", "input_size", "condition_on_time", "weights")
        try:
            note = read_object(path / "conversion.json")
            description, expected = note["network"], note.get("sha256")
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path / 'conversion.json'} is damaged ({error!r}); convert again.") from None
        if expected is not None and of_file(path / "model.pt") != expected:
            raise ValueError(
                f"{path / 'model.pt'} is damaged: its SHA-256 is not that in conversion.json; convert again."
            )
        return _rebuilt(description, read_tensors(path / "model.pt"), str(path))
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        refuse(options, path, "heads", "input_size", "condition_on_time")
        state = training_state.load(path) if (path / "state.json").is_file() else training_state.newest(path)
        chosen = dict(state.model if options.weights == "model" else state.ema)
        check_finite(chosen, path)
        return _rebuilt(state.network, chosen, str(path))
    file = path / "config.json"
    if not file.is_file() and (path / "transformer" / "config.json").is_file():
        return _read_folder(path / "transformer", options)
    if not file.is_file() and (path / "model" / "config.json").is_file():
        return _read_folder(path / "model", options)
    try:
        config = read_object(file)
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} holds no model (a config.json with the model's class) and no training run; give the folder of a "
            "model or of a run, or a checkpoint file."
        ) from None
    refuse(options, path, "weights")
    tensors = _folder_tensors(path)
    if name in ("DiT", "FPDM"):
        refuse(options, path, "heads", "input_size", "condition_on_time")
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        model = _rebuilt({"class": name, "config": arguments}, tensors, str(path))
        check_model_checksums(path)  # last, since a tensor that does not fit is a better message
        return model
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
    for key in ("num_attention_heads", "sample_size"):
        if config.get(key) is not None and type(config[key]) is not int:
            raise ValueError(f"{file} is damaged: {key} is {config[key]!r}, which is no whole number; fetch it again.")
    return _assemble(tensors, options, config)


def refuse(options: ReadOptions, path: Path, *names: str) -> None:
    """Raises ValueError if one of the options `names` is given although the folder determines it."""
    given = [flag(options, name) for name in names if getattr(options, name)]
    if given:
        raise ValueError(f"{path} determines {', '.join(given)}; leave it out.")


def _assemble(tensors: dict[str, Tensor], options: ReadOptions, config: dict[str, Any]) -> DiT | FPDM:
    """The network with these tensors; `config` is diffusers' configuration, or empty for a checkpoint file."""
    heads, size = options.heads or config.get("num_attention_heads"), options.input_size
    layout = state_dicts.layout_of(tensors)
    if options.condition_on_time and layout != "fpdm":
        raise ValueError("--condition-on-time is for an FPDM, and this is a DiT; leave it out.")
    if layout == "diffusers":
        if size is None and config.get("sample_size"):
            size = (config["sample_size"], config["sample_size"])
        if size is None:
            raise ValueError(
                "A file in diffusers' layout does not hold the size of the latent; give the folder with its "
                "config.json, or --input-size, such as --input-size 32 32."
            )
        tensors = state_dicts.from_diffusers(tensors, size)
    return state_dicts.network(tensors, heads=heads, input_size=size, condition_on_time=options.condition_on_time)


def _rebuilt(description: dict[str, Any], tensors: dict[str, Tensor], where: str) -> DiT | FPDM:
    """The network with this description (`models.build.describe`) and these tensors."""
    try:
        with torch.device("meta"):
            model = build.rebuild(description)
    except Exception as error:  # the constructors compute with values of any type, and raise errors of many types
        raise ValueError(
            f"{where} does not describe a network of this version ({reason(error)}); it cannot be read."
        ) from None
    build.load_weights(model, tensors, where, assign=True)
    return model


def read_tensors(path: Path, which: str | None = None) -> dict[str, Tensor]:
    """The tensors of a network in a file, by name; nothing in the file is executed.

    Args:
        path: a .safetensors file, or a file of torch.save with another suffix: a state dict, or a dict of state dicts.
        which: name of the state dict, "ema" or "model"; None: "ema", or the first state dict if there is no "ema".

    Raises:
        ValueError: the file is of another kind, is damaged, or holds objects that would have to be executed.
    """
    found = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickle(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} instead of tensors by name; save a state dict.")
    parts = {
        name: part for name, part in found.items() if isinstance(part, dict) and name in ("ema", "model", "state_dict")
    }
    if parts:
        wanted = which or ("ema" if "ema" in parts else next(iter(parts)))
        if wanted not in parts:
            raise ValueError(f"{path} holds no weights called {wanted}; give one of {', '.join(parts)} by --weights.")
        found = parts[wanted]
    elif which is not None:
        raise ValueError(f"{path} holds one set of weights only; leave out --weights.")
    others = [n for n, value in found.items() if not (isinstance(n, str) and isinstance(value, torch.Tensor))]
    if others or not found:
        raise ValueError(
            f"{path} is no state dict: {', '.join(map(str, others)) or 'it is empty'}; give tensors by name."
        )
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    _check_kinds(found, path)
    check_finite(found, path)
    return found


def _check_kinds(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError unless all tensors are dense, hold values, and have a dtype in which networks compute."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.dtype not in _DTYPES:
            kind = "meta tensor" if value.is_meta else f"{value.layout} tensor of {value.dtype}".replace("torch.", "")
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ValueError(
                f"{path} holds {name} as a {kind}; weights are dense tensors of {allowed}: convert them to one of "
                "these and save them again."
            )


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError if a tensor holds NaN or infinity."""
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds NaN or infinity in {first_names(bad, 3)}; fetch or train it again.")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it may be truncated: fetch it again.") from None


def _load_pickle(path: Path) -> Any:
    try:
        # training scripts store their arguments beside the weights; unpickling a Namespace executes no code
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = _refused_object(str(error), path)
        raise ValueError(
            f"{path} is damaged, or holds objects other than tensors, which are never executed ({refused}). Save the "
            "tensors only, with safetensors."
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises errors of many classes for damaged files
        found = f"{type(error).__name__}: {reason(error)}"
        raise ValueError(f"{path} is no checkpoint that can be read ({found}); fetch it again.") from None


def _refused_object(message: str, path: Path) -> str:
    """The object that torch.load refused, such as posix.system, or else the reason in torch.load's message."""
    found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:class|global)\w* ([\w.]+)", message)
    named = [found[1] or found[2]] if found else [name for name in _objects(path) if not name.startswith(_ALLOWED)]
    if named:
        return f"the object {named[0]}"
    # torch.load's message begins with the advice to execute the file
    failed = re.search(r"WeightsUnpickler error:\s*(.+)", message)
    return f"unpickling fails: {failed[1][:300]}" if failed else "it cannot be unpickled"


def _objects(path: Path) -> list[str]:
    """The classes and functions that a pickle names, such as posix.system; nothing is executed."""
    names, texts = [], []
    with path.open("rb") as file, suppress(ValueError):  # no pickle, or damaged
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif operation.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif isinstance(argument, str):
                texts.append(argument)
    return names


def _folder_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in the weight files of a diffusers model."""
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors")) or sorted(
        path.glob("diffusion_pytorch_model*.bin")
    )
    if len(files) > 1 and not any("-of-" in file.name for file in files):
        # several files that are not parts of one: variants such as fp16
        files = [file for file in files if file.stem == "diffusion_pytorch_model"] or files[:1]
    if not files:
        raise ValueError(f"{path} has a config.json but no weights (diffusion_pytorch_model.safetensors).")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    return tensors
