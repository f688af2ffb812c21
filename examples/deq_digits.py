"""A deep equilibrium classifier of handwritten digits: one block at its fixed point.

    z* = f(z*, u) = norm(u + W_2 gelu(W_1 z* + b)),    u = U x,    logits = V z*

The gradient is exact (IFT), and its memory does not grow with the number of iterations. The Jacobian penalty keeps the
fixed point easy to solve. Each image stops when its own residual meets the tolerance. Bai, Kolter and Koltun, "Deep
Equilibrium Models", NeurIPS 2019, arXiv 1909.01377; penalty: Bai, Koltun and Kolter, ICML 2021, arXiv 2106.14342.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from implicit import DEQ, Solution, Stop
from implicit.diagnostics import jacobian_penalty, spectral_radius


class Block(nn.Module):
    """f(z, u) on (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.norm(u + self.mlp(z))


class Classifier(nn.Module):
    """Maps images (B, 64) to logits (B, 10), u (B, width) and the `Solution`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inject, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.deq = DEQ(Block(width), stop=Stop(rtol=1e-4, max_evals=50))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Solution]:
        u = self.inject(x)
        found = self.deq(torch.zeros_like(u), u, trace=not self.training)
        return self.head(found.value), u, found


def train(model: Classifier, x: Tensor, y: Tensor, steps: int, penalty: float, generator: torch.Generator) -> None:
    """Adam on batches of 64 images; the learning rate falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        logits, u, found = model(x[rows])
        size = jacobian_penalty(model.deq.f, found.value.detach(), u, generator=generator).mean()
        loss = nn.functional.cross_entropy(logits, y[rows])
        optimizer.zero_grad()
        (loss + penalty * size).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, {found.evals.float().mean():.1f} evaluations")


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="A deep equilibrium classifier of handwritten digits.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 64 images")
    parser.add_argument("--penalty", type=float, default=1.0, help="weight of the Jacobian penalty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file for a figure of residuals and evaluations of the held-out images")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32)[order], torch.tensor(digits)[order]
    model = Classifier()
    train(model, x[:1500], y[:1500], args.steps, args.penalty, torch.Generator().manual_seed(args.seed))
    model.eval()
    with torch.no_grad():
        logits, u, found = model(x[1500:])
    right = float((logits.argmax(1) == y[1500:]).float().mean())
    converged, evals = float(found.converged.float().mean()), found.evals
    radius = float(spectral_radius(model.deq.f, found.value[:64], u[:64]).median())
    print(f"{right:.1%} of {len(logits)} held-out digits right, {converged:.1%} converged")
    print(f"{evals.float().mean():.1f} evaluations an image, from {evals.min()} to {evals.max()}")
    print(f"median spectral radius of df/dz {radius:.2f}")
    if args.figure:
        figure, (left, middle) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        left.semilogy(found.trace[:, :100], "C0", lw=0.5)
        left.set(xlabel="evaluations of f", ylabel="residual of 100 images")
        middle.hist(evals, bins=range(int(evals.max()) + 2), align="left")
        middle.set(xlabel="evaluations until converged", ylabel="images")
        figure.savefig(args.figure, dpi=80)
    return {"right": right, "converged": converged, "radius": radius}


if __name__ == "__main__":
    main()
