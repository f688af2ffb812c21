"""Which tensors a function closes over: found by watching it run, since nobody lists them."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode


class Outside(TorchFunctionMode):
    """Collects the tensors made before this object was that require gradients, or that have a derivative in torch.func
    or forward mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}
        mark = torch.zeros((), requires_grad=True) * 1
        assert mark.grad_fn is not None
        self._start = mark.grad_fn._sequence_nr()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        for t in _tensors((args, kwargs)):
            if _differentiable(t) and self._is_outside(t):
                self._found[id(t)] = t
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            self._made[id(t)] = weakref.ref(t)
        return out

    def _is_outside(self, t: Tensor) -> bool:
        made = self._made.get(id(t))
        if made is not None and made() is t and (_wrapped(t) or _dual(t) or not t.is_leaf):
            return False
        return t.grad_fn is None or _wrapped(t) or t.grad_fn._sequence_nr() < self._start

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What was found, in order of first use."""
        return tuple(self._found.values())


def _wrapped(t: Tensor) -> bool:
    """Whether a torch.func transform has wrapped t."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore[reportAttributeAccessIssue]: no stub


def _dual(t: Tensor) -> bool:
    """Whether t has a tangent in forward mode."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _differentiable(t: Tensor) -> bool:
    return t.requires_grad or _wrapped(t) or _dual(t)


class Substitute(TorchFunctionMode):
    """Uses `stands` wherever a function would use `originals`: makes its closed-over tensors explicit."""

    def __init__(self, originals: Iterable[Tensor], stands: Iterable[Tensor]) -> None:
        super().__init__()
        self._by_id = {id(a): b for a, b in zip(originals, stands, strict=True)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*self._swap(args), **self._swap(kwargs or {}))

    def _swap(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self._by_id.get(id(thing), thing)
        if type(thing) in (tuple, list):
            return type(thing)(self._swap(part) for part in thing)
        if type(thing) is dict:
            return {key: self._swap(part) for key, part in thing.items()}
        return thing


def explicit(phi: Callable[[Tensor], Tensor], originals: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """phi as a function of its argument and of the tensors it closes over."""

    def phi_explicit(x: Tensor, *stands: Tensor) -> Tensor:
        with Substitute(originals, stands):
            return phi(x)

    return phi_explicit


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _tensors(part)
    elif isinstance(thing, dict):
        yield from _tensors(tuple(thing.values()))


def unseen(y: Tensor, seen: Iterable[Tensor]) -> bool:
    """Whether y depends on a leaf by a path that meets none of `seen`."""
    edges = [get_gradient_edge(t) for t in seen if t.requires_grad]
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
            if edge[0].name() == "CutBackward":
                continue  # an equilibrium within f: its leaf is its own, and it sees what it depends on itself
            if hasattr(edge[0], "variable"):
                return True
            todo.append(edge[0])
    return False
