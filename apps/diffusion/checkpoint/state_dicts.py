"""The layouts of published state dicts: names of the tensors, and the network's sizes from their shapes.

    dit        the DiT repository (and fast-DiT):  blocks.{i}.attn.qkv.weight, ...
    fpdm       the FPDM repository:                blocks_pre.{i}..., block_fixed_point..., blocks_post.{i}...
    diffusers  diffusers' DiTTransformer2DModel:   transformer_blocks.{i}.attn1.to_q.weight, ...

Our classes `DiT` and `FPDM` use the names of the layouts dit and fpdm, so that their tensors need no renaming. The
shapes determine the hidden size D, depth, channels, patch size, classes and whether the variance is learned; they do
not determine the number of heads. diffusers splits qkv into three tensors and stores a copy of the time and label
embedders in every block.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from apps.diffusion.models.build import load_weights
from apps.diffusion.models.dit import DiT
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.models.layers import SIZES, position_embedding

Layout = Literal["dit", "fpdm", "diffusers"]
HEADS = {size.hidden_size: size.num_heads for size in SIZES.values()}

# diffusers' name: our name; {i} is the number of the block
_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_COPIED = {
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_TABLE = "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
_BLOCK = {
    "transformer_blocks.{i}.norm1.linear": "blocks.{i}.adaLN_modulation.1",
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn.proj",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.mlp.fc1",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.mlp.fc2",
}
_POSITIONS = "pos_embed.pos_embed"  # a buffer that some conversions to diffusers' layout store


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout that these tensors are in.

    Raises:
        ValueError: the layout is unknown.
    """
    prefixes: dict[str, Layout] = {"block_fixed_point.": "fpdm", "blocks.": "dit", "transformer_blocks.": "diffusers"}
    for prefix, layout in prefixes.items():
        if any(name.startswith(prefix) for name in tensors):
            return layout
    raise ValueError(
        f"These {len(tensors)} tensors ({', '.join(sorted(tensors)[:5])}{', ...' if len(tensors) > 5 else ''}) are in "
        "none of the layouts dit, fpdm and diffusers: there is no tensor named blocks.*, block_fixed_point.* or "
        "transformer_blocks.*. Give the checkpoint of a DiT or an FPDM."
    )


def network(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    input_size: tuple[int, int] | None = None,
    condition_on_time: bool = False,
) -> DiT | FPDM:
    """The network with these tensors, in the layout dit or fpdm; the shapes determine the network's sizes.

    Args:
        tensors: the state dict; the network holds these tensors, not copies, in their dtypes.
        heads: number of attention heads, which the shapes do not determine; None: that of the published network with
            the same hidden size (384: 6, 768: 12, 1024: 16, 1152: 16).
        input_size: height and width of the latent in pixels; None: a square.
        condition_on_time: FPDM only: whether the explicit blocks are conditioned on the time.

    Raises:
        ValueError: tensors are unknown, missing or misshapen (the message lists them all), or `heads` or `input_size`
            does not fit or is missing.
    """
    fixed_point = layout_of(tensors) == "fpdm"
    arguments = _sizes(tensors, fixed_point, heads, input_size)
    with torch.device("meta"):
        if fixed_point:
            pre, post = (_count(tensors, stem) for stem in ("blocks_pre", "blocks_post"))
            model = FPDM(**arguments, pre=pre, post=post, condition_on_time=condition_on_time)
        else:
            model = DiT(**arguments, depth=_count(tensors, "blocks"))
    load_weights(model, tensors, "the checkpoint", assign=True)
    return model


