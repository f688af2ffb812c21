"""Run-time checks of declared shapes and types (jaxtyping, beartype).

A function is checked at its first call with each combination of types, dtypes and shapes of its arguments: a solver
calls its step hundreds of times with the same ones, and a check of every call takes twice as long as the tests
themselves.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jaxtyping
import torch
from torch import Tensor

TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
_on = False


def install(package: str) -> None:
    """Make the functions of a package ready for checks; call it before the package is imported."""
    # jaxtyping's import hook decorates every function and class with `jaxtyping.jaxtyped`
    jaxtyping.__dict__["jaxtyped"] = functools.partial(checked_once_a_kind, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(package, TYPECHECKER)


def turn_on(on: bool) -> None:
    """Check the calls from here on, or do not."""
    global _on
    _on = on


def checked_once_a_kind(jaxtyped: Callable, target: Any = None, **options: Any) -> Any:
    """`jaxtyped(target, **options)` at the first call with each kind of arguments, `target` at later ones."""
    check = functools.partial(checked_once_a_kind, jaxtyped, **options)
    if target is None:
        return check
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = check(target.__init__)
        return target
    if isinstance(target, property):
        return property(*(part and check(part) for part in (target.fget, target.fset, target.fdel)), target.__doc__)
    if isinstance(target, classmethod | staticmethod):
        return type(target)(check(target.__func__))

    checked = functools.cache(lambda: jaxtyped(target, **options))  # a typechecker takes milliseconds a function
    seen: set[Hashable] = set()

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _on or torch.compiler.is_compiling():
            return target(*args, **kwargs)
        try:
            with torch._C.DisableTorchFunction():  # a mode of the caller does not see these reads
                kind = (*map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
            new = kind not in seen
            seen.add(kind)
        except (TypeError, RuntimeError):  # symbolic sizes have no hash, lazy parameters no shape
            new = True
        return checked()(*args, **kwargs) if new else target(*args, **kwargs)

    return call


def _kind(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return type(argument), argument.dtype, argument.shape
    return type(argument)
