"""The equilibrium layers f(z, x) of the gradient benchmarks; samples are independent, and weights come from a fixed
seed.

The gain of a layer is chosen so that the largest spectral radius over the batch, at the solution, is about the number
in the layer's name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tanh(nn.Module):
    """tanh(W z + x), with 64 numbers per sample."""

    def __init__(self, gain: float, size: int = 64, batch: int = 8) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(gain * torch.randn(size, size, generator=rng) / size**0.5)
        self.x = 0.3 * torch.randn(batch, size, generator=rng)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(z, self.weight) + x)


class Convolutions(nn.Module):
    """tanh(conv(relu(conv z)) + x), 16 channels of 12 x 12 pixels."""

    def __init__(self, gain: float, channels: int = 16, side: int = 12, batch: int = 8) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        shape = (channels, channels, 3, 3)
        self.first, self.second = (
            nn.Parameter(gain * torch.randn(shape, generator=rng) / (9 * channels) ** 0.5) for _ in range(2)
        )
        self.x = 0.5 * torch.randn(batch, channels, side, side, generator=rng)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(F.relu(F.conv2d(z, self.first, padding=1)), self.second, padding=1) + x)


class AdaLN(nn.Module):
    """An adaLN transformer block with a fixed modulation, applied to a linear map of z and x."""

    def __init__(self, gain: float, width: int = 128, tokens: int = 16, batch: int = 30, heads: int = 4) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=rng) / shape[-1] ** 0.5)

        self.heads, self.gain = heads, gain
        self.inject, self.qkv, self.out = draw(width, 2 * width), draw(3 * width, width), draw(width, width)
        self.up, self.down = draw(4 * width, width), draw(width, 4 * width)
        self.modulation = nn.Parameter(0.2 * torch.randn(6, width, generator=rng))
        self.x = torch.randn(batch, tokens, width, generator=rng)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation
        h = F.linear(torch.cat((self.gain * z, x), dim=-1), self.inject)
        normed = F.layer_norm(h, h.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = F.linear(normed, self.qkv).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1 * F.linear(mixed, self.out)
        normed = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + gate2 * F.linear(F.gelu(F.linear(normed, self.up), approximate="tanh"), self.down)


LAYERS: dict[str, Callable[[], Tanh | Convolutions | AdaLN]] = {
    "tanh, easy": lambda: Tanh(0.34),
    "tanh, hard": lambda: Tanh(1.05),
    "convolutions": lambda: Convolutions(1.0),
    "adaLN block": lambda: AdaLN(0.7),
}
