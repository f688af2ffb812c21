"""The default solver compared with plain iteration on random contractions, by number of evaluations.

python -m benchmarks.solvers.contractions        writes results/contractions.json and prints a summary

The maps have states of 1 to 200 numbers and contraction rates from 0.02 to 0.97, three samples each, and relative
tolerances of 1e-3, 1e-6 and, in float64, 1e-10. Only cases in which plain iteration converges within 400 evaluations
count. In a case the default solver is "over" if a sample takes more than 1.1 times as many evaluations as plain
iteration, or does not converge. For some families plain iteration is exact after at most N evaluations: a shift and a
strictly triangular matrix, which are nilpotent, and the maximum with a shift.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, provenance, write_result
from implicit import Multisecant, Picard, Stop, fixed_point

F64 = torch.float64
SIZES, RATES = (1, 2, 3, 5, 10, 30, 80, 200), (0.02, 0.1, 0.3, 0.6, 0.9, 0.97)
TOLERANCES = {torch.float64: (1e-3, 1e-6, 1e-10), torch.float32: (1e-3, 1e-6)}
ALLOWED, BUDGET = 1.1, 400
Map = Callable[[Tensor], Tensor]


def maps(n: int, seed: int) -> Iterator[tuple[str, Map, Tensor]]:
    """Yields (family, f, start) for all families and rates, with f in float64."""
    rng = torch.Generator().manual_seed(1000 * seed + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=F64)

    def unit(matrix: Tensor) -> Tensor:
        return matrix / torch.linalg.matrix_norm(matrix, 2).clamp_min(1e-300)

    a, b = normal(n, n), normal(3, n)
    general, rotation, symmetric = unit(a), torch.linalg.qr(a)[0], unit(a + a.T)
    nilpotent, chain = unit(normal(n, n).triu(1)), torch.softmax(8 * normal(n, n), 1)
    actions, gain = torch.softmax(4 * normal(3, n, n), 2), normal(3, n)
    first = torch.eye(1, n, dtype=F64)
    for rate in RATES:
        families: dict[str, Map] = {
            "symmetric": lambda z, r=rate: r * z @ symmetric + b,
            "rotation": lambda z, r=rate: r * z @ rotation + b,
            "general": lambda z, r=rate: r * z @ general.T + b,
            "Markov chain": lambda z, r=rate: r * z @ chain.T + gain,
            "tanh": lambda z, r=rate: torch.tanh(r * z @ general.T + b),
            "sine": lambda z, r=rate: torch.sin(r * z @ general.T) + b,
            "square": lambda z, r=rate: b.sigmoid() + 0.25 * r * torch.tanh(z) ** 2,
            "ReLU": lambda z, r=rate: torch.relu(r * z @ general.T + b),
            "absolute value": lambda z, r=rate: (r * z @ general.T).abs() + b,
            "soft threshold": lambda z, r=rate: torch.nn.functional.softshrink(r * z @ symmetric + b, 0.5),
            "clamp": lambda z, r=rate: (r * z @ rotation + b).clamp(-0.5, 0.5),
            "value iteration": lambda z, r=rate: (gain + r * torch.einsum("aij,bj->bai", actions, z)).amax(1),
            "shift": lambda z, r=rate: r * torch.nn.functional.pad(z[:, :-1], (1, 0)) + first,
            "triangular": lambda z, r=rate: r * z @ nilpotent.T + b,
            "maximum": lambda z, r=rate: torch.maximum(b, r * z.roll(1, 1)),
        }
        for family, f in families.items():
            yield family, f, b


def count(f: Map, z0: Tensor, rtol: float) -> tuple[Tensor, Tensor] | None:
    """Evaluations of each sample by plain iteration and by the default solver; None if plain iteration does not
    converge.

    The count of a sample that the default solver does not solve is infinite.
    """
    stop = Stop(rtol=rtol, max_evals=BUDGET)
    with torch.no_grad():
        plain = fixed_point(f, z0, solver=Picard(), stop=stop)
        if not plain.converged.all():
            return None
        ours = fixed_point(f, z0, solver=Multisecant(), stop=stop)
    return plain.evals, torch.where(ours.converged, ours.evals, torch.inf)


def measure() -> dict[str, dict[str, float]]:
    """Family -> number of cases, number of cases over, and for both solvers the sum over cases of the evaluations of
    the slowest sample.
    """
    table: dict[str, Counter[str]] = {}
    for n in SIZES:
        for seed in range(2):
            for family, f, b in maps(n, seed):
                row = table.setdefault(family, Counter())
                for dtype, tolerances in TOLERANCES.items():
                    for rtol in tolerances:
                        found = count(lambda z, f=f: f(z.to(F64)).to(z.dtype), b.to(dtype), rtol)
                        if found is None:
                            continue
                        plain, ours = found
                        row["cases"] += 1
                        row["over"] += bool((ours > ALLOWED * plain).any())
                        row["plain"] += int(plain.max())
                        row["default"] += int(ours.clamp_max(BUDGET).max())
    return {family: dict(row) for family, row in table.items()}


def main() -> None:
    torch.set_num_threads(1)
    families = measure()
    total = {name: sum(row.get(name, 0) for row in families.values()) for name in ("cases", "over", "plain", "default")}
    result = {**provenance("cpu"), "allowed": ALLOWED, "budget": BUDGET, "total": total, "families": families}
    write_result(RESULTS / "contractions.json", result)
    for family, row in {"total": total, **families}.items():
        print(f"{family:16}", row)


if __name__ == "__main__":
    main()
