"""An ensemble of equilibrium networks trained together by `torch.func.vmap` over the weights of a fixed-point layer.

Each of E networks has its own weights theta_e and its own fixed points

    z* = f_theta(z*, x) = tanh(x U + b + 0.5 z* W),    logits = z* V,

and one call, vmap(grad(loss)), gives all E gradients by the implicit function theorem. The program checks that they
equal those of E separate calls of autograd. Every member has its own batches; the ensemble averages probabilities
(Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017,
arXiv 1612.01474).
"""

import argparse
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import grad, vmap

from implicit import Picard, Stop, fixed_point

Weights = dict[str, Tensor]
STOP = Stop(rtol=1e-5, max_evals=100)


def weights(members: int, width: int, generator: torch.Generator) -> Weights:
    """Random weights, with one row per member."""
    shapes = {"U": (64, width), "b": (width,), "W": (width, width), "V": (width, 10)}
    found = {}
    for name, shape in shapes.items():
        found[name] = torch.randn(members, *shape, generator=generator) / shape[0] ** 0.5
    return found


def layer(z: Tensor, u: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(u + 0.5 * z @ w)


def logits(theta: Weights, x: Tensor) -> Tensor:
    """(B, 10) of one member."""
    u = x @ theta["U"] + theta["b"]
    return fixed_point(layer, torch.zeros_like(u), u, theta["W"], solver=Picard(), stop=STOP).value @ theta["V"]


def loss(theta: Weights, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(theta, x), y)


def one_by_one(theta: Weights, x: Tensor, y: Tensor) -> Weights:
    """The gradients of all members by autograd, computed one after another."""
    rows = []
    for e in range(len(x)):
        leaves = {name: value[e].clone().requires_grad_() for name, value in theta.items()}
        rows.append(torch.autograd.grad(loss(leaves, x[e], y[e]), list(leaves.values())))
    return dict(zip(theta, map(torch.stack, zip(*rows, strict=True)), strict=True))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="An ensemble of equilibrium networks under torch.func.vmap.")
    parser.add_argument("--members", type=int, default=8, help="networks in the ensemble")
    parser.add_argument("--steps", type=int, default=150, help="training steps, 32 images for each member")
    parser.add_argument("--width", type=int, default=32, help="numbers in a state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file for a figure of the accuracy of members and ensemble")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(args.seed)
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32)[order], torch.tensor(digits)[order]
    theta = weights(args.members, args.width, rng)
    gradients = vmap(grad(loss))
    velocity = {name: torch.zeros_like(value) for name, value in theta.items()}
    seconds, error = {"vmap": 0.0, "one by one": 0.0}, 0.0
    for step in range(args.steps):
        rows = torch.randint(0, 1500, (args.members, 32), generator=rng)
        begin = time.process_time()
        slopes = gradients(theta, x[rows], y[rows])
        seconds["vmap"] += time.process_time() - begin
        if step % 50 == 0:  # compare with autograd, one member after another
            begin = time.process_time()
            single = one_by_one(theta, x[rows], y[rows])
            seconds["one by one"] += time.process_time() - begin
            for name, value in slopes.items():
                error = max(error, float((value - single[name]).norm() / single[name].norm()))
        # gradient descent with momentum
        velocity = {name: 0.9 * velocity[name] + slopes[name] for name in theta}
        theta = {name: theta[name] - 0.05 * (1 - step / args.steps) * velocity[name] for name in theta}
    with torch.no_grad():
        outputs = vmap(logits, in_dims=(0, None))(theta, x[1500:])
    members = (outputs.argmax(-1) == y[1500:]).float().mean(1)
    together = float((outputs.softmax(-1).mean(0).argmax(-1) == y[1500:]).float().mean())
    ratio = seconds["one by one"] / ((args.steps + 49) // 50) / (seconds["vmap"] / args.steps)
    print(f"gradients of all members: {error:.1e} from those one by one, which take {ratio:.1f} times as long")
    print(f"held-out accuracy: members {members.mean():.1%} ({members.min():.1%} to {members.max():.1%}), ", end="")
    print(f"ensemble {together:.1%}")
    if args.figure:
        figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
        ax.bar([f"{e + 1}" for e in range(len(members))], 100 * members, label="member")
        ax.axhline(100 * together, color="C1", label="ensemble")
        ax.set(ylabel="% of held-out digits right", ylim=(float(members.min()) * 100 - 3, 100))
        ax.legend(loc="lower right")
        figure.savefig(args.figure, dpi=80)
    return {"members": float(members.mean()), "ensemble": together, "error": error}


if __name__ == "__main__":
    main()
