"""Closure conversion: the tensors that a function closes over, and the function with these tensors as arguments.

Setting: phi(x) uses tensors theta that are not among its arguments. `ClosureTracer` records theta while phi runs, and
`closure_convert` gives phi(x, *theta), which may be evaluated at other values of theta.

A tensor is closed over if phi uses it and did not make it: every result of a torch function, and of an
`autograd.Function`, is recorded as made by phi. Autograd's sequence numbers are not used, since each thread counts its
own. Inside a transform that phi starts itself (vmap, grad) the tensor that a wrapper holds counts as used.

Uses that no function mode receives (TorchScript, custom operators in C++, other threads) are found afterwards:
`has_untraced_leaf` walks the graph that phi has built, and `ClosureTracer(constant=True)` leaves a derivative in the
result only if a tensor was not traced.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy

from implicit.autodiff.function_mode import FunctionMode
from implicit.autodiff.recomputation import CHANGED
from implicit.pytree import map_tensors, tensors
from implicit.torch_internals import (
    Allocations,
    alive,
    current_level,
    depends_on_transform,
    has_derivative,
    unwrap,
    version,
    wrap,
)

UNTRACED = (
    "Inside a torch.func transform, and for second derivatives, IFT needs every tensor that f closes over. It cannot "
    "find a tensor that f uses in TorchScript, in another thread or in a custom operator, or at the solution but not "
    "at the start: pass this tensor to fixed_point through `args`, or use JFB or Phantom."
)
THREAD = (
    "Inside a torch.func transform f uses a tensor that was made in another thread (or by torch.Tensor(...), which no "
    "transform sees), so a derivative would be lost: make it in the thread of the solve, or before the solve if it is "
    "constant."
)
INNER = (
    "Inside a torch.func transform, f closes over a tensor that the transform differentiates or maps, and passes it to "
    "a transform that f starts (vmap, grad): pass this tensor to fixed_point through `args`."
)
Kind: TypeAlias = tuple[torch.Size, torch.dtype]


class ClosureTracer(FunctionMode):
    """Records the tensors that a function uses, did not make, and that have a derivative.

    Derivatives are those of autograd (`requires_grad`), of `torch.func` transforms and of forward mode.

    Args:
        arguments: tensors that are arguments of the function, and therefore not closed over.
        constant: replace every recorded tensor by a constant, so that the function's result has a derivative only if
            it uses a tensor that was not recorded.
        allocations: the allocations of this thread, to find tensors that another thread made; None: not looked for.
    """

    def __init__(
        self, arguments: Iterable[Tensor] = (), constant: bool = False, allocations: Allocations | None = None
    ) -> None:
        super().__init__()
        self.constant, self.level, self.allocations = constant, current_level(), allocations
        self._foreign: list[weakref.ref[Tensor]] = []  # constants that were allocated earlier or in another thread
        self._found: dict[int, tuple[weakref.ref[Tensor], bool]] = {}  # closed over; has an autograd derivative
        self._reads: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # used but not made; version at the first use
        self._made: dict[int, weakref.ref[Tensor]] = {id(t): weakref.ref(t) for t in arguments}

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = {id(t): t for t in tensors((args, kwargs))}
        used = {key: self._read(t) for key, t in inputs.items()}
        if any(used[key] is not t for key, t in inputs.items()):
            args, kwargs = map_tensors(lambda t: used[id(t)], (args, kwargs))
        out = func(*args, **kwargs)
        for t in tensors(out):
            if id(t) not in inputs:  # an operation may return its input
                self._made[id(t)] = weakref.ref(t)
        return out

    def _read(self, t: Tensor) -> Tensor:
        """Record t if it is closed over; returns the tensor to use: t, or with `constant` a constant of its value."""
        if is_lazy(t) or self.made(t) or self.made(alive(t)):  # a lazy parameter has no numbers before its first use
            return t
        base, layers = unwrap(t, self.level)
        held = unwrap(t, self.level, differentiated=True)[0]  # the tensor in t, if t is a variable of an inner grad
        if self.made(base) or self.made(held):
            return t
        if self.constant and layers and depends_on_transform(base):
            raise NotImplementedError(INNER)
        if id(held) not in self._reads:
            self._reads[id(held)] = weakref.ref(held), version(held)
        if not depends_on_transform(held):
            if self.allocations is not None and held.is_floating_point() and self.allocations.excludes(held):
                self._foreign.append(weakref.ref(held))
            return t
        self._found[id(base)] = weakref.ref(base), has_derivative(base)
        return wrap(base.detach(), layers) if self.constant else t

    def made(self, t: Tensor) -> bool:
        """Whether t is an argument of the function or was made by it."""
        made = self._made.get(id(t))
        return made is not None and made() is t

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the function closes over, in order of first use."""
        return tuple(t for ref, _ in self._found.values() if (t := ref()) is not None)

    def reads(self) -> "Reads":
        """The tensors that the function has read; to be called after the function has run."""
        found = {key: (t, then) for key, (ref, then) in self._reads.items() if (t := ref()) is not None}
        own = {key for key, (t, then) in found.items() if version(t) != then}
        versions = {key: (weakref.ref(t), -1 if key in own else version(t)) for key, (t, _) in found.items()}
        return Reads(versions, {key: _kind(t) for key, (t, _) in found.items() if _is_data(t)})

    def contradicts(self, earlier: "Reads", gone: Iterable[Kind] = ()) -> bool:
        """Whether the function has changed since `earlier`, an evaluation at the same argument.

        The function has changed if a tensor was written to in between by anything but the function, or if it reads a
        constant that is new and has the shape and dtype of an earlier one that it no longer reads. An earlier constant
        that no longer exists was made by the function itself, untraced, unless its shape and dtype are in `gone`.
        """
        new: list[Kind] = []
        for key, (ref, then) in self._reads.items():
            t, (known, version) = ref(), earlier.versions.get(key, (ref, None))
            if version is None or known() is not t:
                new += [_kind(t)] if _is_data(t) else []
            elif version not in (-1, then):
                return True
        present = ((key, ref()) for key, (ref, _) in earlier.versions.items() if key not in self._reads)
        missing = [earlier.kinds[key] for key, t in present if t is not None and key in earlier.kinds]
        return any(kind in new for kind in (*missing, *gone))

    @property
    def lost(self) -> bool:
        """Whether a recorded tensor with a derivative no longer exists: the function made it, untraced."""
        return any(ref() is None and derivative for ref, derivative in self._found.values())

    @property
    def from_other_threads(self) -> bool:
        """Whether a constant that this thread did not allocate no longer exists: it existed during the run alone."""
        return any(ref() is None for ref in self._foreign)


