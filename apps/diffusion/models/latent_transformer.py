"""Base class of DiT and FPDM: embeddings, output layer, and checks of the inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from apps.diffusion.files.hashing import check_model_checksums, write_model_checksums
from apps.diffusion.models import layers

# kernel of attention -> whether it is allowed, by `sdpa_kernel` for example
_KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


class LatentTransformer(ModelMixin, ConfigMixin):
    """Abstract base class of networks on latent images, without the transformer blocks.

    A subclass adds the blocks, calls `layers.initialize(self)` and defines `forward`, `block_passes` and `macs`.
    `pos_embed` is a persistent buffer: it is not trained, but state dicts contain it, as in the published checkpoints.

    Args:
        input_size: height and width of the latent in pixels; an int for a square. Multiples of `patch_size`.
        in_channels: C, the latent's channels.
        patch_size: side of a patch in pixels; T = (H / patch_size)(W / patch_size) tokens.
        hidden_size: D, a multiple of `num_heads` and of 4. `layers.SIZES` has the published sizes.
        num_heads: number of attention heads.
        mlp_ratio: inner size of a block's MLP, divided by D.
        num_classes: number of classes; labels are 0 ... num_classes - 1, and the label num_classes is the null class.
            0: the model is unconditional.
        learn_sigma: predict 2C channels, of which the second C are the variance's interpolation coefficient.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    has_fixed_point: ClassVar[bool] = False
    """Whether a call solves for a fixed point and takes the options of a solve."""

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        learn_sigma: bool,
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        check_image(height, width, in_channels, patch_size)
        check_width(hidden_size, num_heads, mlp_ratio)
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is negative; give 0 for an unconditional model.")
        self.latent = (in_channels, height, width)
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.mlp_ratio = mlp_ratio
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.x_embedder = layers.PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size) if num_classes else None
        positions = layers.position_embedding(hidden_size, height // patch_size, width // patch_size)
        self.register_buffer("pos_embed", positions)
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, self.out_channels)

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The network in a folder that `save_pretrained` wrote; `options` are those of diffusers.

        Raises:
            ValueError: tensors are missing, which diffusers would leave undefined, or unknown, or a file of a local
                folder has changed since it was written.
        """
        with_info = options.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(source, **options, output_loading_info=True)
        model, info = loaded
        kinds = {"missing": "missing_keys", "unknown": "unexpected_keys", "misshapen": "mismatched_keys"}
        wrong = [f"{what}: {', '.join(map(str, info[key][:5]))}" for what, key in kinds.items() if info[key]]
        if wrong:
            raise ValueError(
                f"The weights in {source} are not those of this {cls.__name__} ({'; '.join(wrong)}); save or download "
                "the network again."
            )
        folder = Path(source, options.get("subfolder") or "")
        if folder.is_dir():  # not a name on the hub
            check_model_checksums(folder)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **options: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder of the network, with the SHA-256 of its files; `options` are those of diffusers."""
        super().save_pretrained(save_directory, is_main_process, **options)
        if is_main_process:
            write_model_checksums(Path(save_directory))

    @property
    def null_class(self) -> int | None:
        """The label of the null class, for a prediction without a label; None for an unconditional model."""
        return self.num_classes or None

    @property
    def tokens(self) -> int:
        """T, the number of tokens of one sample."""
        _, height, width = self.latent
        return height * width // self.patch_size**2

    def embed(
        self, x: Float[Tensor, "B C H W"], t: Num[Tensor, "B"], y: Int[Tensor, "B"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"], Float[Tensor, "B D"] | None]:
        """The tokens with position embeddings, t_emb, and y_emb (None for an unconditional model).

        Raises:
            ValueError: a shape does not fit, a label is out of range, or labels are missing or superfluous.
        """
        check_inputs(x, t, y, latent=self.latent, num_classes=self.num_classes)
        h = self.x_embedder(x) + self.pos_embed
        return h, self.t_embedder(t), None if self.y_embedder is None else self.y_embedder(y)

    def output(self, h: Float[Tensor, "B T D"], c: Float[Tensor, "B D"]) -> Float[Tensor, "B C_out H W"]:
        """The output layer, with the patches assembled to an image."""
        _, height, width = self.latent
        return layers.unpatchify(self.final_layer(h, c), height, width, self.patch_size)

    def checkpointed(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """function(*args); with gradient checkpointing, the backward pass computes the activations again, and attention
        by the kernels that are allowed now: a Jacobian penalty, for example, allows the unfused one alone.
        """
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return function(*args)
        kernels = [kernel for kernel, allowed in _KERNELS.items() if allowed()]

        def run(*args: Tensor) -> Tensor:
            with sdpa_kernel(kernels):
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block by torch.compile, whose `options` these are. State-dict keys stay the same."""
        for module in self.modules():
            if isinstance(module, layers.Block):
                module.compile(**options)

    def block_macs(self) -> int:
        """Multiply-accumulates of one block for one sample: projections, MLP, attention, modulation."""
        d, inner, tokens = self.hidden_size, int(self.hidden_size * self.mlp_ratio), self.tokens
        return tokens * (4 * d * d + 2 * d * inner) + 2 * tokens * tokens * d + 6 * d * d

    def outer_macs(self) -> int:
        """Multiply-accumulates of the embeddings and the output layer for one sample."""
        d, area = self.hidden_size, self.patch_size**2
        patches = self.tokens * area * (self.latent[0] + self.out_channels) * d
        return patches + layers.FREQUENCIES * d + d * d + 2 * d * d


def check_image(height: int, width: int, channels: int, patch_size: int) -> None:
    """Raises ValueError if a latent image cannot be cut into patches."""
    if channels < 1:
        raise ValueError(f"in_channels={channels} must be at least 1.")
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"input_size={height} x {width} cannot be cut into patches of patch_size={patch_size}; choose a "
            "patch size that divides both sides."
        )


def check_width(hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
    """Raises ValueError if heads or position embedding cannot divide the hidden size, or if an MLP has no width."""
    if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads or hidden_size % 4:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads} and of 4 (the position "
            "embedding holds a sine and a cosine for each of two axes)."
        )
    if mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio={mlp_ratio} must be positive; 4 is usual.")
    if int(hidden_size * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} gives an MLP of width 0 for hidden_size={hidden_size}; 4 is usual.")


def check_inputs(x: Tensor, t: Tensor, y: Tensor | None, *, latent: tuple[int, int, int], num_classes: int) -> None:
    """Raises ValueError if the inputs do not fit a model for latents of shape `latent` = (C, H, W).

    The range of `y` is checked on the CPU only. On an accelerator the check would wait for the device at every call,
    and the kernel of the embedding raises for an id out of range.
    """
    if x.ndim != 4 or tuple(x.shape[1:]) != latent:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but this model was built for (batch, {latent[0]}, {latent[1]}, "
            f"{latent[2]}); resize the input, or build the model with its in_channels and input_size."
        )
    if t.shape != x.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)}; give one time per sample, shape ({x.shape[0]},).")
    if num_classes == 0:
        if y is not None:
            raise ValueError("y was given to an unconditional model (num_classes=0); leave y out.")
        return
    if y is None:
        raise ValueError(
            f"y is missing: this model is conditional. Give class ids from 0 to {num_classes - 1}, or the "
            f"null class {num_classes} for an unconditional prediction."
        )
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(
            f"y is {y.dtype} of shape {tuple(y.shape)}; give one integer per sample, shape ({x.shape[0]},)."
        )
    plain = type(y) is Tensor  # a subclass such as FakeTensor has no values to check
    if plain and y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in y.aminmax())
        if low < 0 or high > num_classes:
            raise ValueError(
                f"y holds class ids from {low} to {high}; this model has 0 to {num_classes - 1}, and "
                f"{num_classes} for the null class."
            )
