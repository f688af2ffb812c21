"""One step of an FPDM written from the equations without optimization, with which our model is compared.

    c = t_emb + y_emb;  x <- Block_pre(x, y_emb);  inj = W_pre x;  z_0 = x
    z_{k+1} = Block(fc2(gelu(fc1([z_k ; inj]))), c)
    prediction = Final(Block_post(z, y_emb), y_emb)

Each iteration concatenates z and the injection, and computes the modulation of c again. In training, autograd records
the free iterations too, and their graph is alive until these iterations end. Only the parameters of the model and
torch's kernels (fused attention, fused gelu, layer normalization) are used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.diffusion.models import FPDM
from apps.diffusion.models.layers import Block


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attention(block: Block, x: Tensor) -> Tensor:
    rows, tokens, width = x.shape
    qkv = block.attn.qkv(x).reshape(rows, tokens, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
    return block.attn.proj(mixed.transpose(1, 2).reshape(rows, tokens, width))


def apply(block: Block, x: Tensor, c: Tensor) -> Tensor:
    """One adaLN-Zero block."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate1[:, None] * attention(block, modulated(x, shift1, scale1))
    inner = F.gelu(block.mlp.fc1(modulated(x, shift2, scale2)), approximate="tanh")
    return x + gate2[:, None] * block.mlp.fc2(inner)


def iteration(model: FPDM, z: Tensor, inj: Tensor, c: Tensor) -> Tensor:
    """f(z)."""
    h = model.block_fixed_point_projection_fc1(torch.cat([z, inj], dim=-1))
    h = model.block_fixed_point_projection_fc2(F.gelu(h, approximate="tanh"))
    return apply(model.block_fixed_point, h, c)


def step(model: FPDM, x: Tensor, t: Tensor, y: Tensor, *, free: int, tracked: int) -> Tensor:
    """The prediction. Gradients reach the last `tracked` iterations only; if free = 0, also the blocks before them."""
    h = model.x_embedder(x) + model.pos_embed
    label = model.y_embedder.embedding_table(y)  # pyright: ignore[reportOptionalMemberAccess]
    c = model.t_embedder(t) + label
    for block in model.blocks_pre:
        h = apply(block, h, label)  # pyright: ignore[reportArgumentType]
    inj = model.block_pre_projection(h)
    z = h
    for _ in range(free):
        z = iteration(model, z, inj, c)
    z = z.detach() if free else z
    for _ in range(tracked):
        z = iteration(model, z, inj, c)
    for block in model.blocks_post:
        z = apply(block, z, label)  # pyright: ignore[reportArgumentType]
    return model.output(z, label)
