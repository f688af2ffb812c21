"""A looped reasoner: a network solves Sudoku puzzles by iterating one block; its depth is the number of iterations.

Each cell of an n x n puzzle is a vector of z, and x embeds the clues. One block is iterated,

    z' = f(z, x) = norm(h + W_o silu(W h + sum_u U_u mean_u(h) + b)),    h = z + x,

where mean_u is the mean over the cell's row, column or box u, and a linear layer reads the digits from z. Training
starts from z0 ~ N(0, I), draws the number of iterations of a step at random (StochasticJFB, arXiv 2401.08741, Algorithm
1), and adds the penalty ||df/dz||_F^2 / N (arXiv 2106.14342). With probability 7/8 a puzzle stays in the batch, and the
next step continues from its state, so that few iterations per step also train late iterations. The unrolled twin is the
same network trained through 8 iterations from zero, on new puzzles in every step, for the same CPU time. The test
compares numbers of iterations, stopping by residual, and the best of several random starts (arXiv 2605.21488).
"""

import argparse
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from sudoku_puzzles import Puzzles, relabeled, splits, units
from torch import Tensor, nn

from implicit import DEQ, Picard, StochasticJFB, Stop, Unrolled, fixed_point
from implicit.diagnostics import jacobian_penalty

DEPTHS, BREADTH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), (8, 16, 32, 64)
PLAIN, BATCH, STAY = Picard(), 32, 7 / 8


