"""Expectation maximization and scaling algorithms of statistics as fixed-point maps.

Where a problem has an answer, it is the stationary point of the log-likelihood, by Newton's method from a near start.
"""

import math

import torch
from torch import Tensor

from benchmarks.problems.problem import F64, Problem, like, normal, uniform


def statistics() -> list[Problem]:
    """Six maps."""
    return [_probit(), _student(), _poisson_mixture(), _normal_mixture(), _ancestry(), _sinkhorn()]


def _probit() -> Problem:
    """EM of probit regression: latent normals, then least squares (N. Henderson and R. Varadhan's DAAREM test)."""
    x = torch.cat((torch.ones(300, 1, dtype=F64), normal(50, 300, 7)), dim=1)
    label = (normal(51, 2, 8) @ x.T + normal(52, 2, 300) > 0).to(F64)
    solve = torch.linalg.inv(x.T @ x) @ x.T

    def f(beta: Tensor, label: Tensor) -> Tensor:
        m = beta @ like(x, beta).T
        sign = 2 * label - 1
        # mean of the latent normal, truncated to the side of the label; the ratio of density and distribution function
        density = torch.exp(-(m**2) / 2) / math.sqrt(2 * math.pi)
        ratio = density / torch.special.ndtr(sign * m).clamp(min=1e-30)
        return (m + sign * ratio) @ like(solve, beta).T

    def answer() -> Tensor:
        # Newton's method on the log-likelihood
        out = []
        for y in label:
            sign, beta = 2 * y - 1, torch.zeros(8, dtype=F64)
            for _ in range(50):
                m = sign * (x @ beta)
                ratio = torch.exp(-(m**2) / 2) / math.sqrt(2 * math.pi) / torch.special.ndtr(m)
                hessian = (x.T * (ratio * (ratio + m))) @ x
                beta = beta + torch.linalg.solve(hessian, x.T @ (sign * ratio))
            out.append(beta)
        return torch.stack(out)

    source = "N. Henderson and R. Varadhan, 2019"
    return Problem("Probit EM", f, torch.zeros(2, 8, dtype=F64), source, (label,), answer=answer)


def _student() -> Problem:
    """EM of the location and covariance of a multivariate t distribution with one degree of freedom, 6 dimensions."""
    d, count = 6, 120
    data = normal(53, count, d) / normal(54, count, 1).abs() + torch.arange(d, dtype=F64)
    upper = torch.triu_indices(d, d)

    def f(state: Tensor) -> Tensor:
        x, mean = like(data, state), state[:, :d]
        covariance = state.new_zeros(len(state), d, d).index_put(
            (torch.arange(len(state))[:, None], *upper), state[:, d:]
        )
        covariance = covariance + covariance.triu(1).mT
        rest = x - mean.unsqueeze(1)
        distance = (torch.linalg.solve(covariance, rest.mT).mT * rest).sum(2)
        w = (1 + d) / (1 + distance)
        mean = (w.unsqueeze(2) * x).sum(1) / w.sum(1, keepdim=True)
        rest = x - mean.unsqueeze(1)
        covariance = (w.unsqueeze(2) * rest).mT @ rest / count
        return torch.cat((mean, covariance[:, upper[0], upper[1]]), dim=1)

    start = torch.cat((data.median(0).values, torch.eye(d, dtype=F64)[upper[0], upper[1]])).unsqueeze(0)
    return Problem("Multivariate t EM", f, start, "D. Kent, D. Tyler and Y. Vardi, 1994")


def _poisson_mixture() -> Problem:
    """EM of two-component Poisson mixtures: four data sets of counts; state (p, first mean, second mean)."""
    y = torch.arange(0, 25, dtype=F64)
    truth = torch.tensor([[0.3, 2.0, 6.0], [0.5, 1.0, 4.0], [0.7, 3.0, 9.0], [0.4, 1.0, 2.5]], dtype=F64)

    def density(k: Tensor, mean: Tensor) -> Tensor:
        return torch.exp(k * mean.log() - mean - torch.lgamma(k + 1))

    count = 1000 * (truth[:, :1] * density(y, truth[:, 1:2]) + (1 - truth[:, :1]) * density(y, truth[:, 2:]))
    count = count.round()

    def f(x: Tensor, n: Tensor) -> Tensor:
        k = like(y, x)
        p, first, second = x[:, :1].clamp(1e-7, 1 - 1e-7), x[:, 1:2].clamp(min=1e-7), x[:, 2:].clamp(min=1e-7)
        one, two = p * density(k, first), (1 - p) * density(k, second)
        a = n * one / (one + two)
        b = n - a
        return torch.stack((a.sum(1) / n.sum(1), (a * k).sum(1) / a.sum(1), (b * k).sum(1) / b.sum(1)), dim=1)

    z0 = torch.tensor([[0.5, 1.0, 5.0]], dtype=F64).repeat(4, 1)
    return Problem("Poisson mixtures EM", f, z0, "V. Hasselblad, 1969, made counts", (count,))


