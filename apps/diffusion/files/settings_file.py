"""A JSON file that states how the content of a folder is made, so that nothing else is added to it later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.diffusion.files.atomic import write_text


def write_or_compare(path: Path, settings: Mapping[str, Any], remedy: str, optional: tuple[str, ...] = ()) -> None:
    """Writes the settings, or compares them with those that are in the file.

    Args:
        path: the file; its folder is made.
        settings: what JSON can hold.
        remedy: what to do where they differ, the end of the sentence.
        optional: keys that files of earlier versions lack, or have with the value null; they are added to such a file.

    Raises:
        ValueError: the file holds other settings, or cannot be read; the sentence names what differs.
    """
    now = json.loads(json.dumps(settings))
    if path.exists():
        before = read(path, remedy)
        known = {key: value for key, value in before.items() if not (key in optional and value is None)}
        filled = {**{key: now[key] for key in optional if key in now}, **known}
        names = [key for key in {**filled, **now} if filled.get(key) != now.get(key)]
        if names:
            changed = "; ".join(f"{key} was {filled.get(key)}, now {now.get(key)}" for key in names)
            raise ValueError(f"{path.parent} was made with other settings than these ({changed}); {remedy}")
        if filled == before:
            return
    write_text(path, json.dumps(now, indent=2) + "\n")


def read(path: Path, remedy: str) -> dict[str, Any]:
    """The settings in a file.

    Raises:
        ValueError: it holds no JSON object.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: it holds no JSON object; {remedy}") from None
