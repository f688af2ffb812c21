"""Number of vjps in the backward solves of a training run, without a guess, with the last u, with a preconditioner.

    python -m benchmarks.gradients.warm_adjoint

IFT solves u = g + (df/dz)^T u in the backward pass, by products with the transposed Jacobian. Two networks are trained
from the same weights: a DEQ with an MLP on one fixed batch, where u of a sample changes little from step to step, and a
small FPDM on random noise and timesteps, where u differs in every step. The count of a step is that of the sample with
the most products, including the product that tests a guess; counts are summed over the steps.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import implicit
from apps.diffusion.models.fpdm import FPDM
from benchmarks.harness import provenance, write_result
from implicit import IFT, Adjoint, Solution, Stop

RESULT = Path(__file__).parents[1] / "results" / "warm_adjoint.json"
STOP = Stop(rtol=1e-4, max_evals=100)


class Products:
    """Records the number of products of every linear solve."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, solution: Solution) -> None:
        self.counts.append(int(solution.evals.max()))


def train_deq_mlp(steps: int, warm: bool, precondition: bool) -> dict[str, Any]:
    """Trains the network of `docs/deq_mlp.py`; the preconditioner is (I - mean J)^-1, computed once per step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = x.prod(dim=1, keepdim=True).sign()
    inject, head = nn.Linear(8, 32), nn.Linear(32, 1)
    mlp = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    products, inverse = Products(), torch.eye(32)
    grad = IFT(report=products, preconditioner=(lambda g: g @ inverse) if precondition else None)
    layer = implicit.DEQ(lambda z, u: torch.tanh(0.5 * mlp(z) + u), stop=STOP, grad=grad)
    parameters = [*inject.parameters(), *mlp.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    adjoint, loss = (Adjoint() if warm else None), torch.tensor(0.0)
    for _ in range(steps):
        solution = layer(torch.zeros(256, 32), inject(x), adjoint=adjoint)
        if precondition:
            inverse = _mean_inverse(mlp, solution.value.detach())
        loss = nn.functional.mse_loss(head(solution.value), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adjoint = solution.adjoint
    return {"products": sum(products.counts), "per step": products.counts, "loss": loss.item()}


@torch.no_grad()
def _mean_inverse(mlp: nn.Sequential, z: Tensor) -> Tensor:
    """(I - mean J)^-1, the mean over the batch, J = diag(1 - z^2) 0.5 W_2 diag(1 - h^2) W_1; rows g are multiplied by
    it.
    """
    first, last = (cast(nn.Linear, mlp[i]).weight for i in (0, 2))
    hidden = (1 - torch.tanh(mlp[0](z)).square()).mean(dim=0)
    jacobian = (1 - z.square()).mean(dim=0).unsqueeze(1) * (0.5 * (last * hidden) @ first)
    return torch.linalg.inv(torch.eye(z.shape[1]) - jacobian)


def train_fpdm(steps: int, warm: bool, fixed_batch: bool) -> dict[str, Any]:
    """Trains a small FPDM that predicts the noise of random images; with `fixed_batch`, images, noise and timesteps are
    the same in every step.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    products = Products()
    model = FPDM(input_size=8, in_channels=1, hidden_size=32, num_heads=2, num_classes=0, condition_on_time=True)
    model.scale_recurrent_weights(0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    adjoint, loss = (Adjoint() if warm else None), torch.tensor(0.0)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    noise = t = torch.empty(0)
    for step in range(steps):
        if step == 0 or not fixed_batch:
            noise, t = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 1000, (16,), generator=generator)
        share = (t / 1000).view(-1, 1, 1, 1)
        prediction, adjoint = _predict(model, (1 - share) * images + share * noise, t, IFT(report=products), adjoint)
        loss = nn.functional.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"products": sum(products.counts), "per step": products.counts, "loss": loss.item()}


def _predict(model: FPDM, x: Tensor, t: Tensor, grad: IFT, adjoint: Adjoint | None) -> tuple[Tensor, Adjoint | None]:
    """The forward pass of the model, with an initial guess for the backward solve."""
    h, c, _ = model.embed(x, t, None)
    for block in model.blocks_pre:
        h = block(h, c)
    solver = implicit.AndersonGS()
    solution = implicit.fixed_point(
        model.iteration, h, *model.prepare(h, c), solver=solver, grad=grad, stop=STOP, adjoint=adjoint
    )
    h = solution.value
    for block in model.blocks_post:
        h = block(h, c)
    return model.output(h, c), solution.adjoint


RUNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "deq_mlp, one batch: no guess": lambda n: train_deq_mlp(n, False, False),
    "deq_mlp, one batch: last u": lambda n: train_deq_mlp(n, True, False),
    "deq_mlp, one batch: preconditioner": lambda n: train_deq_mlp(n, False, True),
    "deq_mlp, one batch: both": lambda n: train_deq_mlp(n, True, True),
    "FPDM, one batch: no guess": lambda n: train_fpdm(n, False, True),
    "FPDM, one batch: last u": lambda n: train_fpdm(n, True, True),
    "FPDM, fresh noise: no guess": lambda n: train_fpdm(n, False, False),
    "FPDM, fresh noise: last u": lambda n: train_fpdm(n, True, False),
}


def main() -> None:
    """Make all runs and write the result file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="training steps of each run")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file")
    options = parser.parse_args()
    runs = {name: run(options.steps) for name, run in RUNS.items()}
    for name, run in runs.items():
        print(f"{name:36} products {run['products']:5}   last loss {run['loss']:.5f}")
    write_result(options.out, {"provenance": provenance("cpu"), "steps": options.steps, "runs": runs})


if __name__ == "__main__":
    main()
