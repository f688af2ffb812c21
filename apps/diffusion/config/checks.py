"""Checks of fields and arguments; only the standard library is imported, so that --help of a command is quick."""

import math
import typing
from typing import Any


def at_least(where: object, least: float, *names: str) -> None:
    """Raises ValueError if one of the fields `names` of `where` is below `least`; a field may be None."""
    for name in names:
        value = getattr(where, name)
        if value is not None and not value >= least:
            raise ValueError(f"{flag(where, name)} must be at least {least}, got {value}.")


def check_word(name: str, value: object, kind: Any) -> None:
    """Raises ValueError if `value`, the argument `name`, is not a word of the `Literal` type `kind`."""
    if value not in typing.get_args(kind):
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(typing.get_args(kind))}.")


def positive(where: object, *names: str) -> None:
    """Raises ValueError unless the fields `names` of `where` are positive and finite."""
    for name in names:
        if not 0 < getattr(where, name) < math.inf:
            raise ValueError(f"{flag(where, name)} must be positive and finite, got {getattr(where, name)}.")


def within(where: object, low: float, high: float, *names: str) -> None:
    """Raises ValueError unless low <= value < high for the fields `names` of `where`."""
    for name in names:
        value = getattr(where, name)
        if not low <= value < high:
            raise ValueError(f"{flag(where, name)} must lie in [{low}, {high}), got {value}.")


def flag(where: object, name: str) -> str:
    """The flag of a field, in the section that the attribute SECTION of the field's class names, if it has one."""
    section = getattr(where, "SECTION", "")
    return "--" + (section + "." if section else "") + name.replace("_", "-")
