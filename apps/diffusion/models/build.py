"""Networks from their configuration, and from the description in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import implicit
from apps.diffusion.config import training as c
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.models.layers import SIZES, Size
from apps.diffusion.rng import Stream, drawing_from, generator

_SIZES = {"tiny": Size(hidden_size=128, depth=6, num_heads=4), **SIZES}
NETWORKS = {"DiT": DiT, "FPDM": FPDM}


def network(
    config: c.ModelConfig, shape: tuple[int, int, int], num_classes: int, iterations: int, seed: int
) -> DiT | FPDM:
    """A new network for images of `shape` (C, H, W); its first weights depend on the seed alone.

    `iterations` is the default number of an FPDM.
    """
    size = _SIZES[config.size]
    common: dict[str, Any] = {
        "input_size": shape[1:],
        "in_channels": shape[0],
        "patch_size": config.patch,
        "hidden_size": config.hidden or size.hidden_size,
        "num_heads": config.heads or size.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": num_classes,
        "learn_sigma": config.learn_sigma,
    }
    with drawing_from(generator(seed, Stream.WEIGHTS)):
        if config.kind == "dit":
            return DiT(**common, depth=config.depth or size.depth)
        model = FPDM(
            **common,
            pre=config.pre,
            post=config.post,
            iterations=iterations,
            condition_on_time=config.condition_on_time,
        )
        model.scale_recurrent_weights(config.recurrent_init)
        return model


def describe(model: DiT | FPDM) -> dict[str, Any]:
    """What `rebuild` needs to build the same network, as JSON."""
    arguments = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    return json.loads(json.dumps({"class": type(model).__name__, "config": arguments}))


def rebuild(description: dict[str, Any]) -> DiT | FPDM:
    """The network that `describe` described, with fresh weights."""
    return NETWORKS[description["class"]](**description["config"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: object, *, assign: bool = False) -> None:
    """Load weights into a network.

    Args:
        model: the network.
        weights: tensors by name.
        where: their origin, for messages.
        assign: the network takes the tensors themselves, in their dtypes.

    Raises:
        ValueError: they are those of another network; every unknown, missing and misshapen tensor is listed.
    """
    own = model.state_dict()
    differences = {
        "unknown": [name for name in weights if name not in own],
        "missing": [name for name in own if name not in weights],
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    wrong = [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]
    if wrong:
        raise ValueError(
            f"The weights in {where} are not those of this {type(model).__name__} ({'; '.join(wrong)}); give a "
            "checkpoint of the same kind and size, whole and with nothing added."
        )
    model.load_state_dict(dict(weights), assign=assign)


def attention(config: c.Config) -> AbstractContextManager[Any]:
    """How attention is computed in training: plainly for NewtonKrylov, which differentiates f twice, as PyTorch's fused
    kernels cannot be.
    """
    twice = config.model.kind == "fpdm" and isinstance(config.solver, implicit.NewtonKrylov)
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
