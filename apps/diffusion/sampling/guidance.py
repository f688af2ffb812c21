"""Classifier-free guidance, outside the models (Ho & Salimans 2022, arXiv 2207.12598).

    guided = u + s (c - u)          c the prediction with the label, u that with the null class, s the scale

Both come from one call on a batch twice as long: labeled samples first, the same samples with the null class
behind. s = 1 is no guidance, s = 0 no label.

An interval (Kynkäänniemi et al. 2024, arXiv 2404.07724) guides the timesteps low <= t <= high; at the others s is 1,
and the batch is not doubled.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and on which channels.

    Args:
        scale: s, at least 0.
        channels: guide the first so many channels only (3 gives the published DiT's results); None guides all
            C channels of the image. The others, and a learned variance, are those of the labeled half.
        interval: low and high; None guides all timesteps.

    Raises:
        ValueError: a negative scale, no channel, or an interval that ends before it begins.
    """

    scale: float = 1.0
    channels: int | None = None
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"Guidance.scale={self.scale} must be 0 or more; 1 is no guidance, 4 is strong.")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"Guidance.channels={self.channels} guides nothing; give 1 or more, or None for all.")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"Guidance.interval={self.interval} must be two timesteps, 0 <= low <= high.")

    @property
    def doubles(self) -> bool:
        """Whether the second half of the batch is needed."""
        return self.scale != 1.0

    def at(self, t: float) -> "Guidance":
        """The guidance at the timestep t: none outside the interval."""
        if self.interval is None:
            return self
        low, high = self.interval
        return replace(self, scale=self.scale if low <= t <= high else 1.0, interval=None)

    def inputs(
        self,
        x: Float[Tensor, "B C H W"],
        t: Num[Tensor, "B"],
        y: Int[Tensor, "B"] | None,
        null_class: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, t, y) for the model: doubled, the second half with the null class, if `doubles`.

        Raises:
            ValueError: guidance without labels or without a null class.
        """
        if not self.doubles:
            return x, t, y
        if y is None or null_class is None:
            raise ValueError(
                f"Guidance.scale={self.scale} needs a conditional model and labels; leave guidance at 1 for "
                "an unconditional one."
            )
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_class)])

    def combine(self, prediction: Float[Tensor, "N C_out H W"], image_channels: int) -> Float[Tensor, "B C_out H W"]:
        """The guided prediction (N = 2B if `doubles`) of a model of images with `image_channels` channels."""
        if not self.doubles:
            return prediction
        with_label, without = prediction.chunk(2)
        n = min(self.channels or image_channels, image_channels)
        guided = without[:, :n] + self.scale * (with_label[:, :n] - without[:, :n])
        return torch.cat([guided, with_label[:, n:]], dim=1)
