"""Fixed points of mechanics, games, dynamic programming and electronic structure, and maps with kinks."""

import math

import torch
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, bisect, like, normal, uniform


def dynamics() -> list[Problem]:
    """Eight maps."""
    return [
        _kepler(),
        _implicit_midpoint(),
        _implicit_midpoint_oscillators(),
        _self_consistent_field(),
        _value_iteration(),
        _best_response(),
        _kinks(),
        _chandrasekhar(),
    ]


def _kepler() -> Problem:
    """Kepler's equation E = M + e sin E for sixteen orbits, eccentricities up to 0.97."""
    e = torch.linspace(0.1, 0.97, 16, dtype=F64).unsqueeze(1)
    m = torch.linspace(0.2, 3.0, 16, dtype=F64).unsqueeze(1)

    def answer() -> Tensor:
        roots = [
            bisect(lambda x, a=a, b=b: x - b * math.sin(x) - a, 0, 7)
            for a, b in zip(m[:, 0].tolist(), e[:, 0].tolist(), strict=True)
        ]
        return torch.tensor(roots, dtype=F64).unsqueeze(1)

    def f(z: Tensor, m: Tensor, e: Tensor) -> Tensor:
        return m + e * torch.sin(z)

    return Problem("Kepler's equation", f, m.clone(), "J. Kepler, 1609", (m, e), answer=answer)


