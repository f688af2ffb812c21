"""Nested states <-> one (B, N) matrix of real numbers, one row per sample.

Solvers compute with the matrix alone: a state of several tensors is solved exactly as the same numbers in one tensor.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

State: TypeAlias = Any
"""A tensor ``(B, *)`` or any nested tuple / list / dict of such tensors with one common batch size."""
Flat: TypeAlias = Float[Tensor, "B N"]
PerSample: TypeAlias = Float[Tensor, " B"]
Map: TypeAlias = Callable[..., State]
"""z, *args -> f(z, *args)."""


def leaves(state: State, like: State = None) -> list[Tensor]:
    """The tensors of a nested state, depth first; dicts in the key order of `like` (default: their own)."""
    like = state if like is None else like
    if isinstance(state, Tensor) and isinstance(like, Tensor):
        return [state]
    if type(state) is not type(like) or isinstance(state, Tensor):
        raise ValueError(f"f must keep the structure of the state: expected {_name(like)}, got {_name(state)}.")
    if isinstance(state, dict):
        if state.keys() != like.keys():
            raise ValueError(f"f must keep the keys of the state: expected {list(like)}, got {list(state)}.")
        return [leaf for key in like for leaf in leaves(state[key], like[key])]
    if isinstance(state, (tuple, list)):
        if len(state) != len(like):
            raise ValueError(f"f must keep the structure of the state: expected {len(like)} parts, got {len(state)}.")
        return [leaf for part, model in zip(state, like, strict=True) for leaf in leaves(part, model)]
    raise ValueError(f"A state is a tensor or a nested tuple, list or dict of tensors; it holds a {_name(state)}.")


def rebuild(like: State, tensors: Iterator[Tensor]) -> State:
    """The inverse of `leaves`: the structure of `like`, filled from `tensors`."""
    return map_tensors(lambda _: next(tensors), like)


_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a number's real part (a table: torch.compile cannot look into `dtype.to_real`)."""
    return _REAL.get(dtype, dtype)


def map_tensors(change: Callable[[Tensor], Tensor], thing: Any) -> Any:
    """`thing`, a nest of dataclasses, tuples, lists and dicts, with `change` applied to every tensor.

    A part in which no tensor changes is returned as the same object, so it may be of a type that cannot be rebuilt.
    """
    return _mapped(change, thing)[0]


def _mapped(change: Callable[[Tensor], Tensor], thing: Any) -> tuple[Any, bool]:
    """`map_tensors`, and whether a tensor has changed: dynamo cannot see whether two tuples are one object."""
    if isinstance(thing, Tensor):
        new = change(thing)
        return new, new is not thing
    if is_dataclass(thing) and not isinstance(thing, type):
        mapped = {f.name: _mapped(change, getattr(thing, f.name)) for f in fields(thing)}
        changed = any([differs for _, differs in mapped.values()])
        return (replace(thing, **{name: part for name, (part, _) in mapped.items()}) if changed else thing), changed
    if isinstance(thing, dict):
        mapped = {key: _mapped(change, part) for key, part in thing.items()}
        changed = any([differs for _, differs in mapped.values()])
        return (_like(thing, {key: part for key, (part, _) in mapped.items()}) if changed else thing), changed
    if isinstance(thing, (tuple, list)):
        mapped = [_mapped(change, part) for part in thing]
        changed = any([differs for _, differs in mapped])
        return (_like(thing, [part for part, _ in mapped]) if changed else thing), changed
    return thing, False


def _like(thing: Any, parts: Any) -> Any:
    """A container of the type of `thing`, subclasses included, that holds `parts`."""
    if hasattr(thing, "_fields"):  # a namedtuple
        return type(thing)(*parts)
    if type(thing) in (list, dict) or isinstance(thing, tuple):
        return type(thing)(parts)
    made = copy.copy(thing)  # keeps the other attributes of a subclass
    made.clear()
    made.update(parts) if isinstance(made, dict) else made.extend(parts)
    return made


