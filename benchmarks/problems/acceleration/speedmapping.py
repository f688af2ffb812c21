"""Problems of FixedPointTestProblems.jl (N. Lepage-Saucier, MIT), the suite that SpeedMapping.jl is measured on.

The stopping test is ||f(z) - z||_2 < 1e-7. Random data come from the suite's portable generator. The maps are written
from the papers that the suite cites. Three problems are left out: Wang's proportional hazards and Lange's ancestry,
whose data need the suite's files or generators, and the lid-driven cavity, because of its size.
"""

import math

import torch
from torch import Tensor

from benchmarks.problems.acceleration.consumption import consumption
from benchmarks.problems.acceleration.grids import bratu, electric_field
from benchmarks.problems.acceleration.random_numbers import PortableRandom
from benchmarks.problems.problem import F64, Problem, like, row

SOURCE = "FixedPointTestProblems.jl, {}"


def suite(name: str, f, z0: Tensor, origin: str, answer=None) -> Problem:
    """A `Problem` with the suite's stopping test."""
    return Problem(name, f, z0, SOURCE.format(origin), (), 0.0, 1e-7, "euclidean", answer)


def fixed_point_test_problems(side: int = 100) -> list[Problem]:
    """Twelve of the fifteen problems; the grids have `side` x `side` points (published: 100 x 100)."""
    made = [
        _hasselblad(),
        _exchange_economy(),
        _three_normals(),
        _higham(),
        _power_iteration(),
        _linear(),
        _candecomp(),
    ]
    source = SOURCE.format("consumption smoothing")
    made.append(consumption("Consumption smoothing", source, "euclidean", 1e-7, straight=False))
    f, z0, answer = bratu(side)
    made.append(suite("Bratu", f, z0, "Bratu, arXiv 2408.16920", answer))
    for name, relaxation in (("Gauss-Seidel", 1.0), ("SOR", 1.94), ("Jacobi", None)):
        f, z0, answer = electric_field(side, relaxation)
        made.append(suite(f"Electric field, {name}", f, z0, "NAG Anderson_Acceleration_Poisson", answer))
    return made


def _hasselblad() -> Problem:
    """EM of a mixture of two Poisson distributions (V. Hasselblad, J. Amer. Statist. Assoc. 64, 1969)."""
    count = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=F64)
    y = torch.arange(10, dtype=F64)

    def f(x: Tensor) -> Tensor:
        n, k = like(count, x), like(y, x)
        p, first, second = x[:, :1].clamp(1e-7, 1 - 1e-7), x[:, 1:2].clamp(min=1e-7), x[:, 2:].clamp(min=1e-7)
        one, two = p * torch.exp(-first) * first**k, (1 - p) * torch.exp(-second) * second**k
        a = n * one / (one + two)
        b = n - a
        return torch.stack((a.sum(1) / n.sum(), (a * k).sum(1) / a.sum(1), (b * k).sum(1) / b.sum(1)), dim=1)

    # the limit that the vignette of the R package SQUAREM prints, components in this order
    limit = row(1 - 0.6401146, 1.2560951, 2.6634044)
    return suite("Hasselblad EM", f, row(0.25, 1, 2), "Hasselblad 1969", lambda: limit)


def _exchange_economy(households: int = 5, goods: int = 10) -> Problem:
    """Prices of an exchange economy of logarithmic utilities; good 1 is the unit of account."""
    random = PortableRandom()
    endowments = random.normal(goods, households).exp()
    tastes = random.uniform(goods, households)

    def f(p: Tensor) -> Tensor:
        e, g = like(endowments, p), like(tastes, p)
        spent = (p @ e / g.sum(0)) @ g.T / e.sum(1)
        return spent / spent[:, :1]

    def answer() -> Tensor:
        # spending on each good is linear in the prices: the eigenvector of the eigenvalue 1
        matrix = (tastes / tastes.sum(0)) @ endowments.T / endowments.sum(1, keepdim=True)
        values, vectors = torch.linalg.eig(matrix)
        p = vectors[:, int((values - 1).abs().argmin())].real
        return (p / p[0]).unsqueeze(0)

    return suite("Exchange economy", f, torch.ones(1, goods, dtype=F64), "exchange economy", answer)


