"""A self-consistent field with forces: restricted Hartree-Fock on a batch of molecules, each with its own stopping.

Each atom has one basis function, an STO-3G s function. With overlap S, core Hamiltonian h, two-electron integrals
(ij|kl) and the density P = 2 sum_occupied c c^T,

    F(P) = h + G(P),   G_ij = sum_kl P_kl [(ij|kl) - (il|kj) / 2],   F C = S C e,   f(P) = 2 sum_occupied c c^T,

    E = tr P (h + F) / 2 + sum_{A<B} Z_A Z_B / |R_A - R_B|        at P = f(P).

Autograd computes the force -dE/dR through the integrals and the solve. The force thus includes the response of P, which
is not zero since the basis functions move with the atoms. Source of the integrals: Szabo and Ostlund, "Modern Quantum
Chemistry", appendix A; its H2 and HeH+ (sections 3.5.2, 3.5.3) are the first two molecules here. Atomic units, float64.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import implicit
from implicit import Solution, Stop

SHAPE = torch.tensor([2.227660, 0.405771, 0.109818], dtype=torch.float64)  # exponents of STO-3G at zeta = 1
WEIGHT = torch.tensor([0.154329, 0.535328, 0.444635], dtype=torch.float64)
ZETA = {1.0: 1.24, 2.0: 2.0925}  # by nuclear charge


def boys(t: Tensor) -> Tensor:
    """F_0(t) = sqrt(pi / t) erf(sqrt(t)) / 2, by its series for small t."""
    small = t < 1e-4
    safe = torch.where(small, 1.0, t)
    return torch.where(small, 1 - t / 3 + t * t / 10, 0.5 * (torch.pi / safe).sqrt() * safe.sqrt().erf())


def integrals(positions: Tensor, charges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S and h, (B, n, n), and (ij|kl), (B, n, n, n, n), of (B, n, 3) positions and (B, n) charges."""
    zeta = torch.tensor([[ZETA[c] for c in row] for row in charges.tolist()], dtype=torch.float64)
    a = (zeta[..., None] ** 2 * SHAPE).flatten(1)  # exponents of the primitives, (B, 3 n)
    norm = WEIGHT.repeat(zeta.shape[1]) * (2 * a / torch.pi) ** 0.75
    at = positions.repeat_interleave(3, dim=1)
    # products of two primitives: exponent p, center, prefactor (B, 3 n, 3 n)
    p = a[:, :, None] + a[:, None]
    center = (a[..., None] * at)[:, :, None] + (a[..., None] * at)[:, None]
    center = center / p[..., None]
    reduced = a[:, :, None] * a[:, None] / p
    apart = (at[:, :, None] - at[:, None]).square().sum(-1)
    factor = norm[:, :, None] * norm[:, None] * (-reduced * apart).exp()
    overlap = factor * (torch.pi / p) ** 1.5
    kinetic = overlap * reduced * (3 - 2 * reduced * apart)
    to_nucleus = (center[:, :, :, None] - positions[:, None, None]).square().sum(-1)
    attraction = charges[:, None, None] * boys(p[..., None] * to_nucleus)
    core = kinetic - 2 * torch.pi * factor / p * attraction.sum(-1)
    # repulsion of two products
    q, r = p[:, :, :, None, None], p[:, None, None]
    distance = (center[:, :, :, None, None] - center[:, None, None]).square().sum(-1)
    repulsion = 2 * torch.pi**2.5 / (q * r * (q + r).sqrt()) * boys(q * r / (q + r) * distance)
    repulsion = factor[:, :, :, None, None] * factor[:, None, None] * repulsion
    return contract(overlap), contract(core), contract(repulsion)


def contract(x: Tensor) -> Tensor:
    """Sums the three primitives of each basis function, in every dimension but the first."""
    for dim in range(1, x.dim()):
        x = x.unflatten(dim, (-1, 3)).sum(dim + 1)
    return x


def fock(density: Tensor, core: Tensor, two: Tensor) -> Tensor:
    """F(P) = h + G(P)."""
    return core + torch.einsum("bkl,bijkl->bij", density, two) - torch.einsum("bkl,bilkj->bij", density, two) / 2


