"""Every private call into PyTorch that the package makes, with the version that it was checked with.

Checked with torch 2.13.0. If a later version drops a name, this file is the only one to change.
"""

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

R = TypeVar("R")
S = TypeVar("S")
N = TypeVar("N", int, float)
Layers: TypeAlias = tuple[tuple[int, int | None], ...]
"""(level, mapped dimension or None for a level of grad) of the wrappers around a tensor, outermost first."""
Hooks: TypeAlias = list[tuple[Any, Any]]

_HAS_REGIONS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: no stub in PyTorch, as below
_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]

# -- transforms of torch.func and forward mode


def transforms_active() -> bool:
    """Whether a torch.func transform is on (`torch._C._are_functorch_transforms_active`, 2.13.0)."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    """Whether a forward-mode level is open (`forward_ad._current_level`, 2.13.0)."""
    return forward_ad._current_level >= 0


def host_readable(*tensors: Tensor) -> bool:
    """Whether the numbers of tensors are known and on the CPU: no torch.func transform, no traced graph, no device."""
    return not (traced() or transforms_active()) and all([type(t) is Tensor and t.is_cpu for t in tensors])


def is_abstract(t: Tensor) -> bool:
    """Whether a tensor has no numbers: on the meta device, or a `FakeTensor` (`torch._subclasses`, 2.13.0)."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return t.is_meta or (fake is not None and isinstance(t, fake.FakeTensor))


def fake_tensors_paused() -> AbstractContextManager[None]:
    """A context in which new tensors have numbers also under a `FakeTensorMode` (`torch._subclasses`, 2.13.0)."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return nullcontext() if fake is None or torch.compiler.is_compiling() else fake.unset_fake_temporarily()


def forward_levels() -> int:
    """How many forward-mode transforms are on (`torch._C._functorch.get_interpreter_stack`, 2.13.0)."""
    levels = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in levels)


def current_level() -> int:
    """The level of the innermost transform, 0 if there is none (`maybe_current_level`, 2.13.0)."""
    return _functorch.maybe_current_level() or 0


def depends_on_transform(t: Tensor) -> bool:
    """Whether t has a derivative, or belongs to a transform that is on (`is_functorch_wrapped_tensor`, 2.13.0)."""
    return _functorch.is_functorch_wrapped_tensor(t) or has_derivative(t)


def has_derivative(t: Tensor) -> bool:
    """Whether t has a derivative in a transform or mode that is on (`get_unwrapped`, 2.13.0).

    While dynamo traces, transforms are not visible.
    """
    if torch.compiler.is_compiling():
        return t.requires_grad
    while True:
        if t.requires_grad or _has_tangent(t):
            return True
        if not _functorch.is_functorch_wrapped_tensor(t):
            return False
        t = _functorch.get_unwrapped(t)


def _has_tangent(t: Tensor) -> bool:
    """Whether t has a tangent in forward mode; False for a t of vmap, which has no rule for `unpack_dual`."""
    try:
        return forward_mode_active() and forward_ad.unpack_dual(t).tangent is not None
    except RuntimeError:
        return False


def unwrap(t: Tensor, level: int, differentiated: bool = False) -> tuple[Tensor, Layers]:
    """The tensor that t wraps at `level` and the levels inside it, and the wrappers.

    If one of these levels differentiates with respect to t, the result is t itself, unless `differentiated`.

    (`torch._C._functorch.maybe_get_level`, `get_unwrapped`, `maybe_get_bdim`, 2.13.0.)
    """
    layers, base, innermost = [], t, current_level()
    while _functorch.is_functorch_wrapped_tensor(base) and level < _functorch.maybe_get_level(base) <= innermost:
        batched = _functorch.is_batchedtensor(base)
        if not batched and base.requires_grad and not differentiated:
            return t, ()
        layers.append((_functorch.maybe_get_level(base), _functorch.maybe_get_bdim(base) if batched else None))
        base = _functorch.get_unwrapped(base)
    return base, tuple(layers)


def wrap(t: Tensor, layers: Layers) -> Tensor:
    """The inverse of `unwrap` (`torch._C._functorch._add_batch_dim`, `_wrap_for_grad`, 2.13.0)."""
    for level, dim in reversed(layers):
        t = _functorch._wrap_for_grad(t, level) if dim is None else _functorch._add_batch_dim(t, dim, level)
    return t


def unwrap_all(t: Tensor) -> Tensor:
    """The tensor beneath all wrappers of transforms (`is_functorch_wrapped_tensor`, `get_unwrapped`, 2.13.0)."""
    while _functorch.is_functorch_wrapped_tensor(t):
        t = _functorch.get_unwrapped(t)
    return t


def alive(t: Tensor) -> Tensor:
    """The tensor that t wraps, where t is a wrapper of transforms that have ended; else t.

    (`torch._C._functorch.is_dead_tensor_wrapper`, `get_unwrapped`, 2.13.0.)
    """
    while _functorch.is_dead_tensor_wrapper(t):
        t = _functorch.get_unwrapped(t)
    return t


def autograd_vmap_level() -> int:
    """The level of the vmap of autograd, of `jacobian(vectorize=True)`; 0 if it is off.

    (`torch._C._vmapmode_increment_nesting`, `_vmapmode_decrement_nesting`, 2.13.0.)
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def split_batched(g: Tensor) -> tuple[list[Tensor], Callable[[Tensor], Tensor]] | None:
    """(the tensors in a g batched by the innermost vmap, a function that batches a stack again); None: not batched.

    (`torch._C._functorch`; the vmap of autograd: `torch._remove_batch_dim`, `torch._add_batch_dim`; 2.13.0.)
    """
    if _functorch.is_batchedtensor(g):
        level, dim = _functorch.maybe_get_level(g), _functorch.maybe_get_bdim(g)
        rows = _functorch.get_unwrapped(g).movedim(dim, 0)
        return list(rows.unbind()), lambda t: _functorch._add_batch_dim(t, 0, level)
    level = autograd_vmap_level()
    if level < 1:
        return None
    legacy: Any = torch
    rows = legacy._remove_batch_dim(g, level, 0, 0)  # a g that is not batched at this level is expanded to 0 rows
    if rows.shape[0] == 0:
        return None
    return list(rows.unbind()), lambda t: legacy._add_batch_dim(t, 0, level)


