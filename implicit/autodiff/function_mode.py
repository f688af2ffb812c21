"""A mode that receives every torch function and every `autograd.Function` that its thread calls.

PyTorch does not pass calls of `autograd.Function.apply` to a `TorchFunctionMode`. While a mode of this file is active,
`apply` is replaced by a function that calls the mode. A function made by `torch.compile`, which would be compiled again
for every mode, runs without compilation.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from implicit.torch_internals import eager


class FunctionMode(TorchFunctionMode):
    """Receives every torch function and every `autograd.Function` that its thread calls while it is active."""

    paused = False  # True while an autograd.Function runs, which counts as one call

    def __enter__(self) -> Any:
        self._eager = eager()
        self._eager.__enter__()
        _FunctionHook.add(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _FunctionHook.remove(self)
        self._eager.__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {})) if self.paused else self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of func(*args, **kwargs) under this mode."""
        raise NotImplementedError


class _Modes(threading.local):
    """The active modes of each thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[FunctionMode] = []


class _FunctionHook:
    """Routes calls of `autograd.Function.apply` through the modes of the calling thread.

    The attribute `apply` is replaced while a mode is active in any thread, and restored afterwards.
    """

    lock = threading.Lock()
    active = 0
    local = _Modes()
    original: tuple[Any, ...] = ()  # in a tuple, since a classmethod that is a class attribute would be bound

    @classmethod
    def add(cls, mode: FunctionMode) -> None:
        with cls.lock:
            if not cls.active:
                cls.original = (torch.autograd.Function.__dict__["apply"],)
                setattr(torch.autograd.Function, "apply", classmethod(_apply))  # noqa: B010
            cls.active += 1
        cls.local.stack.append(mode)

    @classmethod
    def remove(cls, mode: FunctionMode) -> None:
        cls.local.stack.remove(mode)
        with cls.lock:
            cls.active -= 1
            if not cls.active:
                setattr(torch.autograd.Function, "apply", cls.original[0])  # noqa: B010


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`autograd.Function.apply`, by way of the calling thread's modes, innermost first."""
    modes = [mode for mode in _FunctionHook.local.stack if not mode.paused]
    call: Callable[..., Any] = _FunctionHook.original[0].__get__(None, function)

    def run(*args: Any, **kwargs: Any) -> Any:
        for mode in modes:
            mode.paused = True
        try:
            return call(*args, **kwargs)
        finally:
            for mode in modes:
                mode.paused = False

    def through(mode: FunctionMode, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: mode.call(inner, args, kwargs)

    wrapped = run
    for mode in modes:  # the outermost mode is called last
        wrapped = through(mode, wrapped)
    return wrapped(*args, **kwargs)
