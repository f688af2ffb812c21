"""The layers that DiT and FPDM share.

A latent image x of shape (B, C, H, W) is cut into T = (H / p)(W / p) patches of p x p pixels, each embedded as one
token of D features. Time t and class y are embedded as vectors of D features, and a condition c, the sum of these
vectors or one of them, modulates every transformer block (adaLN-Zero, Peebles & Xie 2023, arXiv 2212.09748, section
3.2):

    s1, a1, g1, s2, a2, g2 = W silu(c) + b                        six vectors of D features: "the modulation"
    x <- x + g1 * attention((1 + a1) * norm(x) + s1)
    x <- x + g2 * mlp((1 + a2) * norm(x) + s2)

with norm a layer normalization without weights. W and b start at zero, so that a new block is the identity.

Module names follow the published DiT checkpoints. Shapes: B samples, T tokens, D = hidden size, C channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

FREQUENCIES = 256  # length of the sine-cosine embedding of t, before the MLP
NORM_EPS = 1e-6


class Size(NamedTuple):
    """A model size of Peebles & Xie 2023, table 1. FPDM uses `hidden_size` and `num_heads` only."""

    hidden_size: int
    depth: int
    num_heads: int


SIZES = {
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}


def position_embedding(dim: int, rows: int, columns: int) -> Float[Tensor, "1 T D"]:
    """Fixed 2-D sine-cosine embedding: [sin(jw), cos(jw), sin(iw), cos(iw)] for the token in row i and column j.

    w takes dim / 4 frequencies from 1 down to 1e-4 in geometric progression. T = rows * columns, in row-major order.
    """
    w = 1e4 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    i, j = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [axis.reshape(-1, 1) * w for axis in (j, i)]
    return torch.cat([wave(a) for a in angles for wave in (torch.sin, torch.cos)], dim=1).float()[None]


def modulate(x: Float[Tensor, "B T D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]) -> Tensor:
    """(1 + scale) * norm(x) + shift, the same for every token."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale[:, None])


def gelu(x: Tensor) -> Tensor:
    """The tanh form of gelu, x (1 + tanh u) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).

    On a CPU and without a graph, the sigmoid form is used: it takes half the time of PyTorch's kernel, which saves a
    twentieth of an FPDM's iteration. The two forms agree to rounding.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.gelu(x, approximate="tanh")
    root = 2 * math.sqrt(2 / math.pi)
    two_u = torch.addcmul(x.new_tensor(root), x, x, value=0.044715 * root).mul_(x)
    return two_u.sigmoid_().mul_(x)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """t -> MLP([cos(t w), sin(t w)]), w with FREQUENCIES / 2 values from 1 down to 1e-4 in geometric progression.

    Sine and cosine are computed in float32 for weights of any dtype: in bfloat16, t = 998 and 999 are the same number.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Num[Tensor, "B"]) -> Float[Tensor, "B D"]:
        half = FREQUENCIES // 2
        w = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * w  # (B, FREQUENCIES / 2)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of num_classes + 1 vectors; the last row is the null class, for predictions without a label.

    The trainer, not this layer, drops labels: it replaces them by `num_classes`.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of a sample."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh form of gelu."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc2(gelu(self.fc1(x)))


class Block(nn.Module):
    """One adaLN-Zero transformer block (the equations at the top of this file).

    `block(x, c)` is `block.modulated(x, block.modulation(c))`. A fixed-point layer, which evaluates the block many
    times with the same c, computes the modulation once.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def modulation(self, c: Float[Tensor, "B D"]) -> Float[Tensor, "B 6*D"]:
        """The six vectors s1, a1, g1, s2, a2, g2, concatenated."""
        return self.adaLN_modulation(c)

    def modulated(self, x: Float[Tensor, "B T D"], modulation: Float[Tensor, "B 6*D"]) -> Float[Tensor, "B T D"]:
        """The block with a modulation that was computed before."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulate(x, shift1, scale1)))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(x, shift2, scale2)))

    def forward(self, x: Float[Tensor, "B T D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B T D"]:
        return self.modulated(x, self.modulation(c))


class FinalLayer(nn.Module):
    """The output layer: tokens to the values of their patches, (B, T, D) -> (B, T, p * p * C_out), modulated by c."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Float[Tensor, "B T D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B T P"]:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))


def unpatchify(tokens: Float[Tensor, "B T P"], height: int, width: int, patch_size: int) -> Float[Tensor, "B C H W"]:
    """Assembles the patches to an image; a token holds its patch as (row, column, channel)."""
    rows, columns = height // patch_size, width // patch_size
    patches = tokens.unflatten(1, (rows, columns)).unflatten(-1, (patch_size, patch_size, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def initialize(model: nn.Module) -> None:
    """DiT's initial weights, with which every block is the identity and the output is zero.

    Linear layers are Xavier-uniform with zero bias, and so is the patch embedding as a linear layer on a patch. Label
    table and timestep MLP are normal(0, 0.02). All modulation layers and the output layer are zero. Random numbers come
    from torch's default generator, as in torch's own layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, TimestepEmbedder):
            for linear in (module.mlp[0], module.mlp[2]):
                nn.init.normal_(linear.weight, std=0.02)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, Block | FinalLayer):
            zeroed = [module.adaLN_modulation[1]] + ([module.linear] if isinstance(module, FinalLayer) else [])
            for linear in zeroed:
                for parameter in linear.parameters():
                    nn.init.zeros_(parameter)
