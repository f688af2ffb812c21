"""Writing into a solver's ring of vectors: in place when nobody differentiates through it, else into a copy."""

import torch
from jaxtyping import Float
from torch import Tensor


def put(ring: Float[Tensor, "B K M"], slot: int, value: Float[Tensor, "B M"]) -> Float[Tensor, "B K M"]:
    """`ring` with row `slot` of every sample replaced by `value`."""
    if torch.is_grad_enabled() and (ring.requires_grad or value.requires_grad):
        return torch.cat((ring[:, :slot], value.unsqueeze(1), ring[:, slot + 1 :]), dim=1)
    ring[:, slot] = value
    return ring
