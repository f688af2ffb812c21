"""Backward passes of several cotangents at once, one after another.

`torch.autograd.grad(..., is_grads_batched=True)`, hence `torch.autograd.functional.jacobian(..., vectorize=True)`, and
`torch.func.vmap` over `torch.autograd.grad` call the backward pass of an autograd function with a batched tensor, of
which nothing can be read on the host. A linear solve reads residuals, so that it takes the cotangents one by one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def each_cotangent(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """`backward(ctx, g)` for a batched g too: for each of its cotangents, and the results batched again."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Grads:
        split = _split(grads[0])
        if split is None:
            return backward(ctx, *grads)
        cotangents, batch = split
        results = [run(ctx, g) for g in cotangents]
        return tuple(_stack(parts, batch) for parts in zip(*results, strict=True))

    return run


def _stack(parts: Sequence[Tensor | None], batch: Callable[[Tensor], Tensor]) -> Tensor | None:
    given = [t for t in parts if t is not None]
    return batch(torch.stack(given)) if given else None


def _split(g: Tensor) -> tuple[list[Tensor], Callable[[Tensor], Tensor]] | None:
    """The cotangents in a batched g and how to batch tensors again; None if g is not batched."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]: no stub in PyTorch
    if functorch.is_batchedtensor(g):
        level, dim = functorch.maybe_get_level(g), functorch.maybe_get_bdim(g)
        rows = functorch.get_unwrapped(g).movedim(dim, 0)
        return list(rows.unbind()), lambda t: functorch._add_batch_dim(t, 0, level)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level < 1:
        return None
    legacy: Any = torch  # vmap as autograd has it, which torch does not export
    rows = legacy._remove_batch_dim(g, level, 0, 0)  # without a batch at this level: expanded to none
    if rows.shape[0] == 0:
        return None
    return list(rows.unbind()), lambda t: legacy._add_batch_dim(t, 0, level)


def is_batched(g: Tensor) -> bool:
    """Whether g holds several cotangents."""
    return _split(g) is not None
