"""JSON files: an object is read or written, or a file of settings is compared with the present settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.diffusion.files.atomic import write_text


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is no UTF-8 text, holds no JSON, nests it too deeply, or holds another value than an
            object; the message is the reason without the path.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ValueError("it is no JSON that can be read: its nesting is too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} instead of a JSON object")
    return found


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_or_compare(path: Path, settings: Mapping[str, Any], remedy: str, optional: tuple[str, ...] = ()) -> None:
    """Writes the settings of all other files in a folder if the file does not exist, else compares them with those in
    the file, so that files of other settings are not added later.

    Args:
        path: the file; its folder is made if necessary.
        settings: the settings, of types that JSON can hold.
        remedy: end of the error message, which says what to do if the settings differ.
        optional: keys that are missing or null in files of earlier versions; they are added to such a file.

    Raises:
        ValueError: the file holds other settings (the message names the differences), or cannot be read.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        try:
            before = read_object(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; {remedy}") from None
        known = {key: value for key, value in before.items() if not (key in optional and value is None)}
        filled = {**{key: now[key] for key in optional if key in now}, **known}
        names = [key for key in {**filled, **now} if filled.get(key) != now.get(key)]
        if names:
            changed = "; ".join(f"{key} was {filled.get(key)}, now {now.get(key)}" for key in names)
            raise ValueError(f"{path.parent} was made with other settings than these ({changed}); {remedy}")
        if filled == before:
            return
    write_object(path, now)
