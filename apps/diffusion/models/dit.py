"""DiT, the diffusion transformer: the explicit baseline (Peebles & Xie 2023, arXiv 2212.09748).

    h <- patches(x) + positions;   c = t_emb + y_emb
    h <- Block_l(h, c)  for l = 1 ... depth
    prediction = Final(h, c)

Block, Final and the embeddings are those of layers.py.
"""

from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from apps.diffusion.models import layers
from apps.diffusion.models.latent_transformer import LatentTransformer


class DiT(LatentTransformer):
    """The diffusion transformer: prediction = model(x, t, y).

    Args:
        depth: number of blocks, at least 1. The other arguments are those of `LatentTransformer`.

    `layers.initialize` sets the initial weights. State-dict keys are those of the published DiT checkpoints.
    """

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(
            input_size=input_size,
            in_channels=in_channels,
            patch_size=patch_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )
        if depth < 1:
            raise ValueError(f"depth={depth} leaves a DiT without blocks; give at least 1.")
        self.blocks = nn.ModuleList(layers.Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        layers.initialize(self)

    def forward(
        self, x: Float[Tensor, "B C H W"], t: Num[Tensor, "B"], y: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B C_out H W"]:
        """The prediction for noisy latents `x` at times `t` with labels `y` (None: unconditional model).

        Raises:
            ValueError: a shape does not fit, a label is out of range, or labels are missing or superfluous.
        """
        h, t_emb, y_emb = self.embed(x, t, y)
        c = t_emb if y_emb is None else t_emb + y_emb
        for block in self.blocks:
            h = self.checkpointed(block, h, c)
        return self.output(h, c)

    def block_passes(self) -> int:
        """Number of transformer blocks in one call."""
        return len(self.blocks)

    def macs(self) -> int:
        """Multiply-accumulates of one call for one sample."""
        return self.outer_macs() + len(self.blocks) * self.block_macs()
