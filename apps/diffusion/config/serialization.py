"""Trees of frozen dataclasses as plain data (what JSON can hold), and back, with every type checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal


def to_plain(value: Any) -> Any:
    """A tree of dataclasses as dicts, strings and numbers; a dataclass becomes a dict that names its type."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: Any, plain: Any, where: str) -> Any:
    """The value of type `kind` that `plain` (JSON) stands for; `where` is its place in the tree, for
    messages.
    """
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    classes: dict[str, Any] = {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}
    if classes:
        named = plain.get("type") if isinstance(plain, dict) else None
        if named not in classes:
            raise ValueError(f"{where} should be one of {', '.join(classes)}, but its type is {named!r}.")
        hints = typing.get_type_hints(classes[named])
        unknown = sorted(set(plain) - set(hints) - {"type"})
        if unknown:
            raise ValueError(f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(hints)}.")
        return classes[named](
            **{name: from_plain(hints[name], plain[name], f"{where}.{name}") for name in hints if name in plain}
        )
    for option in options:
        kinds = typing.get_args(option)
        if typing.get_origin(option) is not tuple or not isinstance(plain, list):
            continue
        # tuple[T, ...] takes any length, tuple[T1, T2] two elements
        each = kinds[:1] * len(plain) if kinds[1:] == (...,) else kinds
        if len(each) == len(plain):
            return tuple(from_plain(k, p, f"{where}.{i}") for i, (k, p) in enumerate(zip(each, plain, strict=True)))
    if Path in options and isinstance(plain, str):
        return Path(plain)
    if float in options and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    allowed = [a for o in options for a in (typing.get_args(o) if typing.get_origin(o) is Literal else (o,))]
    if not any(plain == a if not isinstance(a, type) else type(plain) is a for a in allowed):
        raise ValueError(f"{where} should be one of {[getattr(a, '__name__', a) for a in allowed]}, got {plain!r}.")
    return plain
