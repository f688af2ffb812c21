"""An implicit graph network on chains: every node predicts a class that only the first node's features show.

Nodes v carry features x_v and edges (v, w) carry messages; A is the adjacency matrix, ||A||_2 <= 1. The states are

    Z = tanh(kappa A Z W + X U + b),    ||W||_2 = 1,  kappa < 1,

a contraction for every W, so there is exactly one fixed point, and information crosses the whole graph. The rows of Z
are coupled, so the state of all nodes is one system, ``batch_dims=0``. The data are directed chains of two classes, and
only the first node has features. In a network of T iterations, nodes from the T-th edge on get no information, and such
a network can only guess there. Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020, arXiv 2009.06211, equation 2
and section 6 (chains).
"""

import argparse
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from implicit import Picard, Solution, Stop, Unrolled, fixed_point


@dataclass(frozen=True)
class Chains:
    """Edges source -> target (E,), features (nodes, 8), labels (nodes,), position in the chain (nodes,)."""

    source: Tensor
    target: Tensor
    features: Tensor
    labels: Tensor
    place: Tensor


def chains(count: int, length: int, rng: torch.Generator) -> Chains:
    """`count` chains of `length` nodes; the first node has a feature +1 (class 0) or -1 (class 1), and noise."""
    place = torch.arange(length).repeat(count)
    target = torch.nonzero(place > 0).flatten()
    labels = torch.arange(count) % 2
    first = 0.3 * torch.randn(count, 8, generator=rng)
    first[:, 0] += 1.0 - 2.0 * labels
    features = torch.zeros(count * length, 8)
    features[place == 0] = first
    return Chains(target - 1, target, features, labels.repeat_interleave(length), place)


class GraphNetwork(nn.Module):
    """Logits of all nodes from the fixed point, or from `cut` iterations from zero if `cut` is not 0."""

    def __init__(self, cut: int, width: int = 16, kappa: float = 0.98) -> None:
        super().__init__()
        mix = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(mix.weight)
        self.mix, self.inject, self.head = spectral_norm(mix), nn.Linear(8, width), nn.Linear(width, 2)
        self.cut, self.kappa = cut, kappa

    def forward(self, graph: Chains) -> tuple[Tensor, Solution]:
        u = self.inject(graph.features)
        mix = self.mix(torch.eye(u.shape[1]))  # W, read once: spectral_norm updates its estimate at every use

        def f(z: Tensor, u: Tensor) -> Tensor:
            messages = torch.zeros_like(z).index_add(0, graph.target, z[graph.source])
            return torch.tanh(self.kappa * messages @ mix + u)

        z0 = torch.zeros_like(u)
        if self.cut:
            stop = Stop(rtol=0, atol=0, max_evals=self.cut)
            found = fixed_point(f, z0, u, solver=Picard(), grad=Unrolled(), stop=stop, batch_dims=0)
        else:
            found = fixed_point(f, z0, u, solver=Picard(), stop=Stop(rtol=1e-5, max_evals=200), batch_dims=0)
        return self.head(found.value), found


def train(model: GraphNetwork, graph: Chains, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(graph)[0], graph.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="An implicit graph network on chains, and short explicit networks.")
    parser.add_argument("--length", type=int, default=50, help="nodes of a chain")
    parser.add_argument("--chains", type=int, default=40, help="number of training chains, and of test chains")
    parser.add_argument("--steps", type=int, default=60, help="training steps, each on all chains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="file for a figure of the accuracy along the chain")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(args.seed)
    seen, unseen = chains(args.chains, args.length, rng), chains(args.chains, args.length, rng)
    scores, figure = {}, plt.figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for cut in (5, 20, 0):
        torch.manual_seed(args.seed)
        model = GraphNetwork(cut)
        train(model, seen, args.steps)
        with torch.no_grad():
            logits, found = model(unseen)
        right = (logits.argmax(1) == unseen.labels).float()
        name = f"{cut} iterations" if cut else "fixed point"
        scores[name] = float(right.mean())
        print(f"{name}: {scores[name]:.1%} of the nodes of unseen chains right", end="")
        if cut:
            print(f"; with no information beyond, at best {0.5 + cut / args.length / 2:.1%} expected")
        else:
            print(f"; {int(found.check().evals)} evaluations to a residual of 1e-5")
        axes.plot(right.view(-1, args.length).mean(0), label=name)
    if args.figure:
        axes.set(xlabel="edges from the node with features", ylabel="share of nodes right")
        axes.legend()
        figure.savefig(args.figure, dpi=80)
    plt.close(figure)
    return scores


if __name__ == "__main__":
    main()
