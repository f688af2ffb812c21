"""A JSON file with the settings of all other files in a folder, so that files of other settings are not added later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.diffusion.files.atomic import write_text
from apps.diffusion.files.json_file import read_object


def write_or_compare(path: Path, settings: Mapping[str, Any], remedy: str, optional: tuple[str, ...] = ()) -> None:
    """Writes the settings if the file does not exist, else compares them with the settings in the file.

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
    write_text(path, json.dumps(now, indent=2) + "\n")
