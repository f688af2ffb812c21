"""The linear systems u = g + A u of backward passes: scaled, solved per sample, and verified by a product."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from implicit.iterate import iterate
from implicit.linear.gmres import GMRES
from implicit.pytree import Flat, norm
from implicit.solution import NotConverged, Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import is_abstract

Act: TypeAlias = Callable[[Flat], Flat]
"""v -> A v, for a linear map A."""

_SLACK = 10  # a measured residual above this multiple of the tolerance shows that the solver's own residual is wrong


@dataclass(frozen=True)
class LinearSolve:
    """Solves u = g + A u, A a linear map given by its action; scale-invariant in g.

    g is divided by a power of two per sample, so that rounding, tolerance and iterates are the same at every scale.

    The samples of a batch are solved as systems of their own. If A takes one sample into another, the whole batch is
    solved again as one system. GMRES detects this as soon as one sample has converged before another; otherwise one
    more product gives ||g + A u - u||, which is compared with the tolerance. On tensors without numbers (meta, fake)
    one product replaces the solve.
    """

    solver: AbstractSolver[Any] | GMRES
    stop: Stop
    on_failure: Literal["warn", "raise", "ignore"]
    report: Callable[[Solution], None] | None  # called with the solution of every solve
    eps: float = 0.0  # relative rounding error of a product
    preconditioner: Act | None = None  # v -> P v, where P approximates (I - A)^-1
    guess: Flat | None = None  # first guess of u
    keep: Callable[[Flat], None] | None = None  # called with u

    def plain(self) -> "LinearSolve":
        """The same settings for another system: without preconditioner, guess and `keep`."""
        return replace(self, preconditioner=None, guess=None, keep=None)

    def __call__(self, act: Act, g: Flat) -> Flat:
        if is_abstract(g):
            return g + act(g)
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            scale = _power_of_two(g)
            start = None if self.guess is None else self._start(act, g / scale, self.guess / scale)
            solve = self._where_linear(g / scale)
            solution, apart = solve._solve(act, g / scale, start)
            if apart is None and len(g) > 1:
                solution, apart = solve._check(act, g, scale, solution)
            if apart is False:
                scale = _power_of_two(g.reshape(1, -1))
                solution = self._together(act, g / scale, solution.evals)
            if self.report is not None:
                self.report(solution)
            if self.on_failure != "ignore":
                self._report_failure(solution)
            u = solution.value * scale
            if self.keep is not None:
                self.keep(u)
            return u

    def _where_linear(self, g: Flat) -> "LinearSolve":
        """The settings without the preconditioner P for the samples in which it is not linear, with a warning.

        The solve combines vectors P v and would report the residual of a linear P. Tested is P (g - c q) = P g - c P q
        up to the tolerance, for a fixed q without symmetry and c = 1.7: no product with A is needed.
        """
        precondition = self.preconditioner
        if precondition is None:
            return self
        q = torch.arange(g.shape[1], device=g.device, dtype=g.dtype).cos().expand_as(g)
        one, two, both = precondition(g), precondition(q), precondition(g - 1.7 * q)
        allowed = max(self.stop.rtol, 100 * torch.finfo(g.dtype).eps) * (norm(one) + 1.7 * norm(two))
        linear = (norm(both - one + 1.7 * two) <= allowed) | ~g.isfinite().all(dim=1)
        if linear.all():
            return self
        if self.on_failure != "ignore":
            warnings.warn(_NOT_LINEAR, RuntimeWarning, stacklevel=2)
        return replace(self, preconditioner=lambda v: torch.where(linear.unsqueeze(1), precondition(v), v))

    def _start(self, act: Act, g: Flat, u: Flat) -> tuple[Flat, Flat]:
        """The guess u and its residual, by one product; zero and g for samples whose residual is not below ||g||."""
        rest = g + act(u) - u
        helps = (norm(rest) < norm(g)).unsqueeze(1)
        return torch.where(helps, u, 0), torch.where(helps, rest, g)

    def _solve(self, act: Act, g: Flat, start: tuple[Flat, Flat] | None = None) -> tuple[Solution, bool | None]:
        """The solution, and whether the samples are systems of their own (None: not known).

        With a preconditioner P, u = u_0 + P w and (I - A) P w = r_0, which is w = r_0 + (w - P w + A P w).
        """
        u, rest = (None, g) if start is None else start
        precondition = self.preconditioner

        def act_on_w(w: Flat) -> Flat:
            v = w if precondition is None else precondition(w)
            return act(v) if precondition is None else w - v + act(v)

        apart: bool | None = None
        if isinstance(self.solver, GMRES):
            size = None if u is None else norm(u)
            found, apart = self.solver.apart(act_on_w, rest, self.stop, self.eps, size, norm(g))
        elif precondition is None:
            found = iterate(lambda v: g + act(v), g if u is None else u, self.solver, self.stop)
            u = None  # the value of the iteration, which began at u, is not a correction
        else:
            found = iterate(lambda w: rest + act_on_w(w), rest, self.solver, self.stop)
        w = found.value if precondition is None else precondition(found.value)
        products = found.evals + (start is not None)
        return replace(found, value=w if u is None else u + w, evals=products), apart

    def _check(self, act: Act, g: Flat, scale: Tensor, found: Solution) -> tuple[Solution, bool]:
        """The solution, solved on where a measured residual is too large, and whether the samples are separate."""
        u, found = found.value, replace(found, evals=found.evals + 1)
        rest = (g + act(u * scale)) / scale - u
        rtol = max(self.stop.rtol, self.eps, torch.finfo(g.dtype).eps)
        wrong = ~(norm(rest) <= _SLACK * (self.stop.atol + rtol * norm(u))) & (found.result != Result.NONFINITE)
        if not wrong.any():
            return found, True
        if _couples(act, g, wrong):
            return found, False
        wrong &= found.converged
        if not wrong.any():
            return found, True
        more = self._solve(act, rest * wrong.unsqueeze(1))[0]
        return replace(more, value=u + more.value, evals=found.evals + more.evals), True

    def _together(self, act: Act, g: Flat, spent: Tensor) -> Solution:
        """The whole batch as one system."""
        if self.on_failure != "ignore":
            warnings.warn(_COUPLED, RuntimeWarning, stacklevel=2)
        whole = self.plain()._solve(lambda u: act(u.view_as(g)).reshape(1, -1), g.reshape(1, -1))[0]
        residual, result = (t.expand(len(g)) for t in (whole.residual, whole.result))
        return Solution(value=whole.value.view_as(g), residual=residual, result=result, evals=spent + whole.evals)

    def _report_failure(self, solution: Solution) -> None:
        try:
            solution.check()
        except NotConverged as failure:
            if self.on_failure == "raise":
                raise NotConverged(f"{_INEXACT} {failure}") from None
            kinds = sorted({Result(code) for code in solution.result.tolist()} - {Result.CONVERGED})
            advice = " ".join(f"{kind.name}: {kind.message}" for kind in kinds)
            # One text for all such failures, so that the default filter shows it once.
            warnings.warn(
                f"{_INEXACT} {advice} IFT(report=...) is called with every solve.", RuntimeWarning, stacklevel=2
            )


_NOT_LINEAR = (
    "IFT.preconditioner is not linear (or random, rounded to a narrower dtype, or not finite), so the backward pass "
    "was solved without it: pass a linear function, such as the inverse of a matrix."
)
_INEXACT = "The linear solve of the IFT backward pass failed for some samples, so their gradient is inexact."
_COUPLED = (
    "f takes one sample of the batch into another (batch normalization in training mode, a mean over the batch). The "
    "backward pass solved the whole batch as one system, which is exact but slower; the forward pass took each sample "
    "for a system of its own: pass batch_dims=0."
)


def _power_of_two(g: Flat) -> Tensor:
    size = torch.linalg.vector_norm(g, ord=torch.inf, dim=1, keepdim=True)
    return torch.where(size > 0, torch.exp2(torch.floor(torch.log2(size))), 1.0)


def _couples(act: Act, g: Flat, wrong: Tensor) -> bool:
    """Whether A takes other samples into a wrong one: by its product with a vector that is zero in the wrong one."""
    sample = int(wrong.to(torch.uint8).argmax())
    others = torch.arange(g.numel(), device=g.device, dtype=g.dtype).cos().view_as(g)
    others[sample] = 0
    return bool(act(others)[sample].any())