def _normal_mixture() -> Problem:
    """EM of mixtures of two normals with equal weights, three data sets; state (means, logarithms of deviations)."""
    data = torch.cat((normal(55, 3, 200), 2.2 + 0.7 * normal(56, 3, 200)), dim=1)

    def f(state: Tensor, x: Tensor) -> Tensor:
        mean, log = state[:, :2].unsqueeze(2), state[:, 2:].unsqueeze(2)
        z = (-(((x.unsqueeze(1) - mean) / log.exp()) ** 2) / 2 - log).softmax(1)
        total = z.sum(2)
        mean = (z * x.unsqueeze(1)).sum(2) / total
        variance = (z * (x.unsqueeze(1) - mean.unsqueeze(2)) ** 2).sum(2) / total
        return torch.cat((mean, variance.log() / 2), dim=1)

    z0 = torch.tensor([[-1.0, 3.0, 0.0, 0.0]], dtype=F64).repeat(3, 1)
    return Problem("Normal mixtures EM", f, z0, "A. Dempster, N. Laird and D. Rubin, 1977", (data,))


def _ancestry(people: int = 30, markers: int = 40, groups: int = 3) -> Problem:
    """EM of admixture proportions and allele frequencies, state: logits; like FixedPointTestProblems.jl's, smaller."""
    frequency = 0.05 + 0.9 * uniform(57, markers, groups)
    share = uniform(58, people, groups) ** 3
    share = share / share.sum(1, keepdim=True)
    chance = share @ frequency.T
    g = (uniform(59, people, markers) < chance).to(F64) + (uniform(60, people, markers) < chance).to(F64)

    def f(state: Tensor) -> Tensor:
        x = like(g, state).unsqueeze(2)
        p = torch.sigmoid(state[:, : markers * groups]).unflatten(1, (markers, groups))
        q = state[:, markers * groups :].unflatten(1, (people, groups)).softmax(2)
        # expected copies of allele 1 and 0 of each person and marker that come from each group
        one, zero = q.unsqueeze(2) * p.unsqueeze(1), q.unsqueeze(2) * (1 - p).unsqueeze(1)
        a = x * one / one.sum(3, keepdim=True)
        b = (2 - x) * zero / zero.sum(3, keepdim=True)
        top, bottom = a.sum(1) + 0.1, b.sum(1) + 0.1
        weight = (a + b).sum(2) + 0.1
        weight = weight / weight.sum(2, keepdim=True)
        log = weight.log()
        return torch.cat(((top / bottom).log().flatten(1), (log - log.mean(2, keepdim=True)).flatten(1)), dim=1)

    z0 = torch.cat((normal(61, 1, markers * groups), normal(62, 1, people * groups)), dim=1)
    return Problem("Ancestry EM", f, z0, "D. Alexander, J. Novembre and K. Lange, 2009")


def _sinkhorn(n: int = 40) -> Problem:
    """Sinkhorn's scaling for entropic optimal transport, logarithms of one scaling, three regularizations."""
    x, y = uniform(63, n, 1), uniform(64, 1, n)
    cost = (x - y) ** 2
    epsilon = torch.tensor([[0.05], [0.02], [0.01]], dtype=F64)
    weight = uniform(65, n) + 0.1
    weight = (weight / weight.sum()).log()

    def f(u: Tensor, e: Tensor) -> Tensor:
        kernel = -like(cost, u) / e.unsqueeze(2)
        v = -math.log(n) - torch.logsumexp(kernel + u.unsqueeze(2), dim=1)
        u = like(weight, u) - torch.logsumexp(kernel + v.unsqueeze(1), dim=2)
        return u - u.mean(1, keepdim=True)

    return Problem("Sinkhorn", f, torch.zeros(3, n, dtype=F64), "R. Sinkhorn, 1967; M. Cuturi, 2013", (epsilon,))
