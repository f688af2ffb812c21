"""SHA-256 of files, texts and tensors, as hexadecimal digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.diffusion.files.json_file import read_object

if TYPE_CHECKING:
    from torch import Tensor


def of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_parts(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of texts and bytes in their order, concatenated without a separator."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
    return found.hexdigest()


def of_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys; values that JSON cannot hold are converted to text."""
    return of_parts([json.dumps(value, sort_keys=True, default=str)])


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, converted to JSON types, with the SHA-256 of its content as "digest"."""
    found = json.loads(json.dumps(record))
    return {**found, "digest": of_json(found)}


def fits_digest(record: Mapping[str, Any]) -> bool:
    """Whether the content of a record fits its digest; true for a record without a digest, of an earlier version."""
    content = {key: value for key, value in record.items() if key != "digest"}
    return record.get("digest", "") in ("", of_json(content))


def write_model_checksums(folder: Path) -> None:
    """Enter "_sha256" into the config.json of a model folder: the SHA-256 of every weight file."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["_sha256"] = {path.name: of_file(path) for path in sorted(folder.glob("diffusion_pytorch_model*"))}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_model_checksums(folder: Path) -> None:
    """Compare the weight files of a model folder with the "_sha256" in its config.json, if it has this entry.

    Raises:
        ValueError: a file has changed since it was written.
    """
    sums = read_object(folder / "config.json").get("_sha256")
    for name, expected in sums.items() if isinstance(sums, dict) else ():
        if (folder / name).is_file() and of_file(folder / name) != expected:
            raise ValueError(
                f"{folder / name} is damaged: its SHA-256 is not the one in config.json; copy, convert or save the "
                'network again, or remove the entry "_sha256" from config.json if you changed the file yourself.'
            )


def of_tensors(tensors: Mapping[str, Tensor], as_float: bool = False) -> str:
    """SHA-256 of the names, shapes, dtypes and values of tensors; it does not depend on the order of the mapping.

    Args:
        tensors: tensors by name, on any device.
        as_float: whether the values are converted to float32 first.
    """
    import torch

    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        value = value.detach().cpu()
        value = (value.float() if as_float else value).contiguous()
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