def _drawn(random: PortableRandom, mean: tuple[float, float], a: float, b: float, c: float, count: int) -> Tensor:
    """Normal numbers in the plane with covariance ((a, b), (b, c)), ``(count, 2)``."""
    z = random.normal(2, count)
    first = math.sqrt(a) * z[0] + mean[0]
    second = (first - mean[0]) * b / a + math.sqrt(c - b * b / a) * z[1] + mean[1]
    return torch.stack((first, second), dim=1)


def _three_normals() -> Problem:
    """EM of a mixture of three normal distributions in the plane, 1000 points, 17 unknowns."""
    random = PortableRandom()
    clouds = [((0.0, 8.0), 2, 0.5, 2, 300), ((-4.0, 10.0), 2, -0.5, 12, 200), ((-3.0, 2.0), 4, 2, 3, 500)]
    data = torch.cat([_drawn(random, *cloud) for cloud in clouds])

    def f(theta: Tensor) -> Tensor:
        x = like(data, theta)
        parts = theta[:, :15].unflatten(1, (3, 5))
        mean, (a, b, c) = parts[..., :2], (parts[..., i].unsqueeze(2) for i in (2, 3, 4))
        a, b, c = _positive_definite(a, b, c)
        share = torch.cat((theta[:, 15:], 1 - theta[:, 15:].sum(1, keepdim=True)), dim=1)
        floor = share.clamp(min=1e-4)
        share = torch.where(share.amin(1, keepdim=True) < 1e-4, floor / floor.sum(1, keepdim=True), share)
        # E step: probability of each component for each point
        u, v = (x[:, i] - mean[..., i, None] for i in (0, 1))
        determinant = a * c - b**2
        exponent = -(c * u**2 - 2 * b * u * v + a * v**2) / (2 * determinant)
        z = (share.unsqueeze(2).log() - determinant.log() / 2 + exponent).softmax(1)
        # M step
        total = z.sum(2)
        mean = z @ x / total.unsqueeze(2)
        u, v = (x[:, i] - mean[..., i, None] for i in (0, 1))
        covariance = torch.stack([(z * t).sum(2) / total for t in (u * u, u * v, v * v)], dim=2)
        return torch.cat((torch.cat((mean, covariance), dim=2).flatten(1), total[:, :2] / len(x)), dim=1)

    start = row(0, 7.5, 2, 0, 1, -4, 12, 2, 0, 2, -2, 0, 4, 0, 2, 0.4, 0.2)
    return suite("Three normals EM", f, start, "mixture of 3 normals")


def _positive_definite(a: Tensor, b: Tensor, c: Tensor, least: float = 1e-7) -> tuple[Tensor, Tensor, Tensor]:
    """((a, b), (b, c)) with its eigenvalues raised to `least` where they are below."""
    middle, radius = (a + c) / 2, (((a - c) / 2) ** 2 + b**2).clamp(min=1e-30).sqrt()
    low, high = middle - radius, middle + radius
    lift, top = (least - low).clamp(min=0), (least - high).clamp(min=0)
    # projector on the smaller eigenvalue's vector: (high I - M) / (high - low)
    p, q, r = (high - a) / (2 * radius), -b / (2 * radius), (high - c) / (2 * radius)
    broken = low < least
    new = (a + lift * p + top * (1 - p), b + (lift - top) * q, c + lift * r + top * (1 - r))
    return tuple(torch.where(broken, n, old) for n, old in zip(new, (a, b, c), strict=True))  # pyright: ignore[reportReturnType]


