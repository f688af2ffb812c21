"""Initialization of a network from a trained network of the same architecture, or of an FPDM from a DiT.

An FPDM takes from a DiT the embeddings, the output layer, the first `pre` and the last `post` blocks, and the middle
block of the others for the fixed-point layer. The injection before that block starts as the mean of z and x,

    W_pre = I,  fc1 = [[I, I], [-I, -I]] / 2,  fc2 = [I, -I],      fc2(gelu(fc1([z ; x]))) = (z + x) / 2

because gelu(a) - gelu(-a) = a.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.checkpoint import pretrained
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.checkpoint.readers import ReadOptions, read_network
from apps.diffusion.models.build import load_weights
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.schedulers.noise_levels import prediction_kind


def warn_of_another_target(path: Path, scheduler: Any) -> None:
    """Warns if the network at `path` was trained with another prediction target than that of `scheduler`.

    Checkpoint files and model folders store no noise schedule and no target, so there is no warning for them.
    """
    folder = pretrained.locate(path)
    if not any((folder / name).exists() for name in ("checkpoints", pretrained.RECORD, "model_index.json")):
        return
    theirs, ours = (prediction_kind(each) for each in (open_network(folder).scheduler, scheduler))
    if theirs != ours:
        warnings.warn(
            f"--init {path}: its weights predict {theirs}, and this run trains {ours}, so the output layer starts from "
            "weights for another target. To keep the target, give --schedule.prediction or --schedule.kind.",
            stacklevel=3,
        )


# an argument of a network that the shapes of its tensors do not determine alone, and the flag of `train` that sets it
_FLAGS = {
    "in_channels": "--data.channels of a folder",
    "input_size": "--data.size of a folder",
    "patch_size": "--model.patch",
    "hidden_size": "--model.hidden",
    "num_heads": "--model.heads",
    "mlp_ratio": "--model.mlp-ratio",
    "learn_sigma": "--model.learn-sigma",
    "depth": "--model.depth",
    "pre": "--model.pre",
    "post": "--model.post",
    "condition_on_time": "--model.condition-on-time",
}


def initialize(model: DiT | FPDM, path: Path) -> DiT | FPDM:
    """Load the weights at `path` into a new network; returns the network that was read.

    Args:
        model: the new network; it keeps its own label table if the number of classes differs.
        path: a run, a model or pipeline folder, a network by name, or a checkpoint file in a published layout.

    Raises:
        ValueError: the weights cannot be read, or belong to a network of another architecture.
    """
    path = pretrained.locate(path)
    # a checkpoint file does not determine the number of heads and the grid of the position embedding
    unknown = ReadOptions(heads=model.config["num_heads"], input_size=model.latent[1:])
    try:
        source = read_network(path, unknown if path.is_file() else ReadOptions())
    except ValueError as error:
        raise ValueError(f"--init: {str(error).replace('--input-size', '--data.size')}") from None
    _check_architecture(model, source, path)
    weights: dict[str, Tensor] = dict(source.state_dict())
    if isinstance(source, DiT) and isinstance(model, FPDM):
        weights = _fixed_point_weights(model, source)
    own = {name: value for name, value in model.state_dict().items() if name.startswith("y_embedder")}
    if model.num_classes != source.num_classes:
        weights = {name: value for name, value in weights.items() if not name.startswith("y_embedder")} | own
    load_weights(model, weights, path)
    return source


def _check_architecture(model: DiT | FPDM, source: DiT | FPDM, path: Path) -> None:
    """Raises ValueError if an argument of `source` that changes its function differs from that of `model`; the message
    names the flags. Weights of equal shapes may belong to different networks: to other numbers of heads, to another
    grid of the position embedding.
    """
    if isinstance(source, FPDM) and isinstance(model, DiT):
        raise ValueError(f"--init {path} holds an FPDM, which cannot start a DiT; give a DiT, or --model.kind fpdm.")
    theirs, ours = _architecture(source), _architecture(model)
    shared = [name for name in _FLAGS if name in theirs and name in ours]
    if type(source) is not type(model) or path.is_file():  # a file does not determine condition_on_time
        shared = [name for name in shared if name != "condition_on_time"]
    if different := [name for name in shared if theirs[name] != ours[name]]:
        values = "; ".join(f"{n} is {theirs[n]} there and {ours[n]} in this run ({_FLAGS[n]})" for n in different)
        raise ValueError(f"--init {path} holds another network: {values}. Change the flags, or give other weights.")


def _architecture(network: DiT | FPDM) -> dict[str, Any]:
    return {**network.config, "input_size": network.latent[1:], "mlp_ratio": float(network.mlp_ratio)}


def _fixed_point_weights(model: FPDM, source: DiT) -> dict[str, Tensor]:
    """The tensors of an FPDM from those of a DiT."""
    pre, post, depth = len(model.blocks_pre), len(model.blocks_post), len(source.blocks)
    if depth <= pre + post:
        raise ValueError(
            f"A DiT of {depth} blocks has none left for the fixed-point layer of an FPDM with --model.pre {pre} and "
            f"--model.post {post}; lower one of the two."
        )
    numbers = {f"blocks_pre.{i}": i for i in range(pre)}
    numbers |= {"block_fixed_point": (pre + depth - post) // 2}
    numbers |= {f"blocks_post.{i}": depth - post + i for i in range(post)}
    given = source.state_dict()
    weights = {name: value for name, value in given.items() if not name.startswith("blocks.")}
    for target, number in numbers.items():
        stem = f"blocks.{number}."
        weights |= {f"{target}.{n.removeprefix(stem)}": value for n, value in given.items() if n.startswith(stem)}
    unit, zero = torch.eye(source.hidden_size), torch.zeros(2 * source.hidden_size)
    half = torch.cat([unit, unit], dim=1) / 2
    return weights | {
        "block_pre_projection.weight": unit,
        "block_pre_projection.bias": zero[: source.hidden_size],
        "block_fixed_point_projection_fc1.weight": torch.cat([half, -half]),
        "block_fixed_point_projection_fc1.bias": zero,
        "block_fixed_point_projection_fc2.weight": torch.cat([unit, -unit], dim=1),
        "block_fixed_point_projection_fc2.bias": zero[: source.hidden_size],
    }
