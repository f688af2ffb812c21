"""Builds networks from a configuration, or from the description in a checkpoint."""

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
    """A new network.

    Args:
        config: configuration of the network.
        shape: (C, H, W) of the images.
        num_classes: number of classes; 0: an unconditional network.
        iterations: default number of iterations of an FPDM.
        seed: random seed of the initial weights.
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
    """The class and constructor arguments of a network, as JSON, from which `rebuild` builds an equal network."""
    arguments = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    return json.loads(json.dumps({"class": type(model).__name__, "config": arguments}))


def rebuild(description: dict[str, Any]) -> DiT | FPDM:
    """The network with this description of `describe`, with new weights."""
    return NETWORKS[description["class"]](**description["config"])


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: object, *, assign: bool = False) -> None:
    """Load weights into a network.

    Args:
        model: the network.
        weights: tensors by name.
        where: origin of the weights, for messages.
        assign: whether the network holds these tensors, in their dtypes, instead of copies.

    Raises:
        ValueError: the weights belong to another network; the message lists unknown, missing and misshapen tensors.
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
            "checkpoint of a network of the same class and sizes."
        )
    model.load_state_dict(dict(weights), assign=assign)


def attention(config: c.Config) -> AbstractContextManager[Any]:
    """The context in which training computes attention. NewtonKrylov differentiates f twice, and PyTorch's fused
    kernels cannot be differentiated twice, so the context selects the unfused kernel for it.
    """
    twice = config.model.kind == "fpdm" and isinstance(config.solver, implicit.NewtonKrylov)
    return sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