@dataclass(frozen=True)
class Reads:
    """The tensors that a function has read.

    Attributes:
        versions: id -> (tensor, version after the run; -1 for a tensor that the function writes into).
        kinds: id -> (shape, dtype) of the tensors without a derivative.
    """

    versions: dict[int, tuple[weakref.ref[Tensor], int]]
    kinds: dict[int, Kind]

    def gone(self) -> list[Kind]:
        """The shapes and dtypes of the constants that no longer exist."""
        return [kind for key, kind in self.kinds.items() if self.versions[key][0]() is None]


class SameReads:
    """A function that is run twice with the same arguments; the second run raises if it reads other tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.first: Reads | None = None

    def __call__(self, *args: Any) -> Any:
        """The value of the function.

        Raises:
            RuntimeError: a tensor that the function reads was replaced or written to since the first run.
        """
        gone = [] if self.first is None else self.first.gone()
        with ClosureTracer(tensors(args)) as tracer:
            out = self.function(*args)
        if self.first is None:
            self.first = tracer.reads()
        elif tracer.contradicts(self.first, gone):
            raise RuntimeError(CHANGED)
        return out


def _kind(t: Tensor) -> Kind:
    return t.shape, t.dtype


def _is_data(t: Tensor | None) -> TypeGuard[Tensor]:
    return t is not None and not depends_on_transform(t)


class _Substitution(FunctionMode):
    """Replaces `originals` by `stands` in the arguments of every torch function."""

    def __init__(self, originals: Iterable[Tensor], stands: Iterable[Tensor]) -> None:
        super().__init__()
        self._pairs = {id(a): (a, b) for a, b in zip(originals, stands, strict=True)}
        self.level = current_level()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*map_tensors(self._stand, args), **map_tensors(self._stand, kwargs))

    def _stand(self, t: Tensor) -> Tensor:
        base, layers = (t, ()) if id(t) in self._pairs else unwrap(t, self.level)
        return wrap(self._pairs[id(base)][1], layers) if id(base) in self._pairs else t


def closure_convert(phi: Callable[..., Tensor], theta: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """phi as a function of its argument and of the tensors theta that it closes over: phi(x, *theta)."""

    def phi_explicit(x: Tensor, *stands: Tensor) -> Tensor:
        with _Substitution(theta, stands):
            return phi(x)

    return phi_explicit


def own_view(t: Tensor) -> Tensor:
    """t as a new node of the graph, so that derivatives with respect to it are partial derivatives."""
    return t.view_as(t) if t.layout == torch.strided else t.clone()  # a sparse tensor has no views


def has_untraced_leaf(y: Tensor, traced: Iterable[Tensor]) -> bool:
    """Whether y depends on a leaf of the graph by a path that meets none of `traced`."""
    edges = [get_gradient_edge(t) for t in traced if t.requires_grad]
    stops = {(edge.node, edge.output_nr) for edge in edges}
    # a barrier is an evaluation in a solve within f: that solve traces its own closure
    below = graph_nodes([y.grad_fn], lambda edge: edge not in stops and edge[0].name() != "BarrierBackward")
    return any(hasattr(node, "variable") for node in below)


def same_reach(
    y: GradientEdge | None, x: GradientEdge | None, theta: Iterable[GradientEdge | None], again: Iterable[bool]
) -> bool:
    """Whether a second evaluation of phi(x, *theta) depends on the same tensors as the first, y.

    Compared are the tensors that depend neither on x nor on another tensor of theta: one that does may have been made
    by phi itself, in a transform that phi starts.

    Args:
        again: whether the second evaluation depends on each of theta directly.
    """
    ends = [None if edge is None else (edge.node, edge.output_nr) for edge in theta]
    sources = {*ends, None if x is None else (x.node, x.output_nr)} - {None}

    def below(edges: Iterable[Any]) -> set[Any]:
        nodes = graph_nodes(edge[0] for edge in edges)
        return {edge for node in nodes for edge in node.next_functions if edge in sources}

    independent = {end for end in ends if end is not None and not below([end])}
    direct = [end for end, used in zip(ends, again, strict=True) if used and end is not None]
    first = () if y is None else ((y.node, y.output_nr),)
    return all((end in below(first) or end in first) == (end in below(direct) or end in direct) for end in independent)


def graph_nodes(roots: Iterable[Any], follow: Callable[[Any], bool] = lambda edge: True) -> Iterator[Any]:
    """Yields every node of the graph below `roots` once, along the edges (node, number of the output) to `follow`."""
    todo, done = list(roots), set()
    while todo:
        node = todo.pop()
        if node is None or node in done:
            continue
        done.add(node)
        yield node
        todo += [edge[0] for edge in node.next_functions if edge[0] is not None and follow(edge)]
