"""Cost of samples in block passes and multiply-accumulates, from the evaluations of the fixed-point layer."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def explicit_blocks(model: Any) -> int:
    """Number of transformer blocks in one call outside the fixed-point layer; 0 for a model without `block_passes`."""
    if getattr(model, "has_fixed_point", False):
        return model.block_passes(1) - 1
    return model.block_passes() if hasattr(model, "block_passes") else 0


def cost(
    model: Any, evaluations: Int[Tensor, "N K"], calls: Int[Tensor, "N"]
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Block passes and multiply-accumulates of each sample; 0 for a model without `block_passes`.

    Args:
        model: the network.
        evaluations: (N, K) evaluations of the fixed-point layer.
        calls: (N,) rows of all calls of the network for each sample.
    """
    if getattr(model, "has_fixed_point", False):
        spent = evaluations.sum(1)
        slope = model.macs(2) - model.macs(1)
        return calls * explicit_blocks(model) + spent, calls * (model.macs(1) - slope) + spent * slope
    if hasattr(model, "block_passes"):
        return calls * model.block_passes(), calls * model.macs()
    return torch.zeros_like(calls), torch.zeros_like(calls)
