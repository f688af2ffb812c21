"""The networks and steps that `run.py` measures and `test_diffusion.py` checks: DiT, FPDM, and their peers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchdeq import get_deq

from apps.diffusion.checkpoint.state_dicts import to_diffusers
from apps.diffusion.models import FPDM, DiT
from benchmarks.diffusion import reference_fpdm as plain_fpdm
from implicit import IFT, JFB, AbstractGrad, Phantom, Reversible, Stop, Unrolled

N = TypeVar("N", bound=nn.Module)
Step = Callable[[], Any]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of networks and batch, and the device. Latents are 4 x side x side, patches 2 x 2."""

    hidden: int = 256
    heads: int = 4
    side: int = 16
    depth: int = 28
    batch: int = 16
    precision: str = "fp32"
    device: str = "cpu"


CPU = Scale()
"""Hidden size 256, 64 tokens, batch 16: a step takes seconds on one core."""
XL = Scale(hidden=1152, heads=16, side=32, batch=8, device="cuda")
"""DiT-XL/2 and FPDM-XL/2 at 256 x 256 pixels."""


def draw_weights(network: N) -> N:
    """Sets all weights of the network to random numbers, so that no layer is the identity. At hidden size 256 the
    fixed-point layer then contracts like a trained layer: relative residual 0.2 after 3 iterations, 0.06 after 5, 0.002
    after 10.
    """
    device = next(network.parameters()).device
    source = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            numbers = torch.randn(p.shape, generator=source, device=device)
            p.copy_(numbers * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    return network


def dit(scale: Scale, *, checkpointing: bool = False) -> DiT:
    with torch.device(scale.device):
        network = DiT(
            input_size=scale.side, hidden_size=scale.hidden, num_heads=scale.heads, depth=scale.depth, learn_sigma=True
        )
    return _ready(draw_weights(network), scale, checkpointing)


def fpdm(scale: Scale, *, checkpointing: bool = False) -> FPDM:
    with torch.device(scale.device):
        network = FPDM(input_size=scale.side, hidden_size=scale.hidden, num_heads=scale.heads, learn_sigma=True)
    return _ready(draw_weights(network), scale, checkpointing)


def diffusers_dit(scale: Scale, *, checkpointing: bool = False) -> nn.Module:
    """diffusers' DiT with the weights of `dit(scale)`."""
    return _ready(to_diffusers(dit(scale)), scale, checkpointing)


def _ready(network: N, scale: Scale, checkpointing: bool) -> N:
    if checkpointing:
        network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]: diffusers' models have it
    return network if scale.device == "cpu" else network.to(scale.device)


def inputs(scale: Scale) -> Inputs:
    """Noisy latents, times and labels."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(scale.batch, 4, scale.side, scale.side, generator=source)
    t = torch.randint(1000, (scale.batch,), generator=source)
    y = torch.randint(1000, (scale.batch,), generator=source)
    return x.to(scale.device), t.to(scale.device), y.to(scale.device)


def training(network: nn.Module, predict: Callable[[], Tensor], scale: Scale) -> Step:
    """Forward pass, mean squared output, backward pass; without the optimizer's step, which is the same for all."""

    def step() -> None:
        network.zero_grad(set_to_none=False)
        with torch.autocast(scale.device, torch.bfloat16, enabled=scale.precision == "bf16"):
            loss = predict().float().square().mean()
        loss.backward()

    return step


def sampling(predict: Callable[[], Tensor], scale: Scale) -> Step:
    """One evaluation of the network without a graph."""

    def step() -> Tensor:
        with torch.no_grad(), torch.autocast(scale.device, torch.bfloat16, enabled=scale.precision == "bf16"):
            return predict()

    return step


def plainly(network: FPDM, batch: Inputs, free: int, tracked: int) -> Callable[[], Tensor]:
    """The prediction of the plainly written FPDM (reference_fpdm.py)."""
    return lambda: plain_fpdm.step(network, *batch, free=free, tracked=tracked)