def validate_warm_start(state: Any, like: Any) -> Any:
    """A detached copy of a solver state, if its type, batch size, shapes, dtype and device fit the solver state `like`.

    Raises:
        ValueError: the state does not fit.
    """
    if (other := _of_another_type(state, like)) is not None:
        raise ValueError(f"state must be Solution.state of an earlier solve by this solver, got {_name(other)}.")
    old, new = tensors(state), tensors(like)
    same = all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) for a, b in zip(old[:1], new[:1], strict=True)
    )
    if not same or any(t.shape[0] != new[0].shape[0] for t in old):
        raise ValueError("state must come from a solve with the same solver, batch size, shapes, dtype and device.")
    return map_tensors(lambda t: t.detach().clone(), state)


def _of_another_type(state: Any, like: Any) -> Any:
    """The first part of `state` whose type differs from that of the same part of the dataclass `like`, or None.

    An optional part, which is None in `state`, fits.
    """
    if type(state) is not type(like):
        return state
    if not is_dataclass(like):
        return None
    parts = [(getattr(state, field.name), getattr(like, field.name)) for field in fields(like)]
    found = (_of_another_type(a, b) for a, b in parts if is_dataclass(b) and a is not None)
    return next((other for other in found if other is not None), None)


def tensors(thing: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    map_tensors(lambda t: (found.append(t), t)[1], thing)
    return found


def _name(thing: object) -> str:
    return type(thing).__name__


@dataclass(frozen=True)
class Layout:
    """How a nested state lies in one (B, N) matrix.

    Complex numbers count as two reals. The matrix has the widest dtype of the state's tensors, at least float32, so
    that histories and norms of half-precision states do not overflow.
    """

    like: State
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    batch_dims: int
    dtype: torch.dtype
    lossy: bool
    """Whether the state is narrower than the matrix, so that the matrix must be rounded before f is evaluated."""
    eps: float
    """Relative rounding error of the tensor with the coarsest dtype."""
    plain: bool
    """Whether the state is itself a (B, N) tensor of the matrix's dtype."""
    widths: tuple[int, ...] = ()
    """Columns of the matrix that each tensor of the state takes."""

    @classmethod
    def of(cls, state: State, batch_dims: int = 1) -> "Layout":
        """The layout of a starting state.

        Raises:
            ValueError: the state is empty, is not floating point or complex, lies on several devices, has several batch
                sizes, or does not fit `batch_dims`.
        """
        if batch_dims not in (0, 1):
            raise ValueError(f"batch_dims must be 1 (a system per row) or 0 (one system), got {batch_dims}.")
        tensors = leaves(state)
        if not tensors:
            raise ValueError("The starting state holds no tensor.")
        for t in tensors:
            if not (t.is_floating_point() or t.is_complex()):
                raise ValueError(f"The starting state must be floating point or complex, got {t.dtype}: convert it.")
            if t.layout is not torch.strided:
                raise ValueError(f"The starting state must be dense, got {t.layout}: call to_dense().")
            if batch_dims and t.ndim == 0:
                raise ValueError("The starting state has no batch dimension: pass batch_dims=0, or add one to it.")
            if t.device != tensors[0].device:
                raise ValueError(f"The state must live on one device, got {tensors[0].device} and {t.device}.")
        if batch_dims and any(t.shape[0] != tensors[0].shape[0] for t in tensors):
            sizes = [t.shape[0] for t in tensors]
            raise ValueError(f"All tensors of the state must share one batch size, got {sizes}; or pass batch_dims=0.")
        if batch_dims and all(t.ndim == 1 for t in tensors):
            n = tuple(tensors[0].shape)
            raise ValueError(
                f"A starting state of shape {n} with batch_dims=1 would be a system of one number per entry: pass "
                "batch_dims=0 if it is one system, or z0.unsqueeze(1) if every entry is a system of its own."
            )
        shapes = tuple(t.shape[batch_dims:] for t in tensors)
        if sum(map(math.prod, shapes)) == 0:
            raise ValueError("The starting state has no elements, so there is nothing to solve for.")
        dtype = torch.float32
        for t in tensors:
            dtype = torch.promote_types(dtype, real(t.dtype))
        dtypes = tuple(t.dtype for t in tensors)
        return cls(
            like=state,
            shapes=shapes,
            dtypes=dtypes,
            device=tensors[0].device,
            batch_dims=batch_dims,
            dtype=dtype,
            lossy=any(real(d) != dtype for d in dtypes),
            eps=max(torch.finfo(d).eps for d in dtypes),
            plain=isinstance(state, Tensor) and state.dtype == dtype and state.ndim == 2 and batch_dims == 1,
            widths=tuple(math.prod(s) * (2 if d.is_complex else 1) for s, d in zip(shapes, dtypes, strict=True)),
        )

    def pack(self, state: State) -> Flat:
        """(B, N) matrix of a state; a view if the state is one tensor whose dtype and strides allow it."""
        if self.plain and state.dtype == self.dtype:
            return state
        if isinstance(state, Tensor) and isinstance(self.like, Tensor):
            return self._rows(state)
        return torch.cat([self._rows(t) for t in leaves(state, self.like)], dim=1)

    def _rows(self, t: Tensor) -> Flat:
        if t.is_complex():
            t = torch.stack((t.real, t.imag), dim=-1)  # view_as_real has no gradient at odd storage offsets
        rows = t.shape[0] if self.batch_dims else 1
        return t.reshape(rows, math.prod(t.shape[self.batch_dims :])).to(self.dtype)

    def unpack(self, flat: Flat) -> State:
        """The state of a (B, N) matrix; the number of rows may differ from the starting state's."""
        if self.plain:
            return flat
        if isinstance(self.like, Tensor):
            return self._leaf(flat, self.shapes[0], self.dtypes[0])
        parts = zip(torch.split(flat, list(self.widths), dim=1), self.shapes, self.dtypes, strict=True)
        return rebuild(self.like, iter([self._leaf(*part) for part in parts]))

    def _leaf(self, rows: Flat, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        lead = rows.shape[:1] if self.batch_dims else ()
        rows = rows.to(real(dtype))
        if dtype.is_complex:
            return torch.complex(*rows.reshape((*lead, *shape, 2)).unbind(dim=-1))
        return rows.reshape((*lead, *shape))

    def round(self, flat: Flat) -> Flat:
        """`flat` rounded to the dtypes of the state."""
        return self.pack(self.unpack(flat)) if self.lossy else flat

    def check(self, out: State, state: State) -> State:
        """Return `out` = f(state) if f kept structure, shapes, dtypes and device; under autocast the dtype may differ.

        Raises:
            ValueError: naming the first difference.
        """
        if isinstance(out, Tensor) and isinstance(state, Tensor):
            pairs = ((out, state),)
        else:
            pairs = zip(leaves(out, state), leaves(state), strict=True)
        for t, like in pairs:
            if t.shape != like.shape:
                want, got = tuple(like.shape), tuple(t.shape)
                raise ValueError(f"f must keep the shape of the state: expected {want}, got {got}.")
            if t.dtype != like.dtype and not (t.is_floating_point() and torch.is_autocast_enabled(self.device.type)):
                raise ValueError(
                    f"f must keep the dtype of the state: expected {like.dtype}, got {t.dtype}: cast it in f."
                )
            if t.layout is not torch.strided:
                raise ValueError(f"f must keep the layout of the state: {like.layout}, got {t.layout}: use to_dense().")
            if t.device != like.device:
                raise ValueError(f"f must keep the device of the state: {like.device}, got {t.device}: move it in f.")
        return out


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A host array on `device`, converted to `dtype` before the copy, without waiting for the device.

    CUDA copies pageable memory to a buffer before the call returns, so the array may change afterwards.
    """
    if dtype is not None:
        array = array.astype(np.float64 if dtype == torch.float64 else np.float32)
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_host(t: Tensor) -> np.ndarray:
    """A float64 array on the host; the tensor itself keeps its device and dtype."""
    return t.numpy(force=True).astype(np.float64)


def scaled_norm(flat: Flat, ord: float = 2, *, overwrite: bool = False) -> PerSample:
    """Norm of every row, (B,), without under- or overflow of squares; `overwrite` scales `flat` in place."""
    unit = torch.linalg.vector_norm(flat, ord=torch.inf, dim=1, keepdim=True)
    unit = torch.where((unit > 0) & torch.isfinite(unit), unit, 1)
    scaled = flat.div_(unit) if overwrite else flat / unit
    return torch.linalg.vector_norm(scaled, ord=ord, dim=1) * unit[:, 0]


def norm(flat: Flat) -> PerSample:
    """Euclidean norm of every row, (B,)."""
    return torch.linalg.vector_norm(flat, dim=1)
