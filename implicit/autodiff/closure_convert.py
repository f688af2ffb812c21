"""Closure conversion: which tensors does a function close over, and the function with those tensors as arguments.

Setting: phi(x) uses tensors theta that are not among its arguments. `ClosureTracer` records theta while phi runs, and
`closure_convert` gives phi(x, *theta), which may be evaluated at other values of theta.

A tensor is closed over if phi uses it and did not make it: every result of a torch function, and of an
`autograd.Function`, is recorded as made by phi. No sequence number of autograd takes part, since those count per
thread. `has_untraced_leaf` walks the graph that phi has built and finds what the record lacks.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from implicit.pytree import map_tensors


class _ClosureMode(TorchFunctionMode):
    """Receives every torch function and every `autograd.Function` that its thread calls while it is active."""

    paused = False  # within an autograd.Function, which counts as one call

    def __enter__(self) -> Any:
        _FunctionHook.add(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _FunctionHook.remove(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {})) if self.paused else self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """func(*args, **kwargs), as this mode has it."""
        raise NotImplementedError


class _FunctionHook:
    """Leads calls of `autograd.Function.apply` through the modes of the calling thread: torch passes them to no mode.

    The class attribute is exchanged while a mode is active in some thread, and restored afterwards.
    """

    lock = threading.Lock()
    active = 0
    modes = threading.local()
    original: tuple[Any, ...] = ()  # in a tuple, since a classmethod that is a class attribute would be bound

    @classmethod
    def stack(cls) -> list[_ClosureMode]:
        if not hasattr(cls.modes, "stack"):
            cls.modes.stack = []
        return cls.modes.stack

    @classmethod
    def add(cls, mode: _ClosureMode) -> None:
        with cls.lock:
            if not cls.active:
                cls.original = (torch.autograd.Function.__dict__["apply"],)
                setattr(torch.autograd.Function, "apply", classmethod(_apply))  # noqa: B010
            cls.active += 1
        cls.stack().append(mode)

    @classmethod
    def remove(cls, mode: _ClosureMode) -> None:
        cls.stack().remove(mode)
        with cls.lock:
            cls.active -= 1
            if not cls.active:
                setattr(torch.autograd.Function, "apply", cls.original[0])  # noqa: B010


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`autograd.Function.apply`, by way of the calling thread's modes, innermost first."""
    modes = [mode for mode in _FunctionHook.stack() if not mode.paused]
    call: Callable[..., Any] = _FunctionHook.original[0].__get__(None, function)

    def run(*args: Any, **kwargs: Any) -> Any:
        for mode in modes:
            mode.paused = True
        try:
            return call(*args, **kwargs)
        finally:
            for mode in modes:
                mode.paused = False

    def through(mode: _ClosureMode, inner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: mode.call(inner, args, kwargs)

    wrapped = run
    for mode in modes:  # the outermost mode is called last
        wrapped = through(mode, wrapped)
    return wrapped(*args, **kwargs)


class ClosureTracer(_ClosureMode):
    """Records the tensors that a function uses, did not make, and that have a derivative.

    Derivatives are those of autograd (`requires_grad`), of `torch.func` transforms and of forward mode.

    Args:
        arguments: tensors that are arguments of the function, and therefore not closed over.
    """

    def __init__(self, arguments: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {id(t): weakref.ref(t) for t in arguments}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {id(t): t for t in tensors((args, kwargs))}
        for t in inputs.values():
            if _differentiable(t) and not self.made(t):
                self._found[id(t)] = t
        out = func(*args, **kwargs)
        for t in tensors(out):
            if id(t) not in inputs:  # an operation may return its input
                self._made[id(t)] = weakref.ref(t)
        return out

    def made(self, t: Tensor) -> bool:
        """Whether t is an argument of the function or was made by it."""
        made = self._made.get(id(t))
        return made is not None and made() is t

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the function closes over, in order of first use."""
        return tuple(self._found.values())


def _differentiable(t: Tensor) -> bool:
    """Whether a derivative with respect to t is possible in a transform or mode that is active."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore[reportAttributeAccessIssue]: no stub
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


class _Substitution(_ClosureMode):
    """Uses `stands` wherever a function would use `originals`."""

    def __init__(self, originals: Iterable[Tensor], stands: Iterable[Tensor]) -> None:
        super().__init__()
        self._pairs = {id(a): (a, b) for a, b in zip(originals, stands, strict=True)}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*map_tensors(self._stand, args), **map_tensors(self._stand, kwargs))

    def _stand(self, t: Tensor) -> Tensor:
        return self._pairs[id(t)][1] if id(t) in self._pairs else t


def closure_convert(phi: Callable[..., Tensor], theta: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """phi as a function of its argument and of the tensors theta that it closes over: phi(x, *theta)."""

    def phi_explicit(x: Tensor, *stands: Tensor) -> Tensor:
        with _Substitution(theta, stands):
            return phi(x)

    return phi_explicit


def tensors(thing: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    map_tensors(lambda t: (found.append(t), t)[1], thing)
    return iter(found)


def own_view(t: Tensor) -> Tensor:
    """t as a node of its own in the graph: derivatives with respect to it are partial."""
    return t.view_as(t) if t.layout == torch.strided else t.clone()  # a sparse tensor has no views


def has_untraced_leaf(y: Tensor, traced: Iterable[Tensor]) -> bool:
    """Whether y depends on a leaf of the graph by a path that meets none of `traced`."""
    edges = [get_gradient_edge(t) for t in traced if t.requires_grad]
    stops = {(edge.node, edge.output_nr) for edge in edges}
    todo, done = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        for edge in node.next_functions:
            if edge[0] is None or edge in stops:
                continue
            if edge[0].name() == "BarrierBackward":
                continue  # the evaluation of a solve within f: its leaf is its own, its closure is traced by itself
            if hasattr(edge[0], "variable"):
                return True
            todo.append(edge[0])
    return False