class Block(nn.Module):
    """f(z, x) above, on (B, n * n, width) states."""

    member: Tensor

    def __init__(self, size: int, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("member", torch.from_numpy(units(size)).float().flatten(0, 1))  # (3 n, n * n)
        self.own, self.out, self.norm = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width)
        self.units = nn.Parameter(torch.randn(3, width, hidden) / (4 * width) ** 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = z + x
        # means over the units (3, n B, width), their messages, and back to the cells of each unit
        means = (self.member @ h.transpose(0, 1).flatten(1)).view(3, -1, h.shape[2]) / (len(self.member) // 3)
        messages = torch.bmm(means, self.units).view(len(self.member), -1)
        received = (self.member.T @ messages).view(h.shape[1], h.shape[0], -1).transpose(0, 1)
        return self.norm(h + self.out(nn.functional.silu(self.own(h) + received)))


class Reasoner(nn.Module):
    """The network from clues (B, n * n) to digits; `deq` iterates the block."""

    def __init__(self, size: int, twin: bool, seed: int, width: int = 192, hidden: int = 512) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(size + 1, width), nn.Linear(width, size)
        self.twin, self.rng = twin, torch.Generator().manual_seed(seed)
        grad = Unrolled() if twin else StochasticJFB(N=2, M=4, generator=self.rng)
        self.deq = DEQ(Block(size, width, hidden), solver=PLAIN, grad=grad, stop=Stop(rtol=0, atol=0, max_evals=8))

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.twin else torch.randn(x.shape, generator=self.rng)

    def right(self, z: Tensor, solutions: Tensor) -> Tensor:
        """(B,) 1 where every cell is right."""
        return (self.head(z).argmax(-1) + 1 == solutions).all(1).float()


def train(model: Reasoner, puzzles: Puzzles, seconds: float, penalty: float, rng: np.random.Generator) -> int:
    """Train for `seconds` of CPU time, over which the learning rate falls to zero; return the number of steps."""
    begin, step, size = time.process_time(), 0, puzzles.clues.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    clues, solutions = torch.zeros(2, BATCH, size, dtype=torch.int64)
    z, new = torch.zeros_like(model.embed(clues)), torch.ones(BATCH, dtype=torch.bool)
    while (spent := (time.process_time() - begin) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 50) * (1 + np.cos(np.pi * spent))
        clues[new], solutions[new] = map(torch.from_numpy, relabeled(puzzles, int(new.sum()), rng))
        x = model.embed(clues)
        z = model.deq(torch.where(new[:, None, None], model.start(x), z.detach()), x).value
        loss = nn.functional.cross_entropy(model.head(z).flatten(0, 1), solutions.flatten() - 1)
        if step % 4 == 0 and not model.twin:
            loss += penalty * jacobian_penalty(model.deq.f, z[:16].detach(), x[:16], generator=model.rng).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        new = torch.rand(BATCH, generator=model.rng) >= (0 if model.twin else STAY)
        step += 1
    return step


@torch.no_grad()
def report(model: Reasoner, x: Tensor, solutions: Tensor) -> list[float]:
    """Prints the accuracy by depth, with stopping by residual, and of the best of 8 starts; returns the accuracy by
    depth.
    """
    z, shares = model.start(x), []
    for depth in np.diff(DEPTHS, prepend=0).tolist():
        z = fixed_point(model.deq.f, z, x, solver=PLAIN, stop=Stop(rtol=0, atol=0, max_evals=depth)).value
        shares.append(float(model.right(z, solutions).mean()))
    print("    by iterations:", ", ".join(f"{d}: {s:.1%}" for d, s in zip(DEPTHS, shares, strict=True)))
    found = fixed_point(model.deq.f, model.start(x), x, solver=PLAIN, stop=Stop(rtol=1e-3, max_evals=64), compact=True)
    right, end, mean = model.right(found.value, solutions), found.converged, found.evals.float().mean()
    print(f"    to 1e-3: {mean:.1f} iterations, {right.mean():.1%} solved; ", end="")
    print(f"{end.float().mean():.1%} converged, of which {right[end].mean():.1%} solved")
    z0 = model.start(x.expand(8, *x.shape))
    for evals in () if model.twin else BREADTH:
        solve = partial(fixed_point, model.deq.f, solver=PLAIN, stop=Stop(rtol=0, atol=0, max_evals=evals))
        one, best = (model.right(solve(z, x, starts=n).value, solutions) for z, n in ((z0[0], 1), (z0, 8)))
        gain, error = (best - one).mean(), (best - one).std() / len(x) ** 0.5
        print(f"    {evals}: one start {one.mean():.1%}, best of 8 {best.mean():.1%}, gain {gain:.1%} ± {error:.1%}")
    return shares


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description="A looped reasoner on Sudoku, and its unrolled twin.")
    parser.add_argument("--size", type=int, choices=(4, 6), default=4, help="digits of the Sudoku")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training, for each network")
    parser.add_argument("--penalty", type=float, default=0.1, help="weight of the Jacobian penalty")
    parser.add_argument("--tests", type=int, default=400, help="puzzles of each test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="do not train the unrolled twin")
    parser.add_argument("--figure", help="file for a figure of the accuracy by iterations")
    args, curves = parser.parse_args(argv), {}
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    data = splits(args.size, 300, rng)
    print("puzzles up to relabeling:", {name: len(part.clues) for name, part in data.items()})
    for kind in ("looped", "unrolled twin")[: 1 if args.alone else 2]:
        model = Reasoner(args.size, kind == "unrolled twin", args.seed)
        print(f"{kind}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.seconds:g} s,", end=" ")
        print(train(model, data["train"], args.seconds, args.penalty, rng), "steps")
        for name in ("unseen", "new"):
            clues, solutions = map(torch.from_numpy, relabeled(data[name], args.tests, np.random.default_rng(0)))
            print(f"  {name} {'puzzles' if name == 'unseen' else 'grids'}")
            curves[f"{kind}, {name}"] = report(model, model.embed(clues), solutions)
    if args.figure:
        figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for (name, shares), style in zip(curves.items(), ("C0.-", "C0.:", "C1.-", "C1.:"), strict=False):
            ax.semilogx(DEPTHS, shares, style, label=name, base=2)
        ax.legend()
        ax.set(xlabel="iterations at test time", ylabel="puzzles solved")
        figure.savefig(args.figure, dpi=90)
    return curves


if __name__ == "__main__":
    main()
