"""A coupled iteration that can be run backwards: the gradient of every step, from the memory of the last one.

Setting: 0 < b < 1 and y_0 = z_0. A step and its exact inverse are

    y' = (1 - b) y + b f(z)              z = (z' - b f(y')) / (1 - b)
    z' = (1 - b) z + b f(y')             y = (y' - b f(z)) / (1 - b)

and the answer is f(z_n). The inverse divides errors by up to (1 - b)^2n, so y and z are kept in float64.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.autodiff.approximate import refuse_transforms
from implicit.autodiff.closure_convert import Outside, explicit, unseen
from implicit.autodiff.no_grad import constant, uncached
from implicit.evaluation import FlatMap
from implicit.grads.base import AbstractGrad
from implicit.options import SolveOptions
from implicit.pytree import Flat, Layout, Map, State, norm
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop

Phi = Callable[..., Flat]
_RUNNING = -1
_FAR = 1e4  # relative; a way back that misses by more says nothing of when it was lost


@dataclass(frozen=True)
class Reversible(AbstractGrad):
    """Run the coupled reversible iteration, and run it backwards in the backward pass.

        y' = (1 - beta) y + beta f(z),     z' = (1 - beta) z + beta f(y'),     value f(z_n)

    Drops nothing: the gradient of the iteration as it was run, converged or not, the starting state included; at
    convergence it is that of the fixed point. It is an iteration of its own, so the `solver` plays no part; a sample
    stops by `Stop` at its own step. Memory: three states in float64, whatever the number of steps, and two more for
    every `anchor` steps. Cost: two evaluations a step forward; two evaluations and two vector-Jacobian products a step
    backward.

    The inverse is exact on paper. In floating point, going back a step multiplies an error by up to (1 - beta)^-2, and
    float64 carries some 26 steps at beta = 0.5 and 11 at 0.8. Earlier steps, reached last, hardly matter where the
    iteration contracts fast, and everything where it does not. Relative error of the gradient, solved to 1e-6 in
    float64, against the same iteration unrolled (about the same for beta = 0.3 and 0.8, which take more and fewer
    steps):

        layer (spectral radius)   steps   without anchors   anchor=12
        tanh (0.32)               27      3e-13             5e-16
        adaLN (0.55)              38      9e-07             4e-15
        tanh (0.94)               270     2e-02             1e-12

    The error is estimated from how far the way back misses the start (and each anchor), and `on_drift` says what
    happens beyond `tolerance`.

    When to use: where even one evaluation's graph at a time is wanted with the exact gradient of few, unconverged
    steps. f must be deterministic (no fresh dropout). Not differentiable twice.

    Source: "Reversible Deep Equilibrium Models", arXiv 2509.12917.

    Args:
        beta: share of the new value, in (0, 1).
        on_drift: "warn", "raise" `FloatingPointError` or "ignore" when the way back was lost.
        tolerance: largest estimated relative error of a sample's gradient that passes.
        anchor: keep the pair every so many steps, >= 1, for exact gradients of any length; None: never.
    """

    beta: float = 0.5
    on_drift: Literal["warn", "raise", "ignore"] = "warn"
    tolerance: float = 1e-3
    anchor: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"Reversible.beta must lie in (0, 1), got {self.beta}.")
        if self.on_drift not in ("warn", "raise", "ignore"):
            raise ValueError(f'Reversible.on_drift must be "warn", "raise" or "ignore", got {self.on_drift!r}.')
        if not self.tolerance > 0:
            raise ValueError(f"Reversible.tolerance must be positive, got {self.tolerance}.")
        if self.anchor is not None and self.anchor < 1:
            raise ValueError(f"Reversible.anchor must be at least 1 or None, got {self.anchor}.")

    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        options: SolveOptions = SolveOptions(),
    ) -> Solution:
        if replace(options, batch_dims=1, trace=False) != SolveOptions():
            raise ValueError(
                "Reversible runs an iteration of its own: leave state, keep_state, compact, callback and "
                "progress unset."
            )
        refuse_transforms(self)
        layout = Layout.of(z0, options.batch_dims)
        phi = FlatMap(f, args, layout)
        start = layout.pack(z0)
        first, theta = _first(phi, start) if torch.is_grad_enabled() else (None, ())
        with constant():
            run = _Run(phi, start, first, self, stop, options.trace)
        value = run.value
        if theta or (torch.is_grad_enabled() and start.requires_grad):
            value = _Reverse.apply(start, explicit(phi, theta), run, self, *theta)
        return Solution(
            value=layout.unpack(value),
            residual=run.residual,
            result=run.result,
            evals=1 + 2 * run.steps,
            trace=torch.stack(run.trace) if options.trace else None,
        )


@torch.compiler.disable(recursive=True)  # dynamo cannot watch phi run
def _first(phi: Phi, start: Flat) -> tuple[Flat, tuple[Tensor, ...]]:
    """phi(start) and what phi closes over, found by watching it make a graph, which is thrown away."""
    with torch.enable_grad(), uncached():  # as in the backward pass, which finds the same tensors
        seen = Outside()
        x = start.detach().requires_grad_().view_as(start)
        with seen:
            y = phi(x)
    if unseen(y, (x, *seen.tensors)):
        raise ValueError(
            "Reversible needs every tensor that f closes over, and one is used where it cannot be seen (in a "
            "compiled function or a custom autograd.Function): pass it to fixed_point through `args`."
        )
    return y.detach(), seen.tensors


class _Run:
    """The iteration, every sample until it has converged, failed or spent the budget; then it is held.

    The loop of `implicit.iterate` returns the best iterate; a run that will be reversed needs its very last pair and
    the number of steps each sample took.
    """

    def __init__(self, phi: Phi, start: Flat, first: Flat | None, grad: Reversible, stop: Stop, trace: bool) -> None:
        rows = start.shape[0]
        self.y = self.z = start.double()
        self.steps = torch.zeros(rows, dtype=torch.int64, device=start.device)
        self.result = torch.full((rows,), _RUNNING, dtype=torch.int8, device=start.device)
        self.trace: list[Tensor] = []
        self.anchors: list[Tensor] = []  # y, z after every `anchor` steps
        narrow = start.dtype
        fz = phi(start) if first is None else first
        self._judge(fz, stop, trace)
        for k in range((stop.max_evals - 1) // 2):
            running = self.result == _RUNNING
            if stop.has_tolerance and not running.any():
                break
            if grad.anchor and k and k % grad.anchor == 0:
                self.anchors += [self.y, self.z]
            y = torch.lerp(self.y, fz.double(), grad.beta)
            fy = phi(y.to(narrow))
            z = torch.lerp(self.z, fy.double(), grad.beta)
            moved = phi(z.to(narrow))
            lost = ~(torch.isfinite(norm(fy)) & torch.isfinite(norm(moved)))
            self.result = torch.where(running & lost, int(Result.NONFINITE), self.result)
            go = (running & ~lost).unsqueeze(1)
            self.y, self.z = torch.where(go, y, self.y), torch.where(go, z, self.z)
            fz = torch.where(go, moved, fz)
            self.steps = self.steps + go.squeeze(1)
            self._judge(fz, stop, trace)
        self.result = torch.where(self.result == _RUNNING, int(Result.MAX_EVALS), self.result)
        self.value = torch.where(torch.isfinite(norm(fz)).unsqueeze(1), fz, start)

    def _judge(self, fz: Flat, stop: Stop, trace: bool) -> None:
        size = norm(fz)
        self.residual = norm(fz - self.z.to(fz.dtype))
        running = self.result == _RUNNING
        if trace:
            self.trace.append(torch.where(running, self.residual, torch.nan))
        small = self.residual <= stop.atol + stop.rtol * size
        self.result = torch.where(running & small & torch.isfinite(size), int(Result.CONVERGED), self.result)
        self.result = torch.where(running & ~torch.isfinite(size), int(Result.NONFINITE), self.result)


class _Reverse(torch.autograd.Function):
    """f(z_n) as a function of the start and of theta; the backward pass runs the iteration backwards."""

    @staticmethod
    def forward(ctx: Any, start: Flat, phi: Phi, run: _Run, grad: Reversible, *theta: Tensor) -> Tensor:
        ctx.phi, ctx.grad = phi, grad
        ctx.anchors = len(run.anchors)
        ctx.save_for_backward(start, run.y, run.z, run.steps, *run.anchors, *theta)
        return run.value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("Reversible cannot be differentiated twice (create_graph=True): use IFT or Unrolled.")
        start, y, z, steps, *more = ctx.saved_tensors
        anchors, theta = more[: ctx.anchors], more[ctx.anchors :]
        pull = _Pull(ctx.phi, theta, start.dtype)
        beta, every = ctx.grad.beta, ctx.grad.anchor
        _, z_bar = pull(z, grads[0].double(), torch.ones_like(steps, dtype=torch.bool).unsqueeze(1))
        y_bar = torch.zeros_like(z_bar)
        drift = _Drift(steps, beta)
        for k in range(int(steps.max()) if len(steps) else 0, 0, -1):
            if every and k % every == 0 and 2 * k <= every * len(anchors):
                at = 2 * (k // every)
                drift.measure(anchors[at - 2 : at], (y, z))
                y, z = anchors[at - 2 : at]
            go = (steps >= k).unsqueeze(1)  # the samples that took step k
            drift.step(norm(y_bar) + norm(z_bar), go.squeeze(1))
            fy, bar = pull(y, beta * z_bar, go)
            y_bar = y_bar + bar
            z_before = torch.where(go, (z - beta * fy) / (1 - beta), z)
            fz, bar = pull(z_before, beta * y_bar, go)
            y = torch.where(go, (y - beta * fz) / (1 - beta), y)
            z_bar = torch.where(go, (1 - beta) * z_bar + bar, z_bar)
            y_bar = torch.where(go, (1 - beta) * y_bar, y_bar)
            z = z_before
        drift.measure((start.double(), start.double()), (y, z))
        drift.judge(ctx.grad)
        return ((y_bar + z_bar).to(start.dtype), None, None, None, *pull.theta_bar)


class _Pull:
    """Evaluates phi once with a graph and takes one vector-Jacobian product; theta's share is summed up."""

    def __init__(self, phi: Phi, theta: list[Tensor], dtype: torch.dtype) -> None:
        self.phi, self.dtype = phi, dtype
        self.stands = [t.detach().requires_grad_() for t in theta]
        self.theta_bar: list[Tensor | None] = [None] * len(theta)

    def __call__(
        self, at: Float[Tensor, "B N"], v: Float[Tensor, "B N"], rows: Bool[Tensor, "B 1"]
    ) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N"]]:
        """(phi(at), v^T dphi/dz), the rows not wanted giving 0."""
        with torch.enable_grad(), uncached():
            x = at.to(self.dtype).requires_grad_()
            image = self.phi(x, *self.stands)
        if not image.requires_grad:
            return image.double(), torch.zeros_like(at)
        v = torch.where(rows, v, 0.0).to(image.dtype)
        x_bar, *theta_bar = torch.autograd.grad(image, (x, *self.stands), v, allow_unused=True)
        for i, new in enumerate(theta_bar):
            old = self.theta_bar[i]
            self.theta_bar[i] = new if old is None else old if new is None else old + new
        x_bar = torch.zeros_like(at) if x_bar is None else x_bar.double()
        return image.detach().double(), x_bar


class _Drift:
    """The gradient's error, estimated from how far the states found by running backwards are from the true ones.

    Between two true states an error is taken to grow from rounding to what is measured by a constant factor a step; by
    (1 - beta)^-2, the worst, where the way back ended far off (it was lost long before). Each step's share of the
    gradient, of the size of the adjoint there, is off by the error there.
    """

    def __init__(self, steps: Tensor, beta: float) -> None:
        self.worst = (1 - beta) ** -2
        self.wrong = torch.zeros(len(steps), dtype=torch.float64, device=steps.device)
        self.total = torch.zeros_like(self.wrong)
        self.shares: list[Tensor] = []  # since the last true state

    def step(self, share: Tensor, go: Tensor) -> None:
        """Take in the size of the adjoint at a step, for the samples that took it."""
        self.shares.append(torch.where(go, share, 0.0))

    def measure(self, true: Sequence[Tensor], found: tuple[Tensor, Tensor]) -> None:
        """Compare the states with the true ones."""
        if not self.shares:
            return
        eps = torch.finfo(torch.float64).eps
        size = norm(true[0]) + math.sqrt(true[0].shape[1])
        off = torch.maximum(norm(found[0] - true[0]), norm(found[1] - true[1])) / size
        off = torch.nan_to_num(off, nan=torch.inf).clamp(eps, 1e290)
        shares = torch.stack(self.shares)
        taken = (shares > 0).cumsum(0)
        factor = torch.where(off > _FAR, self.worst, (off / eps) ** (1 / taken[-1].clamp(min=1)))
        error = eps * factor**taken
        error = torch.where(shares > 0, error, 0.0).clamp(max=1.0)
        # Adjoints taken at a lost state mean nothing: from there on the last good one stands for them.
        good = torch.cummin(torch.where(error < 0.1, shares, torch.inf), dim=0).values
        shares = torch.where((error < 0.1) | ~good.isfinite(), shares.nan_to_num(nan=1e290), good)
        self.wrong += (error * shares).sum(0)
        self.total += shares.sum(0)
        self.shares = []

    def judge(self, grad: Reversible) -> None:
        """Say it, where too much was lost."""
        error = self.wrong / self.total.clamp(min=torch.finfo(torch.float64).tiny)
        if grad.on_drift == "ignore" or not len(error) or not float(error.max()) > grad.tolerance:
            return
        # One text, so that the default filter of warnings shows it once.
        text = (
            "Running the reversible iteration backwards missed its start so far that the gradient's estimated relative "
            f"error is above Reversible.tolerance={grad.tolerance:g}: set Reversible.anchor (12 at beta=0.5), take "
            "fewer steps (Stop.max_evals), or another estimator."
        )
        if grad.on_drift == "raise":
            raise FloatingPointError(f"{text} It is about {float(error.max()):.2g}.")
        warnings.warn(text, RuntimeWarning, stacklevel=2)
