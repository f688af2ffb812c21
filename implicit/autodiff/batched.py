"""Backward passes of several cotangents at once, one after another.

`torch.autograd.grad(..., is_grads_batched=True)`, hence `torch.autograd.functional.jacobian(..., vectorize=True)`, and
`torch.func.vmap` over `torch.autograd.grad` call the backward pass of an autograd function with a batched tensor, whose
numbers the host cannot read. A linear solve reads residuals, so it takes the cotangents one by one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from implicit.torch_internals import split_batched

Grads = tuple[Tensor | None, ...]


def each_cotangent(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """`backward(ctx, g)`, which for a batched g runs once per cotangent and batches the results again."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Grads:
        split = split_batched(grads[0])
        if split is None:
            return backward(ctx, *grads)
        cotangents, batch = split
        results = [run(ctx, g) for g in cotangents]
        return tuple(_stack(parts, batch) for parts in zip(*results, strict=True))

    return run


def _stack(parts: Sequence[Tensor | None], batch: Callable[[Tensor], Tensor]) -> Tensor | None:
    given = [t for t in parts if t is not None]
    return batch(torch.stack(given)) if given else None
