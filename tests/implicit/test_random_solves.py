"""Random solves: every claim of convergence holds for the value returned, by norms taken here in float64.

Maps of independent samples and maps that couple them, with every solver, norm and way to run a solve.
"""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from implicit import (
    IFT,
    JFB,
    Anderson,
    AndersonGS,
    BadBroyden,
    Broyden,
    Multisecant,
    NewtonKrylov,
    Picard,
    Reversible,
    Solution,
    Stop,
    Unrolled,
    fixed_point,
)

SOLVERS = [
    Picard(),
    Picard(0.4),
    Anderson(),
    Anderson(3, damping=0.3),
    AndersonGS(),
    AndersonGS(4),
    Broyden(),
    Broyden(5, search=3),
    BadBroyden(),
    NewtonKrylov(),
    Multisecant(),
]
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3}


@dataclass
class Case:
    f: Any
    z0: tuple[torch.Tensor, torch.Tensor]
    args: tuple[torch.Tensor, ...]
    stop: Stop
    options: dict[str, Any]
    again: bool


def matrix(rng: torch.Generator, n: int, radius: float) -> torch.Tensor:
    a = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return radius * a / torch.linalg.eigvals(a).abs().max().clamp_min(1e-3)


def make(seed: int) -> Case:
    """A map of two tensors (B, N) and (B, 2), and how to solve for its fixed point."""
    dice, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, n = dice.choice([1, 3, 6]), dice.choice([1, 2, 7, 20])
    dtype = dice.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    size = 10.0 ** dice.choice([0, 0, 0, -6, 5] if dtype != torch.bfloat16 else [0])
    kind = dice.choice(["tanh", "linear", "cycle", "kink", "hole", "mean", "chain", "max"])
    w = matrix(rng, n, dice.choice([0.3, 0.9, 0.99, 1.5])).to(dtype)
    x = (torch.randn(rows, n, generator=rng, dtype=torch.float64) * torch.logspace(-2, 0, rows)[:, None]).to(dtype)
    rate = torch.linspace(0.1, 0.95, rows, dtype=torch.float64)[:, None].to(dtype)

    def f(state, x, rate):
        z, y = state[0] / size, state[1]
        z_new, y_new = z @ w + x, rate * torch.cos(y + z.mean(1, keepdim=True))
        if kind == "tanh":
            z_new = torch.tanh(z_new)
        elif kind == "cycle":
            z_new = x - rate.round() * z
        elif kind == "kink":
            z_new = torch.relu(z_new) + 0.1
        elif kind == "hole":
            z_new = torch.tanh(z_new) + (2.5 - z.abs().amax(1, keepdim=True)).sqrt() * rate
        elif kind == "mean":
            z_new = torch.tanh(z_new) + 0.3 * z.mean(0)
        elif kind == "chain":
            z_new = 0.5 * torch.roll(z, 1, dims=0) + x
        elif kind == "max":
            y_new = y_new + 0.2 * y.amax()
        return z_new * size, y_new

    rtol = dice.choice([1e-2, 3e-3] if dtype == torch.bfloat16 else [1e-2, 1e-4, 1e-6])
    norm = dice.choice(["euclidean", "rms", "max", "leaf"])
    atol = 0.0 if dice.random() < 0.7 else size * rtol
    stop = Stop(
        rtol=rtol if dice.random() < 0.9 or not atol else 0.0,
        atol=atol,
        max_evals=dice.choice([1, 2, 5, 20, 60, 120]),
        check_every=dice.choice([1, 1, 2, 3]),
        late=dice.random() < 0.3,
        norm=norm,
    )
    options: dict[str, Any] = {}
    if dice.random() < 0.3:
        options["compact"] = True
    elif dice.random() < 0.3:
        options["trace"] = True
    z0 = (torch.zeros(rows, n, dtype=dtype), torch.zeros(rows, 2, dtype=dtype))
    return Case(f, z0, (x, rate), stop, options, "compact" not in options and dice.random() < 0.4)


def sizes(state: tuple[torch.Tensor, ...], norm: str) -> torch.Tensor:
    """(B, groups) norms in float64."""
    parts = [t.detach().double() for t in state]
    parts = parts if norm == "leaf" else [torch.cat(parts, dim=1)]
    ord = torch.inf if norm == "max" else 2
    found = [torch.linalg.vector_norm(t, ord, dim=1) for t in parts]
    if norm == "rms":
        found = [size / t.shape[1] ** 0.5 for size, t in zip(found, parts, strict=True)]
    return torch.stack(found, dim=1)


def check(case: Case, found: Solution) -> int:
    """The number of claims; each of them, and every residual, is compared with a new evaluation of f."""
    stop, f, z = case.stop, case.f, tuple(t.detach() for t in found.value)
    fz = f(z, *case.args)
    r = sizes(tuple(a.double() - b.double() for a, b in zip(fz, z, strict=True)), stop.norm)
    s, first = sizes(fz, stop.norm), sizes(f(case.z0, *case.args), stop.norm)
    eps = EPS[z[0].dtype]
    tolerance = stop.atol + stop.rtol * torch.maximum(s, eps**0.5 * first)
    allowed = tolerance * (1 + 1e-5) + 30 * eps * s * (eps < 1e-3)  # products of matrices round by the batch
    bad = found.converged & ~(r <= allowed).all(dim=1)
    assert not bad.any(), (case, found.result, (r / tolerance).amax(1))
    return int(found.converged.sum())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_claims_of_random_solves(solver):
    claims = 0
    for seed in range(24):
        case = make(seed)
        keep = {"keep_state": True} if case.again else {}
        with torch.no_grad():
            found = fixed_point(case.f, case.z0, *case.args, solver=solver, stop=case.stop, **case.options, **keep)
            claims += check(case, found)
            if case.again:  # once more, from there and with the solver's state
                x = case.args[0] * 1.1
                case = Case(case.f, found.value, (x, case.args[1]), case.stop, case.options, False)
                again = fixed_point(case.f, case.z0, *case.args, solver=solver, stop=case.stop, state=found.state)
                claims += check(case, again)
        # beyond the budget: two evaluations that tell noise from coupling, one that compares the bits of a product
        assert found.evals.max() <= case.stop.max_evals + 3
    assert claims > 15


@pytest.mark.parametrize(
    "grad", [IFT(on_failure="ignore"), JFB(2), Unrolled(), Reversible(on_drift="ignore")], ids=repr
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_claims_of_random_solves_with_a_graph(grad):
    claims = 0
    for seed in range(100, 115):
        case = make(seed)
        if isinstance(grad, Reversible) and case.options:
            case.options = {}
        args = tuple(t.clone().requires_grad_() for t in case.args)
        found = fixed_point(case.f, case.z0, *args, grad=grad, stop=case.stop, **case.options)
        claims += check(case, found)
    assert claims > 2