def update(density: Tensor, overlap: Tensor, core: Tensor, two: Tensor) -> Tensor:
    """f(P): the density of two electrons in the lowest orbital of F(P), C = L^-T C' with S = L L^T."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(overlap))
    orbitals = torch.linalg.eigh(inverse @ fock(density, core, two) @ inverse.mT).eigenvectors
    lowest = inverse.mT @ orbitals[..., :1]
    return 2 * lowest @ lowest.mT


def solve(positions: Tensor, charges: Tensor, frozen: bool = False) -> tuple[Tensor, Solution]:
    """(B,) total energies of two-electron molecules, differentiable, and the `Solution`. With `frozen`, P is a constant
    for derivatives.
    """
    overlap, core, two = integrals(positions, charges)
    stop = Stop(rtol=1e-12, atol=0, max_evals=100)
    solved = implicit.fixed_point(update, torch.zeros_like(core), overlap, core, two, stop=stop).check()
    density = solved.value.detach() if frozen else solved.value
    electronic = ((core + fock(density, core, two)) * density).sum((1, 2)) / 2
    i, j = torch.triu_indices(charges.shape[1], charges.shape[1], offset=1)
    nuclear = charges[:, i] * charges[:, j] / (positions[:, i] - positions[:, j]).norm(dim=-1)
    return electronic + nuclear.sum(1), solved


def molecules(count: int) -> tuple[Tensor, Tensor]:
    """Positions (B, 2, 3) and charges (B, 2) of H2 with the bond length 1.4, HeH+ with 1.4632, and `count` molecules of
    HeH+ with bond lengths from 1.0 to 4.0.
    """
    length = torch.cat([torch.tensor([1.4, 1.4632]), torch.linspace(1.0, 4.0, count)]).double()
    positions = torch.stack([torch.zeros(len(length), 3), torch.eye(3)[:1].expand(len(length), 3)], 1).double()
    charges = torch.tensor([[2.0, 1.0]]).double().repeat(len(length), 1)
    charges[0, 0] = 1.0
    return positions * length[:, None, None], charges


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(description="Hartree-Fock with forces, a batch of molecules at once.")
    parser.add_argument("--count", type=int, default=31, help="bond lengths of HeH+")
    parser.add_argument("--figure", help="file for a figure of energy and iterations by bond length")
    args = parser.parse_args(argv)
    positions, charges = molecules(args.count)
    positions.requires_grad_()
    total, solved = solve(positions, charges)
    slope = torch.autograd.grad(total.sum(), positions, create_graph=True)[0][:, 1, 0]  # dE / d bond length
    stiffness = torch.autograd.grad(slope.sum(), positions)[0][:, 1, 0]
    without = torch.autograd.grad(solve(positions, charges, frozen=True)[0].sum(), positions)[0][:, 1, 0]
    # central differences of the energy and of the slope
    shift = torch.zeros_like(positions)
    shift[:, 1, 0] = h = 1e-4
    ahead, back = ((positions + d).detach().requires_grad_() for d in (shift, -shift))
    energies = [solve(at, charges)[0] for at in (ahead, back)]
    slopes = [torch.autograd.grad(e.sum(), at)[0][:, 1, 0] for e, at in zip(energies, (ahead, back), strict=True)]
    force_error = (slope - (energies[0] - energies[1]) / (2 * h)).abs().max()
    second_error = (stiffness - (slopes[0] - slopes[1]) / (2 * h)).abs().max()
    print(f"H2 at 1.4: {total[0]:.6f} hartree; HeH+ at 1.4632: {total[1]:.6f} hartree")
    print(f"evaluations by molecule: {solved.evals.tolist()}")
    print(f"forces, autograd against central differences: {force_error:.1e} of up to {slope.abs().max():.2f}")
    print(f"second derivatives, likewise: {second_error:.1e} of up to {stiffness.abs().max():.2f}")
    print(f"with P taken as constant, forces would be off by up to {(without - slope).abs().max():.2f}")
    if args.figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        length = positions[2:, 1, 0].detach()
        left.plot(length, total[2:].detach())
        left.set(xlabel="bond length of HeH+, bohr", ylabel="energy, hartree")
        right.plot(length, solved.evals[2:], ".")
        right.set(xlabel="bond length of HeH+, bohr", ylabel="evaluations until converged")
        figure.savefig(args.figure, dpi=90)
    return {"energy": total.detach(), "evals": solved.evals, "force": force_error, "second": second_error}


if __name__ == "__main__":
    main()