# -- autograd


def version(t: Tensor) -> int:
    """How often t was written to in place (`Tensor._version`, 2.13.0); 0 for tensors made in inference mode."""
    return 0 if t.is_inference() else t._version


def memory(t: Tensor) -> int:
    """The address of the storage that holds a tensor's numbers (`UntypedStorage._cdata`, 2.13.0)."""
    return t.untyped_storage()._cdata


def inside_backward() -> bool:
    """Whether an autograd engine runs in this thread (`torch._C._current_graph_task_id`, 2.13.0)."""
    return torch._C._current_graph_task_id() != -1


def saved_tensor_hooks_active() -> bool:
    """Whether saved tensors are packed by hooks: checkpoints, offloading (`_top_saved_tensors_default_hooks`)."""
    return _autograd._top_saved_tensors_default_hooks(True) is not None


def take_saved_tensor_hooks() -> Hooks:
    """Switch the hooks on saved tensors off; returns them, innermost first (`_pop_saved_tensors_default_hooks`)."""
    hooks = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    return hooks


def put_saved_tensor_hooks(hooks: Hooks) -> None:
    """Switch the hooks on again (`_push_saved_tensors_default_hooks`, 2.13.0)."""
    for pack, unpack in reversed(hooks):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)


@dataclass
class _Saved:
    raw: Tensor | None
    packed: Any


@contextmanager
def saved_tensors_at_hand() -> Iterator[None]:
    """Backward passes within the block use saved tensors directly; later ones unpack what the active hooks packed."""
    hooks, kept = _autograd._top_saved_tensors_default_hooks(True), []
    if hooks is None:
        yield
        return

    def pack(t: Tensor) -> _Saved:
        kept.append(_Saved(t, hooks[0](t)))
        return kept[-1]

    with saved_tensors_hooks(pack, lambda saved: hooks[1](saved.packed) if saved.raw is None else saved.raw):
        try:
            yield
        finally:
            while kept:
                kept.pop().raw = None


class Allocations(TorchDispatchMode):
    """Records the storages that operators allocate in this thread, by weak references (`StorageWeakRef`, 2.13.0)."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        taken = {storage.cdata for storage in _storages((args, kwargs))}
        self._made |= {storage.cdata: storage for storage in _storages(out) if storage.cdata not in taken}
        return out

    def excludes(self, t: Tensor) -> bool:
        """Whether PyTorch allocated the storage of a plain tensor t before the mode was on, or in another thread."""
        if type(t) is not Tensor or t.layout != torch.strided or _functorch.is_functorch_wrapped_tensor(t):
            return False
        storage = t.untyped_storage()
        return storage.resizable() and storage._cdata not in self._made  # numpy's memory cannot be resized


def _storages(thing: Any) -> list[StorageWeakRef]:
    dense = (t for t in tree_leaves(thing) if isinstance(t, Tensor) and t.layout == torch.strided)
    return [StorageWeakRef(t.untyped_storage()) for t in dense]


# -- parametrizations, pytrees, compilers


def parametrize_cache() -> tuple[Any, int]:
    """The weights that `parametrize.cached()` keeps, and how many such contexts are on (2.13.0)."""
    return parametrize._cache, parametrize._cache_enabled


def parametrization_of_lookup() -> torch.nn.Module:
    """The parametrization whose weight torch looks up or enters in the cache, called by methods of the cache.

    The key of the cache has the id of a module that may no longer exist, so the module itself is read from the frame of
    `get_cached_parametrization` (`parametrize._inject_property`, 2.13.0).
    """
    frame: Any = sys._getframe(1)
    while frame.f_code.co_name != "get_cached_parametrization":
        frame = frame.f_back
    return frame.f_locals["parametrization"]


def set_parametrize_cache(cache: Any, enabled: int) -> None:
    """Set the cached weights and the number of contexts (`parametrize._cache`, `_cache_enabled`, 2.13.0)."""
    parametrize._cache, parametrize._cache_enabled = cache, enabled


def register_pytree(kind: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
    """Make PyTorch's transforms flatten objects of a class (`torch.utils._pytree`, 2.13.0)."""
    _pytree.register_pytree_node(kind, flatten, unflatten, serialized_type_name=f"implicit.{kind.__name__}")


