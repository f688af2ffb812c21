"""An implicit graph network: digits classified from a few labels on a graph of neighbors.

Nodes are the 1797 images, edges join nearest neighbors, A = D^-1/2 (G + G^T) D^-1/2. The state of all nodes is

    Z = tanh(kappa A Z W + X B),    ||A||_2 <= 1, ||W||_2 = 1, kappa < 1,

so f is a contraction for every W, and a label reaches nodes at any distance. Rows are coupled: the whole state is one
system, ``batch_dims=0``. Beside it: the same network cut off after few iterations, and a linear model without a graph.
Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020, arXiv 2009.06211, equation 2.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from implicit import Picard, Solution, Stop, Unrolled, fixed_point

TIGHT = Stop(rtol=1e-5, max_evals=300)


class GraphNetwork(nn.Module):
    """Logits of all nodes; `cut` iterations from zero, or the fixed point where it is 0."""

    def __init__(self, adjacency: Tensor, features: int, width: int, cut: int, kappa: float) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.mix, self.inject = nn.Linear(width, width, bias=False), nn.Linear(features, width)
        nn.init.orthogonal_(self.mix.weight)
        self.mix, self.head = spectral_norm(self.mix), nn.Linear(width, 10)
        self.cut, self.kappa = cut, kappa

    def step(self, z: Tensor, u: Tensor, mix: Tensor) -> Tensor:
        return torch.tanh(self.kappa * self.adjacency @ z @ mix + u)

    def forward(self, x: Tensor) -> tuple[Tensor, Solution]:
        u, mix = self.inject(x), self.mix.weight.T
        z0 = torch.zeros_like(u)
        if self.cut:
            stop = Stop(rtol=0, atol=0, max_evals=self.cut)
            found = fixed_point(self.step, z0, u, mix, solver=Picard(), grad=Unrolled(), stop=stop, batch_dims=0)
        else:
            found = fixed_point(self.step, z0, u, mix, stop=TIGHT, batch_dims=0)
        return self.head(found.value), found


def neighbors(x: Tensor, k: int) -> Tensor:
    """A: symmetric, (n, n), of the k nearest neighbors of each node and itself."""
    graph = torch.from_numpy(kneighbors_graph(x.numpy(), k, include_self=True).toarray()).float()
    graph = torch.maximum(graph, graph.T)
    scale = graph.sum(1).rsqrt()
    return scale[:, None] * graph * scale


def train(model: nn.Module, x: Tensor, y: Tensor, labeled: Tensor, steps: int) -> tuple[float, Solution | None]:
    """Accuracy on the nodes without a label, and the last solve."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
    for _ in range(steps):
        out = model(x)
        logits = out[0] if isinstance(out, tuple) else out
        loss = nn.functional.cross_entropy(logits[labeled], y[labeled])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        out = model(x)
    logits, found = out if isinstance(out, tuple) else (out, None)
    right = (logits.argmax(1) == y).float()
    right[labeled] = torch.nan
    return float(right.nanmean()), found


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="An implicit graph network on digits with few labels.")
    parser.add_argument("--labels", type=int, default=5, help="labeled images of each digit")
    parser.add_argument("--steps", type=int, default=60, help="training steps, each on the whole graph")
    parser.add_argument("--kappa", type=float, default=0.95, help="bound on the contraction factor, below 1")
    parser.add_argument("--seeds", type=int, default=3, help="choices of the labeled images, averaged")
    parser.add_argument("--figure", help="save accuracy against iterations here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32), torch.tensor(digits)
    adjacency = neighbors(x, 8)
    names = {"linear": None, "1 iteration": 1, "2 iterations": 2, "4 iterations": 4, "fixed point": 0}
    scores: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        order = torch.randperm(len(y))
        labeled = torch.cat([order[y[order] == digit][: args.labels] for digit in range(10)])
        for name, cut in names.items():
            torch.manual_seed(seed)
            model = nn.Linear(64, 10) if cut is None else GraphNetwork(adjacency, 64, 32, cut, args.kappa)
            score, found = train(model, x, y, labeled, args.steps)
            scores[name].append(score)
            if cut == 0 and found is not None:
                print(f"seed {seed}: fixed point in {int(found.check().evals)} evaluations", end=", ")
        print(f"{scores['fixed point'][-1]:.1%} right, linear model {scores['linear'][-1]:.1%}")
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    print("mean accuracy without a label:", ", ".join(f"{name} {mean:.1%}" for name, mean in means.items()))
    if args.figure:
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
        ax.bar(list(means), [100 * mean for mean in means.values()])
        ax.set(ylabel=f"% right, {args.labels} labels a digit", ylim=(min(means.values()) * 100 - 5, 100))
        figure.savefig(args.figure, dpi=90)
    return means


if __name__ == "__main__":
    main()