def _higham() -> Problem:
    """Nearest correlation matrix by alternating projections with Dykstra's correction (N. Higham and N. Strabić, 2016).

    State: the upper triangles of Y and of the correction S; the matrix is mmb13 of Higham's collection.
    """
    upper = torch.triu_indices(6, 6)
    given = [1, 3.15946, 0.200885, 1.00195, -0.580897, 0.195261, 1, 12.6826, 3.35052, 8.17548, 16.936]
    given += [1, -0.0470641, 0.680691, 1.04237, 1, -0.788383, -0.140854, 1, 0.720099, 1]

    def full(x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 6, 6).index_put((torch.arange(len(x))[:, None], *upper), x)
        return out + out.triu(1).mT

    def f(ys: Tensor) -> Tensor:
        y, s = full(ys[:, :21]), full(ys[:, 21:])
        values, vectors = torch.linalg.eigh(y - s)
        projected = (vectors * values.clamp(min=0).unsqueeze(1)) @ vectors.mT
        s = projected - (y - s)
        eye = torch.eye(6, dtype=ys.dtype, device=ys.device)
        y = projected * (1 - eye) + eye
        return torch.cat((y[:, upper[0], upper[1]], s[:, upper[0], upper[1]]), dim=1)

    return suite("Higham correlation", f, row(*given, *[0.0] * 21), "Higham and Strabić 2016, matrix mmb13")


def _power_iteration(n: int = 100) -> Problem:
    """Power iteration on 1 1^T + diag(1, ..., n), scaled by the largest entry."""
    matrix = torch.ones(n, n, dtype=F64) + torch.diag(torch.arange(1.0, n + 1, dtype=F64))

    def f(x: Tensor) -> Tensor:
        y = x @ like(matrix, x)
        return y / y.abs().amax(1, keepdim=True)

    def answer() -> Tensor:
        v = torch.linalg.eigh(matrix)[1][:, -1]
        return (v / v[v.abs().argmax()]).unsqueeze(0)

    return suite("Power iteration", f, torch.ones(1, n, dtype=F64), "power iteration", answer)


def _linear(n: int = 100) -> Problem:
    """Richardson's iteration z - (A z - 1) for A = diag(2 i / (n + 1))."""
    diagonal = 2 * torch.arange(1, n + 1, dtype=F64) / (n + 1)
    z0 = torch.zeros(1, n, dtype=F64)
    return suite("Linear", lambda z: z - (like(diagonal, z) * z - 1), z0, "linear", lambda: (1 / diagonal).unsqueeze(0))


def _candecomp(size: int = 50, rank: int = 3) -> Problem:
    """Alternating least squares for the CP decomposition of a noisy tensor of collinear factors."""
    random = PortableRandom()
    collinear = 0.9 * torch.ones(rank, rank, dtype=F64) + 0.1 * torch.eye(rank, dtype=F64)
    root = torch.linalg.cholesky(collinear).T
    factors, noise = [], []
    for _ in range(3):
        factors.append(torch.linalg.qr(random.normal(size, rank))[0] @ root)
        noise = [random.normal(size, size, size) for _ in range(2)]
    clean = torch.einsum("ir,jr,kr->ijk", *factors)
    first = clean + clean.norm() / noise[0].norm() / math.sqrt(99) * noise[0]
    second = noise[1] * first
    tensor = first + first.norm() / second.norm() / math.sqrt(99) * second
    start = random.uniform(rank * rank * size).unsqueeze(0)
    others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}

    def f(z: Tensor) -> Tensor:
        t, u = like(tensor, z), list(z.unflatten(1, (3, rank, size)).unbind(1))
        for mode, (p, q) in others.items():
            letters = "ijk"
            equation = f"ijk,br{letters[p]},br{letters[q]}->br{letters[mode]}"
            right = torch.einsum(equation, t, u[p], u[q])
            gram = (u[p] @ u[p].mT) * (u[q] @ u[q].mT)
            new = torch.linalg.solve(gram, right)
            u[mode] = new / new.abs().sum(2, keepdim=True)
        return torch.stack(u, dim=1).flatten(1)

    return suite("CP by ALS", f, start, "ALS for CANDECOMP")
