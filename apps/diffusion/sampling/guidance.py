"""Classifier-free guidance, outside the models (Ho & Salimans 2022, arXiv 2207.12598).

    guided = u + s (c - u)          c the prediction with the label, u the prediction with the null class, s the scale

One call on a doubled batch gives both predictions: the first half has the labels, the second half has the same samples
with the null class. s = 1 is no guidance; s = 0 ignores the label.

With an interval (Kynkäänniemi et al. 2024, arXiv 2404.07724) the timesteps low <= t <= high are guided. At the other
timesteps s is 1, and the batch is not doubled.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scale, channels and timesteps of classifier-free guidance.

    Args:
        scale: s, at least 0.
        channels: number of channels that are guided, counted from the first (3 gives the published DiT's results);
            None: all C channels of the image. Other channels, and a learned variance, are those of the labeled half.
        interval: (low, high); None: all timesteps are guided.

    Raises:
        ValueError: the scale is negative, `channels` is below 1, or low exceeds high.
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
        """Whether the batch is doubled."""
        return self.scale != 1.0

    def at(self, t: float) -> "Guidance":
        """The guidance at the timestep t; outside the interval its scale is 1."""
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
        """The inputs (x, t, y) of the model; if `doubles`, the batch is doubled, with the null class in the second
        half.

        Raises:
            ValueError: guidance without labels or without a null class.
        """
        if not self.doubles:
            return x, t, y
        if y is None or null_class is None:
            raise ValueError(
                f"Guidance.scale={self.scale} needs a conditional model and labels; leave guidance at 1 for "
                "an unconditional model."
            )
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_class)])

    def combine(self, prediction: Float[Tensor, "N C_out H W"], image_channels: int) -> Float[Tensor, "B C_out H W"]:
        """The guided prediction.

        Args:
            prediction: the model's output; N is 2B if `doubles`, else B.
            image_channels: C, the channels of an image; further channels are a learned variance.
        """
        if not self.doubles:
            return prediction
        with_label, without = prediction.chunk(2)
        n = min(self.channels or image_channels, image_channels)
        guided = without[:, :n] + self.scale * (with_label[:, :n] - without[:, :n])
        return torch.cat([guided, with_label[:, n:]], dim=1)
