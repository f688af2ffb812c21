"""Types of arguments: values are compared with the annotations of a frozen dataclass or a function.

A whole number is not a bool; where a number is allowed, an integer is one. Ranges are tested by the owner.
"""

import functools
import numbers
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

_WORDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "an int"),
    float: (numbers.Real, "a float"),
    bool: (bool, "True or False"),
    type(None): (type(None), "None"),
}


def check_fields(settings: Any) -> None:
    """Check the fields of a dataclass against their annotations.

    Raises:
        TypeError: naming the class, the field and what may be passed.
    """
    check_arguments(type(settings), vars(settings), f"{type(settings).__name__}.")


def check_arguments(owner: Callable[..., Any], given: dict[str, Any], prefix: str = "") -> None:
    """Check values `given` by name against the annotations of `owner`, a function or a class.

    Raises:
        TypeError: naming the argument and what may be passed.
    """
    if torch.compiler.is_compiling():
        return
    kinds = _annotations(owner)
    for name, value in given.items():
        if not _fits(value, kinds[name]):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"a {type(value).__name__}"
            raise TypeError(f"{prefix}{name} must be {_described(kinds[name])}, got {shown}.")


@functools.cache
def _annotations(owner: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(owner)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated `kind`; words of a Literal are tested by the owner."""
    if kind in _WORDS:
        return isinstance(value, _WORDS[kind][0]) and (kind is bool or not isinstance(value, bool))
    if kind is Any:
        return True
    if isinstance(kind, type):
        return isinstance(value, kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, tuple({type(part) for part in parts}))
    if origin is Callable:
        return callable(value)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, parts[0]) for part in value)
    return not isinstance(origin, type) or (isinstance(value, origin) and not isinstance(value, str))


def _described(kind: Any) -> str:
    """What may be passed for `kind`, in words."""
    if kind in _WORDS:
        return _WORDS[kind][1]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is Callable:
        return "a function"
    if origin is tuple:
        return f"a tuple, each part {_described(parts[0])}"
    return f"an instance of {(origin or kind).__name__}"