def ours(network: FPDM, batch: Inputs, iterations: int, grad: AbstractGrad | None = None) -> Callable[[], Tensor]:
    """The prediction of our FPDM with `iterations` evaluations before those of the estimator."""
    return lambda: network(*batch, iterations=iterations, grad=grad)


def draw(network: FPDM, batch: Inputs, n: int, m: int) -> Callable[[], Tensor]:
    """The prediction of our FPDM with S-JFB, for the draw (n, m)."""
    if n == 0:
        return ours(network, batch, m, Unrolled())
    return ours(network, batch, n, JFB(m))


def layer(network: FPDM, batch: Inputs) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The fixed-point layer of this batch without a graph: f and the start z0."""
    x, t, y = batch
    with torch.no_grad():
        h, t_emb, y_emb = _front(network, x, t, y)
        prepared = network.prepare(h, t_emb + y_emb)
    return lambda z: network.iteration(z, *prepared), h


def _front(network: FPDM, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output of the blocks before the fixed-point layer, t_emb and y_emb."""
    h, t_emb, y_emb = network.embed(x, t, y)
    assert y_emb is not None
    for block in network.blocks_pre:
        h = block(h, y_emb)
    return h, t_emb, y_emb


def solved_by(network: FPDM, batch: Inputs, solve: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """The prediction of an FPDM whose fixed point is `solve(f, z0)`."""

    def predict() -> Tensor:
        h, t_emb, y_emb = _front(network, *batch)
        prepared = network.prepare(h, t_emb + y_emb)
        iteration = network._compiled or network.iteration
        z = solve(lambda z: iteration(z, *prepared), h)
        for block in network.blocks_post:
            z = block(z, y_emb)
        return network.output(z, y_emb)

    return predict


def floor(network: FPDM, batch: Inputs, iterations: int) -> Callable[[], Tensor]:
    """The prediction by a bare loop, which takes the time of the blocks and iterations only."""

    def solve(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        for _ in range(iterations):
            z = f(z)
        return z

    return solved_by(network, batch, solve)


def captured(step: Step) -> Step:
    """The step as a replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def by_torchdeq(iterations: int, **options: Any) -> Callable[..., Tensor]:
    """torchdeq's solve with exactly `iterations` evaluations before those of its gradient."""
    deq = get_deq(f_max_iter=iterations, f_tol=0.0, **options)
    return lambda f, z0: deq(f, z0)[0][-1]


BUDGET = 12  # number of evaluations before those of the estimator; equal to N of the paper's S-JFB
BACKWARD = Stop(rtol=1e-3, atol=0, max_evals=BUDGET)

ESTIMATORS: dict[str, tuple[int, AbstractGrad]] = {
    "S-JFB (6, 7), the expected draw": (6, JFB(7)),
    "S-JFB (12, 12), the worst draw": (12, JFB(12)),
    "JFB": (BUDGET, JFB()),
    "IFT": (BUDGET, IFT(stop=BACKWARD, on_failure="ignore")),
    "Phantom": (BUDGET, Phantom()),
    "Reversible": (BUDGET + 1, Reversible(on_drift="ignore")),
    "Unrolled": (BUDGET + 1, Unrolled()),
}
"""Evaluations before those of the estimator, and the estimator. In the forward pass each takes 12 or 13 evaluations,
and Phantom 17. The draws (n, m) of S-JFB are (6, 6.5) on average and at most (12, 12).
"""

TORCHDEQ: dict[str, dict[str, Any]] = {
    "JFB": {"grad": 1},
    "Phantom": {"grad": 5, "tau": 0.5},
    "IFT": {"ift": True, "b_max_iter": BUDGET, "b_tol": 1e-3, "b_stop_mode": "rel"},
}
"""torchdeq's options for those of our estimators that torchdeq has too."""