def _implicit_midpoint(h: float = 0.9) -> Problem:
    """One implicit midpoint step of pendulums of eight starting angles; state (angle, velocity) after the step."""
    start = torch.stack((torch.linspace(0.3, 3.0, 8, dtype=F64), torch.linspace(-1, 1, 8, dtype=F64)), dim=1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        middle = (z + x) / 2
        return x + h * torch.stack((middle[:, 1], -torch.sin(middle[:, 0])), dim=1)

    return Problem("Implicit midpoint, pendulum", f, start.clone(), "implicit midpoint rule, h = 0.9", (start,))


def _implicit_midpoint_oscillators(n: int = 20, h: float = 0.35) -> Problem:
    """One implicit midpoint step of a Fermi-Pasta-Ulam chain; state (positions, momenta)."""
    start = torch.cat(
        (torch.sin(math.pi * torch.arange(1, n + 1, dtype=F64) / (n + 1)).repeat(2, 1), 0.3 * normal(70, 2, n)), dim=1
    )

    def f(z: Tensor, x: Tensor) -> Tensor:
        q, p = ((z + x) / 2).chunk(2, dim=1)
        stretch = torch.diff(torch.nn.functional.pad(q, (1, 1)), dim=1)
        force = 4 * torch.diff(stretch + 0.7 * stretch**3, dim=1)
        return x + h * torch.cat((p, force), dim=1)

    return Problem("Implicit midpoint, chain", f, start.clone(), "E. Fermi, J. Pasta and S. Ulam, 1955", (start,))


def _self_consistent_field(n: int = 24) -> Problem:
    """Hartree self-consistency on a ring: density of the lowest n/2 orbitals at temperature 0.1, three interactions."""
    hopping = -torch.diag(torch.ones(n - 1, dtype=F64), 1)
    hopping = hopping + hopping.T
    hopping[0, -1] = hopping[-1, 0] = -1
    site = normal(71, n)
    strength = torch.tensor([[0.5], [1.5], [2.5]], dtype=F64)

    def f(density: Tensor, u: Tensor) -> Tensor:
        h = like(hopping, density) + torch.diag_embed(like(site, density) + u * density)
        energy, orbital = torch.linalg.eigh(h)
        level = (energy[:, n // 2 - 1 : n // 2] + energy[:, n // 2 : n // 2 + 1]) / 2
        return (orbital**2 @ torch.sigmoid((level - energy) / 0.1).unsqueeze(2)).squeeze(2)

    z0 = torch.full((3, n), 0.5, dtype=F64)
    return Problem("Self-consistent field", f, z0, "Hartree's equations on a ring of sites", (strength,))


def _value_iteration(states: int = 40, actions: int = 4) -> Problem:
    """Bellman's equation of a random Markov decision process, discounts 0.9, 0.97 and 0.99."""
    chance = uniform(72, actions, states, states) ** 6
    chance = chance / chance.sum(2, keepdim=True)
    reward = uniform(73, actions, states)
    discount = torch.tensor([[0.9], [0.97], [0.99]], dtype=F64)

    def values(v: Tensor, d: Tensor) -> Tensor:
        return like(reward, v) + d.unsqueeze(2) * torch.einsum("ast,bt->bas", like(chance, v), v)

    def f(v: Tensor, d: Tensor) -> Tensor:
        return values(v, d).amax(1)

    def answer() -> Tensor:
        # policy iteration
        v = torch.zeros(3, states, dtype=F64)
        for _ in range(50):
            best = values(v, discount).argmax(1)
            for i, d in enumerate(discount[:, 0]):
                at = torch.arange(states)
                chain, gain = chance[best[i], at], reward[best[i], at]
                v[i] = torch.linalg.solve(torch.eye(states, dtype=F64) - d * chain, gain)
        return v

    z0 = torch.zeros(3, states, dtype=F64)
    return Problem("Value iteration", f, z0, "R. Bellman, 1957", (discount,), answer=answer)


def _best_response(firms: int = 12) -> Problem:
    """Best responses of Cournot's oligopoly with elastic demand (Q + 1)^-1/2, damped by one half."""
    cost = 0.1 + 0.2 * uniform(74, 3, firms)

    def f(q: Tensor, cost: Tensor) -> Tensor:
        total = q.sum(1, keepdim=True) + 1
        # the first order condition P(Q) + q P'(Q) = c, solved for q at the present total
        best = (2 * total * (1 - cost * total.sqrt())).clamp(min=0)
        return 0.9 * q + 0.1 * best

    return Problem("Best response", f, torch.full((3, firms), 0.5, dtype=F64), "A. Cournot, 1838", (cost,))


def _kinks(n: int = 30) -> Problem:
    """z = 0.9 Q |z| + b with an orthogonal Q: an absolute value equation, contractive, with n kinks."""
    q = torch.linalg.qr(normal(75, n, n))[0]
    b = normal(76, 3, n)

    def f(z: Tensor, b: Tensor) -> Tensor:
        return 0.9 * z.abs() @ like(q, z).T + b

    def answer() -> Tensor:
        # the generalized Newton method: a linear system for the present signs
        z = b.clone()
        for _ in range(100):
            z = torch.stack(
                [
                    torch.linalg.solve(torch.eye(n, dtype=F64) - 0.9 * q * torch.sign(x), y)
                    for x, y in zip(z, b, strict=True)
                ]
            )
        return z

    source = "O. Mangasarian and R. Meyer, 2006"
    return Problem("Absolute value equation", f, torch.zeros(3, n, dtype=F64), source, (b,), answer=answer)


def _chandrasekhar(n: int = 80) -> Problem:
    """Chandrasekhar's H equation by Gauss-Legendre quadrature, c = 0.5, 0.9 and 0.999."""
    off = torch.arange(1, n, dtype=F64)
    off = off / (4 * off**2 - 1).sqrt()
    node, vector = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    node, weight = (node + 1) / 2, vector[0] ** 2
    kernel = node[:, None] * weight / (node[:, None] + node[None, :])
    c = torch.tensor([[0.5], [0.9], [0.999]], dtype=F64)

    def f(h: Tensor, c: Tensor) -> Tensor:
        return 1 / (1 - c / 2 * h @ like(kernel, h).T)

    def answer() -> Tensor:
        h = torch.ones(3, n, dtype=F64)
        for _ in range(60):
            for i in range(3):
                g = f(h[i : i + 1], c[i : i + 1])[0]
                slope = torch.eye(n, dtype=F64) - g[:, None] ** 2 * c[i] / 2 * kernel
                h[i] = h[i] + torch.linalg.solve(slope, g - h[i])
        return h

    z0 = torch.ones(3, n, dtype=F64)
    return Problem("Chandrasekhar's H", f, z0, "S. Chandrasekhar, 1950; C. T. Kelley, 2003", (c,), answer=answer)