def from_diffusers(tensors: Mapping[str, Tensor], input_size: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of a diffusers DiT in the layout dit.

    Args:
        tensors: the state dict of a DiTTransformer2DModel.
        input_size: height and width of the latent in pixels, for the position embedding, which diffusers does
            not save.

    Raises:
        ValueError: tensors are unknown or missing (the message lists them all), or the copies of an embedder differ.
    """
    names = _names(_count(tensors, "transformer_blocks"))
    wanted = {name for theirs, _ in names.values() for name in theirs}
    unknown, missing = sorted(set(tensors) - wanted - {_POSITIONS}), sorted(wanted - set(tensors))
    if unknown or missing:
        listed = f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}"
        raise ValueError(f"The tensors are not those of diffusers' DiT ({listed}); give a complete checkpoint.")
    result: dict[str, Tensor] = {}
    for ours, (theirs, split) in names.items():
        first, *others = theirs
        for other in () if split else others:
            if not torch.equal(tensors[other], tensors[first]):
                raise ValueError(
                    f"{other} differs from {first}, but a DiT has one such embedder for all blocks. diffusers trained "
                    "each block's copy separately, and such weights cannot be converted."
                )
        result[ours] = torch.cat([tensors[name] for name in theirs]) if split else tensors[first]
    weight = result["x_embedder.proj.weight"]
    rows, columns = (side // weight.shape[-1] for side in input_size)
    computed = position_embedding(weight.shape[0], rows, columns).to(weight.dtype)
    result["pos_embed"] = tensors[_POSITIONS].reshape(1, -1, weight.shape[0]) if _POSITIONS in tensors else computed
    return result


def to_diffusers(model: DiT | FPDM) -> DiTTransformer2DModel:
    """A DiT as a diffusers model with the same weights, in evaluation mode.

    diffusers computes the time embedding with frequencies 10^(-4 k / 127) instead of DiT's 10^(-4 k / 128), and its
    configuration has no option for the frequencies. To get DiT's outputs, call `use_dit_frequencies` on the model each
    time it is loaded.

    Raises:
        ValueError: the network is an FPDM, or diffusers has no DiT of this kind.
    """
    channels, height, width = model.latent
    for impossible, why in (
        (not isinstance(model, DiT), "an FPDM has a fixed-point layer, and diffusers has no such model"),
        (model.num_classes == 0, "it is unconditional, and diffusers' DiT always has labels"),
        (height != width, f"its latents are {height} x {width}, and diffusers' DiT takes squares"),
        (model.mlp_ratio != 4, f"its mlp_ratio is {model.mlp_ratio}, and diffusers' DiT has 4"),
    ):
        if impossible:
            raise ValueError(f"This network cannot be written for diffusers: {why}. Write it with --to ours.")
    weights, heads = model.state_dict(), model.config["num_heads"]
    rows = height // model.patch_size
    computed = position_embedding(model.hidden_size, rows, rows).to(weights["pos_embed"])
    if not torch.allclose(weights["pos_embed"], computed, atol=1e-2 if computed.dtype.itemsize == 2 else 1e-4):
        raise ValueError(
            "This network cannot be written for diffusers: its pos_embed is not the sine-cosine embedding, the only "
            "one that diffusers has. Write the network with --to ours."
        )
    depth, held = _count(weights, "blocks"), {}
    for ours, (theirs, split) in _names(depth).items():
        values = weights[ours].chunk(3) if split else [weights[ours]] * len(theirs)
        held |= {name: v.clone() if theirs[1:] else v for name, v in zip(theirs, values, strict=True)}
    with torch.device("meta"):
        twin = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=model.hidden_size // heads,
            in_channels=channels,
            out_channels=model.out_channels,
            num_layers=depth,
            sample_size=height,
            patch_size=model.patch_size,
            num_embeds_ada_norm=model.num_classes,
            norm_eps=1e-6,
        )
    twin.load_state_dict(held, assign=True)
    twin.pos_embed.pos_embed = computed  # pyright: ignore[reportAttributeAccessIssue]
    return twin.eval()


def use_dit_frequencies(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Changes diffusers' DiT in place so that its time embedding has DiT's frequencies; returns the model."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # pyright: ignore
    return model


def _names(depth: int) -> dict[str, tuple[list[str], bool]]:
    """For each of our names: the names in diffusers, and whether diffusers splits our tensor among these names (q, k,
    v) instead of storing a copy under each name.
    """
    found: dict[str, tuple[list[str], bool]] = {}
    blocks = range(depth)
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": ([f"{theirs}.{kind}"], False) for theirs, ours in _OUTER.items()}
        for theirs, ours in _COPIED.items():
            found[f"{ours}.{kind}"] = [f"{theirs.format(i=i)}.{kind}" for i in blocks], False
        for i in blocks:
            for theirs, ours in _BLOCK.items():
                found[f"{ours.format(i=i)}.{kind}"] = [f"{theirs.format(i=i)}.{kind}"], False
            parts = [f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = parts, True
    return found | {"y_embedder.embedding_table.weight": ([_TABLE.format(i=i) for i in blocks], False)}


def _sizes(
    tensors: Mapping[str, Tensor], fixed_point: bool, heads: int | None, input_size: tuple[int, int] | None
) -> dict[str, Any]:
    """The constructor arguments that DiT and FPDM share."""
    fc1 = "block_fixed_point.mlp.fc1.weight" if fixed_point else "blocks.0.mlp.fc1.weight"
    needed = ("x_embedder.proj.weight", "pos_embed", fc1, "final_layer.linear.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(
            f"The sizes of the network cannot be determined, missing: {', '.join(missing)}. Give a complete checkpoint."
        )
    patches, positions, inner, last = (tensors[name] for name in needed)
    ranks = [tensors[name].ndim for name in needed]
    if ranks != [4, 3, 2, 2] or 0 in (*patches.shape, *positions.shape):
        shapes = [f"{name} {tuple(tensors[name].shape)}" for name in needed]
        raise ValueError(f"The shapes {', '.join(shapes)} are not those of a DiT or FPDM; give one of these.")
    hidden, channels, patch, _ = patches.shape
    outputs, remainder = divmod(last.shape[0], patch * patch)
    if remainder or outputs not in (channels, 2 * channels):
        raise ValueError(
            f"final_layer.linear.weight has {last.shape[0]} rows, but patches of {patch} x {patch} pixels in "
            f"{channels} channels need {channels * patch**2} rows, or twice as many with a learned variance; give the "
            "checkpoint of a DiT or an FPDM."
        )
    table = tensors.get("y_embedder.embedding_table.weight")
    return {
        "input_size": _input_size(positions, patch, input_size),
        "in_channels": channels,
        "patch_size": patch,
        "hidden_size": hidden,
        "num_heads": heads_of(hidden, heads),
        "mlp_ratio": inner.shape[0] / hidden,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": outputs == 2 * channels,
    }


def heads_of(hidden: int, heads: int | None) -> int:
    """The number of heads: `heads`, or if None that of the published network with this hidden size."""
    if heads is None and hidden not in HEADS:
        known = ", ".join(f"{size}: {count}" for size, count in HEADS.items())
        raise ValueError(
            f"The shapes do not determine the number of heads, and no published network has the hidden size {hidden} "
            f"({known}); give --heads."
        )
    return HEADS[hidden] if heads is None else heads


def _input_size(positions: Tensor, patch: int, given: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the latent in pixels: `given`, or if None a square.

    Raises:
        ValueError: the size does not have as many tokens as the position embedding, or the position embedding is the
            sine-cosine embedding of another grid.
    """
    tokens, hidden = positions.shape[1:]
    side = math.isqrt(tokens)
    if given is None and side * side != tokens:
        raise ValueError(f"pos_embed has {tokens} tokens, not a square number; give the latent's --input-size.")
    height, width = given or (side * patch, side * patch)
    if height % patch or width % patch or height * width != tokens * patch * patch:
        raise ValueError(
            f"--input-size {height} {width} does not make the {tokens} tokens of pos_embed with patches of {patch} x "
            f"{patch} pixels; leave it out for a square latent."
        )
    if positions.is_meta or hidden % 4:
        return height, width
    # a learned embedding equals the sine-cosine embedding of no grid, and is accepted without this check
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    grids.sort(key=lambda grid: grid != (height // patch, width // patch))
    for rows, columns in grids:
        if torch.allclose(positions.float(), position_embedding(hidden, rows, columns).to(positions.device), atol=1e-2):
            if (rows * patch, columns * patch) != (height, width):
                raise ValueError(
                    f"pos_embed is the embedding of a latent of {rows * patch} x {columns * patch} pixels, not of "
                    f"{height} x {width}; give --input-size {rows * patch} {columns * patch}."
                )
            break
    return height, width


def _count(names: Iterable[str], stem: str) -> int:
    """The number of blocks called `stem`.{number}.

    Raises:
        ValueError: a number is missing.
    """
    found = (re.match(rf"{re.escape(stem)}\.(\d+)\.", name) for name in names)
    numbers = {int(match[1]) for match in found if match}
    count = max(numbers, default=-1) + 1
    if len(numbers) < count:
        first = next(i for i in range(count) if i not in numbers)
        raise ValueError(
            f"There are tensors of {stem}.{count - 1} and none of {stem}.{first}; give a complete checkpoint."
        )
    return count
