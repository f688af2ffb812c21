"""AdamW, the learning rate, and the moving average of the weights.

    lr_k = lr * min(1, (i + B) / warmup) * (1 + cos(pi * share)) / 2       i images seen, B a batch, share of training
    average <- d_k average + (1 - d_k) weights,    d_k = min(d, (1 + k) / (10 + k))      after step k of the optimizer

A step whose gradient is not finite changes neither weights nor moments. The test stays on the device, and no function
of this file waits for its result.
"""

import math
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apps.diffusion.config import training as c


def learning_rate(config: c.OptimizerConfig, images: int, time_share: float) -> float:
    """lr_k of the step that starts after `images` images, when the share `time_share` of `max_time` is spent."""
    rising = min(1.0, (images + config.batch) / config.warmup) if config.warmup else 1.0
    if config.decay == "constant":
        return config.lr * rising
    done = min(1.0, max(images / config.images, time_share))
    return config.lr * rising * 0.5 * (1 + math.cos(math.pi * done))


def adamw(parameters: Iterable[Tensor], config: c.OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in its fused form, one kernel for all tensors."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )


def step_if_finite(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of fused AdamW; weights and moments do not change if `finite`, a boolean scalar, is false.

    `found_inf` is the attribute by which `torch.amp.GradScaler` makes fused optimizers skip a step.
    """
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def decay_at(decay: float, steps: Tensor) -> Tensor:
    """d_k of the equation at the top of this file, for k = `steps`."""
    k = steps.float()
    return ((1 + k) / (10 + k)).clamp(max=decay)


class AveragedWeights:
    """A copy of a network that holds the moving average of its weights, in float32 on the device of the weights.

    Attributes:
        module: the copy; with FSDP its tensors are sharded like those of the network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: Tensor, finite: Tensor) -> None:
        """Updates the average after a step of the optimizer.

        Args:
            model: the network, sharded like the copy.
            steps: number of optimizer steps, the last one included; step 1 sets the average to the weights.
            finite: whether the step was made; false: it was skipped, and the average stays as it is.
        """
        share = (1 - decay_at(self.decay, steps - 1)).masked_fill(steps <= 1, 1.0)
        share = share * finite
        pairs = zip(_tensors(self.module), _tensors(model), strict=True)
        for average, weights in pairs:
            if average.is_floating_point():
                average.lerp_(weights, share)
            else:
                average.copy_(weights)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of a sharded tensor, this process's shard, which may be empty."""
    found = [*module.parameters(), *module.buffers()]
    return [value.to_local() if isinstance(value, DTensor) else value for value in found]
