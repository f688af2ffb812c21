"""Closure conversion: which tensors does a function close over, and the function with those tensors as arguments.

Setting: phi(x) uses tensors theta that are not among its arguments. `ClosureTracer` records theta while phi runs, and
`closure_convert` gives phi(x, *theta), which may be evaluated at other values of theta.

A tensor is closed over if phi uses it and did not make it: every result of a torch function, and of an
`autograd.Function`, is recorded as made by phi. No sequence number of autograd takes part, since those count per
thread. Inside a transform that phi starts itself (vmap, grad) the tensor that a wrapper holds counts as used.

What no mode sees (TorchScript, custom operators in C++, other threads) is found afterwards: `has_untraced_leaf` walks
the graph that phi has built, and `ClosureTracer(constant=True)` finds derivatives where none should be left.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from implicit.autodiff.function_mode import FunctionMode
from implicit.autodiff.recomputation import CHANGED
from implicit.pytree import map_tensors, tensors
from implicit.torch_internals import (
    Allocations,
    current_level,
    depends_on_transform,
    has_derivative,
    unwrap,
    version,
    wrap,
)

UNTRACED = (
    "Inside a torch.func transform, and for second derivatives, IFT needs every tensor that f closes over, and one is "
    "used where it is not visible (in TorchScript, in another thread, or in a custom operator), or at the solution but "
    "not at the start: pass it to fixed_point through `args`, or use JFB or Phantom."
)
THREAD = (
    "Inside a torch.func transform f uses a tensor that another thread has made (or torch.Tensor(...), which no "
    "transform sees), so that a derivative would be lost: make it in the thread of the solve, or before the solve if "
    "it is constant."
)
INNER = (
    "Inside a torch.func transform f gives a tensor that it closes over, and that the transform differentiates "
    "or maps, to a transform of its own (vmap, grad): pass it to fixed_point through `args`."
)
Kind: TypeAlias = tuple[torch.Size, torch.dtype]


class ClosureTracer(FunctionMode):
    """Records the tensors that a function uses, did not make, and that have a derivative.

    Derivatives are those of autograd (`requires_grad`), of `torch.func` transforms and of forward mode.

    Args:
        arguments: tensors that are arguments of the function, and therefore not closed over.
        constant: use every tensor that is recorded as a constant, so that a derivative of what the function makes
            comes from a tensor that the mode has not seen.
        allocations: of this thread, to tell which tensors another thread has made.
    """

    def __init__(
        self, arguments: Iterable[Tensor] = (), constant: bool = False, allocations: Allocations | None = None
    ) -> None:
        super().__init__()
        self.constant, self.level, self.allocations = constant, current_level(), allocations
        self._foreign: list[weakref.ref[Tensor]] = []  # constants that were allocated before, or in another thread
        self._found: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._reads: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # tensors not made, and their versions then
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
        """Record what t is made from, if it is closed over; t as the function shall use it."""
        if self.made(t):
            return t
        base, layers = unwrap(t, self.level)
        held = unwrap(t, self.level, differentiated=True)[0]  # of a transform's own variable: what it was made from
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
        """What the function has read, after it has run."""
        found = {key: (t, then) for key, (ref, then) in self._reads.items() if (t := ref()) is not None}
        own = {key for key, (t, then) in found.items() if version(t) != then}
        versions = {key: (weakref.ref(t), -1 if key in own else version(t)) for key, (t, _) in found.items()}
        return Reads(versions, {key: _kind(t) for key, (t, _) in found.items() if _is_data(t)})

    def contradicts(self, earlier: "Reads", gone: Iterable[Kind] = ()) -> bool:
        """Whether the function is not the one of `earlier`, which was evaluated at the same argument.

        It is not if a tensor has been written to since, other than by the function, or a constant stands in place of
        another. A tensor that no longer exists was made by the function itself, untraced, unless its kind is in `gone`.
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
        """Whether a tensor with a derivative was recorded and is gone: made by what the mode does not see."""
        return any(ref() is None and derivative for ref, derivative in self._found.values())

    @property
    def from_other_threads(self) -> bool:
        """Whether a constant that this thread has not allocated is gone: it existed during the run alone."""
        return any(ref() is None for ref in self._foreign)


@dataclass(frozen=True)
class Reads:
    """The tensors that a function has read, with their versions after it; -1 for one that it writes itself.

    Attributes:
        versions: the tensors by their identities.
        kinds: shapes and dtypes of those without a derivative.
    """

    versions: dict[int, tuple[weakref.ref[Tensor], int]]
    kinds: dict[int, Kind]

    def gone(self) -> list[Kind]:
        """The kinds of the constants that exist no more."""
        return [kind for key, kind in self.kinds.items() if self.versions[key][0]() is None]


class SameReads:
    """A function that may be run twice with the same arguments, and refuses to read other tensors the second time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.first: Reads | None = None

    def __call__(self, *args: Any) -> Any:
        """The value of the function.

        Raises:
            RuntimeError: a tensor that it reads has been exchanged or written to since the first run.
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
    """Uses `stands` wherever a function would use `originals`."""

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


def is_untraced(t: Tensor, traced: Iterable[Tensor]) -> bool:
    """Whether t, met in an evaluation of plain tensors, has a derivative that does not come from `traced`."""
    return t.grad_fn is None or has_untraced_leaf(t, traced)