def jit_traces() -> bool:
    """Whether torch.jit.trace records (`torch._C._get_tracing_state`, 2.13.0)."""
    return torch._C._get_tracing_state() is not None


def traced() -> bool:
    """Whether torch.compile or torch.jit.trace records."""
    return torch.compiler.is_compiling() or jit_traces()


def nested_regions_supported(z: Tensor) -> bool:
    """Whether dynamo traces a graph that may have nested regions that write into tensors like z (tested: 2.13.0).

    Not for a size that the graph leaves open: dynamo fails there, since sizes in a region cannot be used outside of it
    (`torch.fx.experimental.symbolic_shapes.has_static_value`).
    """
    if not _HAS_REGIONS or not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all([has_static_value(size) for size in z.shape])


def constant(number: N) -> N:
    """A number as a constant of the graph that dynamo traces.

    Dynamo leaves a size, or a number of an argument, open once it has seen two values. The keys of itertools.groupby
    are constants (tested: 2.13.0).
    """
    return next(itertools.groupby((number,)))[0] if torch.compiler.is_dynamo_compiling() else number


def constant_numbers(settings: S, kind: type = int) -> S:
    """The dataclass with its numbers of a kind, int or float, as constants of the graph that dynamo traces.

    Those of dataclasses in its fields too. An open integer may not be the size of a region's input, and the body of a
    region may not read an open float. A class of another package is returned as it is: it has no region, and may not
    allow a copy by its fields.
    """
    own = type(settings).__module__.startswith("implicit.")
    if not torch.compiler.is_dynamo_compiling() or not is_dataclass(settings) or not own:
        return settings
    values = [(field.name, getattr(settings, field.name)) for field in fields(settings) if field.init]
    closed = {name: constant(value) for name, value in values if type(value) is kind}
    closed |= {name: constant_numbers(value, kind) for name, value in values if is_dataclass(value)}
    return cast(S, replace(cast(Any, settings), **closed)) if closed else settings


_REGIONS = itertools.count()


def nested_region(body: Callable[..., R], key: int, *args: Any) -> R:
    """body(key, *args) as a region of the graph that dynamo traces; all with one key are traced and compiled once.

    `body` is a method that `region_body` marks. Its results are tensors, new ones; `args` are tensors and numbers.

    This is `torch.compiler.nested_compile_region`, which imports the compiler where a function is marked, and not where
    it is called (`torch._higher_order_ops.invoke_subgraph.invoke_subgraph_placeholder`, 2.13.0).
    """
    from torch._higher_order_ops.invoke_subgraph import invoke_subgraph_placeholder

    return invoke_subgraph_placeholder(body, key, *args)


def region_body(body: Callable[..., R]) -> Callable[..., R]:
    """Marks a method for `nested_region` as `nested_compile_region(reuse_hash_fn=...)` does (2.13.0)."""
    marked: Any = body
    marked.__marked_compile_region_reuse_hash_fn__ = _first
    marked.__marked_compile_region_max_reuse_entries__ = sys.maxsize
    return body


def _first(key: int, *_: Any) -> int:
    return key


def _constant(function: Callable[..., R]) -> Callable[..., R]:
    """Marks a function that dynamo calls and does not trace, as `assume_constant_result` does (2.13.0)."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@_constant
def region_key() -> int:
    """A number that no other region of this process has."""
    return next(_REGIONS)


class _Eager:
    """The stance of the compiler, which all threads share: eager while at least one thread is in `eager()`."""

    lock = threading.Lock()
    active = 0
    stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Run functions made by `torch.compile` without compilation: under a function mode each would be compiled again.

    torch._dynamo, which takes longer to import than torch itself, is not imported if nothing was compiled.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        yield
        return
    with _Eager.lock:
        if not _Eager.active:
            _Eager.stance = torch.compiler.set_stance("force_eager")
            _Eager.stance.__enter__()
        _Eager.active += 1
    try:
        yield
    finally:
        with _Eager.lock:
            _Eager.active -= 1
            if not _Eager.active:
                _Eager.stance.__exit__(None, None, None)


def not_compiled(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, which runs outside of compiled graphs together with all functions that it calls.

    `torch.compiler.disable` imports torch._dynamo, so it is called at the first call after a compilation, and not when
    this package is imported.
    """

    disabled: list[Callable[..., R]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            wrapped: Any = torch.compiler.disable(function, recursive=True)
            disabled.append(wrapped)
        return disabled[0](*args, **kwargs)

    return call
