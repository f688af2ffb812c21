"""FPDM: a diffusion transformer whose middle is a fixed-point layer.

    x <- patches(x_t) + positions;     c = t_emb + y_emb;     o = c or y_emb alone (`condition_on_time`)
    x <- Block_pre(x, o)                                      `pre` blocks
    z*  solves  z = f(z),   f(z) = Block(fc2(gelu(fc1([z ; W_pre x]))), c)
    prediction = Final(Block_post(z*, o), o)                  `post` blocks

(Bai & Melas-Kyriazi, CVPR 2024, arXiv 2401.08741, sections 3 and 4.1.) With fc1's weight (A B) and bias b,
fc1([z ; W_pre x]) is A z + (B W_pre x + b). The term in brackets, and the block's modulation by c, do not depend on z
and are computed once per solve. Block, Final and the embeddings are those of layers.py. Shapes: x, z (B, T, D); c, o
(B, D).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from apps.diffusion.models import layers
from apps.diffusion.models.latent_transformer import LatentTransformer
from implicit import AbstractGrad, AbstractSolver, Picard, Solution, Stop, Unrolled, fixed_point

Start = Tensor | Callable[[Tensor], Tensor]
Penalty = Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor, Tensor, Tensor], Tensor]


class FPDM(LatentTransformer):
    """The fixed-point diffusion model: prediction = model(x, t, y).

    Args:
        pre: number of explicit blocks before the fixed-point layer.
        post: number of explicit blocks after the fixed-point layer.
        iterations: number of evaluations of f in a call without `iterations` and `stop`.
        condition_on_time: whether pre-blocks, post-blocks and output layer are conditioned on t_emb + y_emb; false: on
            y_emb only, as in the published training. The fixed-point layer is conditioned on t_emb + y_emb in both
            cases. In an unconditional model all blocks are conditioned on t_emb.

    The other arguments are those of `LatentTransformer`. `layers.initialize` sets the initial weights. State-dict keys
    are those of the published FPDM code.
    """

    # the complete network is one unit of sharding and device placement, because a solve calls the parts of a block and
    # not the block, where hooks of smaller units would be
    _no_split_modules: ClassVar[list[str]] = ["FPDM"]
    has_fixed_point: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        pre: int = 1,
        post: int = 1,
        iterations: int = 10,
        condition_on_time: bool = False,
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
        for name, value, least in (("pre", pre, 0), ("post", post, 0), ("iterations", iterations, 1)):
            if value < least:
                raise ValueError(f"{name}={value} is too small; give at least {least}.")
        self.iterations = iterations
        self.condition_on_time = condition_on_time
        self._compiled: Callable[..., Tensor] | None = None
        d = hidden_size
        self.blocks_pre = nn.ModuleList(layers.Block(d, num_heads, mlp_ratio) for _ in range(pre))
        self.block_pre_projection = nn.Linear(d, d)
        self.block_fixed_point_projection_fc1 = nn.Linear(2 * d, 2 * d)
        self.block_fixed_point_projection_fc2 = nn.Linear(2 * d, d)
        self.block_fixed_point = layers.Block(d, num_heads, mlp_ratio)
        self.blocks_post = nn.ModuleList(layers.Block(d, num_heads, mlp_ratio) for _ in range(post))
        layers.initialize(self)

    def forward(
        self,
        x: Float[Tensor, "B C H W"],
        t: Num[Tensor, "B"],
        y: Int[Tensor, "B"] | None = None,
        *,
        iterations: int | None = None,
        stop: Stop | None = None,
        solver: AbstractSolver[Any] | None = None,
        grad: AbstractGrad | None = None,
        start: Start | None = None,
        state: Any = None,
        keep_state: bool = False,
        trace: bool = False,
        penalty: Penalty | None = None,
        return_solution: bool = False,
    ) -> Tensor | tuple[Tensor, Solution] | tuple[Tensor, Solution, Tensor]:
        """The prediction for noisy latents `x` at times `t` with labels `y` (None: unconditional model).

        Args:
            iterations: exact number of evaluations of f, without a tolerance; None: the model's `iterations`.
            stop: stopping criterion, applied to each sample, instead of `iterations`; None: a fixed count.
            solver: solver of the fixed point; None: `implicit.Picard()`, the plain iteration.
            grad: gradient estimator; None: `implicit.Unrolled()`, the gradient through all iterations.
            start: start z of the solve, (B, T, D), such as the solution at the previous timestep, or a function that
                computes it from the output x of the pre-blocks; None: x.
            state: solver state of an earlier solution, from which the solver continues; None: a new state.
            keep_state: whether the solution holds the solver state.
            trace: whether the solution holds the residual of every evaluation.
            penalty: function (f, decode, x, solution, prediction) -> scalar, the third value of the result, if given.
            return_solution: whether to return (prediction, solution), with solution.value of shape (B, T, D).

        Raises:
            ValueError: a shape or label does not fit, labels are missing, or `iterations` and `stop` are both given.
        """
        stop = self._stop(iterations, stop)
        fresh, outer, injected, modulation = self._before(x, t, y)

        def decode(z: Tensor) -> Tensor:
            for block in self.blocks_post:
                z = self.checkpointed(block, z, outer)
            return self.output(z, outer)

        solution = fixed_point(
            self._iterate,
            self._start(start, fresh),
            injected,
            modulation,
            solver=Picard() if solver is None else solver,
            grad=Unrolled() if grad is None else grad,
            stop=stop,
            state=state,
            keep_state=keep_state,
            trace=trace,
        )
        prediction = decode(solution.value)
        if penalty is not None:
            f = partial(self._iterate, injected=injected, modulation=modulation)
            return prediction, solution, penalty(f, decode, fresh, solution.value, prediction)
        return (prediction, solution) if return_solution else prediction

    def fixed_point_problem(
        self, x: Float[Tensor, "B C H W"], t: Num[Tensor, "B"], y: Int[Tensor, "B"] | None = None
    ) -> tuple[Callable[..., Tensor], Float[Tensor, "B T D"], tuple[Tensor, Tensor]]:
        """(f, z0, args) of the fixed-point problem z = f(z, *args) in a call with these inputs; z0 is the output of the
        pre-blocks.
        """
        h, _, injected, modulation = self._before(x, t, y)
        return self._iterate, h, (injected, modulation)

    def prepare(
        self, x: Float[Tensor, "B T D"], c: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "B T 2*D"], Float[Tensor, "B 6*D"]]:
        """The terms of f that do not depend on z: B W_pre x + b, and the block's modulation by c."""
        fc1 = self.block_fixed_point_projection_fc1
        injected = F.linear(self.block_pre_projection(x), fc1.weight[:, self.hidden_size :], fc1.bias)
        return injected, self.block_fixed_point.modulation(c)

    def iteration(
        self,
        z: Float[Tensor, "B T D"],
        injected: Float[Tensor, "B T 2*D"],
        modulation: Float[Tensor, "B 6*D"],
    ) -> Float[Tensor, "B T D"]:
        """f(z), given the tensors of `prepare`, in the dtype of z also under autocast."""
        weight = self.block_fixed_point_projection_fc1.weight[:, : self.hidden_size]
        h = self.block_fixed_point_projection_fc2(layers.gelu(F.linear(z, weight) + injected)).to(z.dtype)
        return self.block_fixed_point.modulated(h, modulation)

    @torch.no_grad()
    def scale_recurrent_weights(self, factor: float) -> None:
        """Multiply A, the columns of fc1 that act on z, by `factor`; for the initialization of a new network.

        f depends on z through A z only, so df/dz is a product whose last factor is A. With a small factor, the
        iteration of a new network is a strong contraction, which training may weaken. With 0, f does not depend on z at
        first; the gradient in A is not zero there.
        """
        self.block_fixed_point_projection_fc1.weight[:, : self.hidden_size] *= factor

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block and f by torch.compile, whose `options` these are. The solver's loop is not compiled,
        because each change of its length would compile it again. State-dict keys stay the same; copies of the model are
        not compiled.
        """
        super().compile_blocks(**options)
        self._compiled = torch.compile(self.iteration, **options)

    def block_passes(self, iterations: int | None = None) -> int:
        """Evaluations of a transformer block in one call; an iteration counts as one, but costs more MACs (`macs`)."""
        return len(self.blocks_pre) + (iterations or self.iterations) + len(self.blocks_post)

    def macs(self, iterations: int | None = None, *, hoisted: bool = True) -> int:
        """Multiply-accumulates of one call for one sample.

        Args:
            iterations: number of iterations; None: the model's `iterations`.
            hoisted: whether the terms of `prepare` count once per solve, as computed here; false: in every iteration.
        """
        k = iterations or self.iterations
        d, td2 = self.hidden_size, self.tokens * self.hidden_size**2
        explicit = (len(self.blocks_pre) + len(self.blocks_post)) * self.block_macs() + td2
        invariant = 2 * td2 + 6 * d * d
        iteration = self.block_macs() + 6 * td2
        solve = k * (iteration - invariant) + invariant if hoisted else k * iteration
        return self.outer_macs() + explicit + solve

    def _before(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output of the pre-blocks, the condition o of the explicit blocks, and the two tensors of `prepare`."""
        h, t_emb, y_emb = self.embed(x, t, y)
        c = t_emb if y_emb is None else t_emb + y_emb
        outer = c if y_emb is None or self.condition_on_time else y_emb
        for block in self.blocks_pre:
            h = self.checkpointed(block, h, outer)
        return h, outer, *self.prepare(h, c)

    def _iterate(self, z: Tensor, injected: Tensor, modulation: Tensor) -> Tensor:
        return self.checkpointed(self._compiled or self.iteration, z, injected, modulation)

    def _stop(self, iterations: int | None, stop: Stop | None) -> Stop:
        if stop is None:
            count = self.iterations if iterations is None else iterations
            if count < 1:
                raise ValueError(f"iterations={count} leaves the fixed point unsolved; give at least 1.")
            return Stop(rtol=0.0, atol=0.0, max_evals=count, late=True)  # training never waits for the device
        if iterations is not None:
            raise ValueError("iterations and stop were both given; give one of them (see also Stop.max_evals).")
        return stop

    def _start(self, start: Start | None, fresh: Tensor) -> Tensor:
        if start is None:
            return fresh
        z = start(fresh) if callable(start) else start
        if z.shape != fresh.shape:
            raise ValueError(
                f"start has shape {tuple(z.shape)}; the fixed point has the shape {tuple(fresh.shape)}, which is "
                "(batch, tokens, hidden_size). Give a solution of this model for this batch."
            )
        return z.to(fresh.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without the compiled f, which is bound to this instance."""
        return {**super().__getstate__(), "_compiled": None}
