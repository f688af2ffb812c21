"""Trees of frozen dataclasses as JSON, and back, with every type checked.

A dataclass becomes a dict of its fields, with the name of its class under "type". `upgraded` translates configurations
of an earlier format, which had other names of classes and fields, one number of iterations, and `IFT.rtol`.
"""

import dataclasses
import inspect
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import implicit


def to_plain(value: Any, where: str = "config") -> Any:
    """A tree of dataclasses as dicts, lists, strings and numbers.

    Raises:
        TypeError: a value that JSON cannot hold, such as a function; the message names its position in the tree.
    """
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_plain(each, where) for each in value]
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{where} = {value!r} cannot be saved; leave it out of a configuration.")
    return value


def from_plain(kind: Any, plain: Any, where: str) -> Any:
    """The value of type `kind` that `plain` (from JSON) describes.

    Args:
        kind: a frozen dataclass, a scalar type, `Path`, `Literal`, `tuple[X, ...]`, or a union of these types.
        plain: a value that `json.loads` returned.
        where: the position in the tree, for messages.

    Raises:
        ValueError: an unknown class or field, or a value of another type.
    """
    options = _options(kind)
    classes = {o.__name__: o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)}
    if classes and (isinstance(plain, dict) or type(None) not in options):
        return _dataclass(classes, plain, where)
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


def _options(kind: Any) -> list[Any]:
    """The members of a union; for an abstract class of `implicit`, its public subclasses."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(kind) for option in _options(member)]
    base = typing.get_origin(kind) or kind
    if isinstance(base, type) and inspect.isabstract(base):
        return [c for c in vars(implicit).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    return [kind]


def _dataclass(classes: dict[str, Any], plain: Any, where: str) -> Any:
    """The dataclass that `plain["type"]` names, one of `classes`."""
    named = plain.get("type") if isinstance(plain, dict) else None
    if named not in classes:
        raise ValueError(f"{where} should be one of {', '.join(classes)}, but its type is {named!r}.")
    hints = typing.get_type_hints(classes[named], include_extras=True)
    names = [f.name for f in dataclasses.fields(classes[named]) if f.init]
    unknown = sorted(set(plain) - set(names) - {"type"})
    if unknown:
        raise ValueError(f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(names)}.")
    return classes[named](
        **{name: from_plain(hints[name], plain[name], f"{where}.{name}") for name in names if name in plain}
    )


_RENAMED = {
    "Model": "ModelConfig",
    "Schedule": "NoiseSchedule",
    "Data": "DataConfig",
    "Optimisation": "OptimizerConfig",
    "EMA": "EMAConfig",
    "Sampling": "SamplingOptions",
}


def upgraded(plain: Any) -> Any:
    """A configuration of the earlier format in the current format; any other value unchanged."""
    if not isinstance(plain, dict):
        return plain
    plain = {key.replace("optimisation", "optimizer"): upgraded(value) for key, value in plain.items()}
    name = plain.get("type")
    if isinstance(name, str):
        plain["type"] = _RENAMED.get(name, name)
    if name == "IFT" and "rtol" in plain:
        rtol = plain.pop("rtol")
        plain["stop"] = None if rtol is None else {"type": "Stop", "rtol": rtol, "atol": 0.0, "max_evals": 200}
    sampling = plain.get("sampling")
    if name == "Config" and isinstance(sampling, dict) and "images" in sampling:
        plain["num_samples"] = sampling.pop("images")
        sampling["iterations"] = [sampling.get("iterations", 10)]
        sampling["reuse"] = "on" if sampling.get("reuse") else "off"
    return plain
