"""A coupled iteration that can be run backwards: the gradient of every step, from the memory of the last one.

Setting: 0 < b < 1 and y_0 = z_0. A step and its exact inverse are

    y' = (1 - b) y + b f(z)              z = (z' - b f(y')) / (1 - b)
    z' = (1 - b) z + b f(y')             y = (y' - b f(z)) / (1 - b)

and the answer is f(z_n). The inverse divides errors by up to (1 - b)^2n, so y and z are kept in float64.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.grads.approximate import refuse_transforms
from implicit.grads.base import AbstractGrad
from implicit.grads.outside import Outside, explicit, unseen
from implicit.iterate import Loop, Map, PackedMap, Stop
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.state import Flat, Layout, State, norm

Phi = Callable[..., Flat]
_RUNNING = -1


@dataclass(frozen=True)
class Reversible(AbstractGrad):
    """Run the coupled reversible iteration, and run it backwards in the backward pass.

        y' = (1 - beta) y + beta f(z),     z' = (1 - beta) z + beta f(y'),     value f(z_n)

    Drops nothing: the gradient of the iteration as it was run, converged or not, the starting state included; at
    convergence it is that of the fixed point. It is an iteration of its own, so the `solver` plays no part; a sample
    stops by `Stop` at its own step. Memory: three states, whatever the number of steps. Cost: two evaluations a step
    forward; two evaluations and two vector-Jacobian products a step backward.

    The inverse is exact on paper. In floating point an error grows by up to (1 - beta)^-2 per step; y and z are
    therefore held in float64, which carries some 26 steps at beta = 0.5 and 11 at 0.8. Where the iteration contracts
    fast, earlier steps, reached last, hardly matter; on a slow one (spectral radius 0.94, 100 steps) the gradient is
    off by some percent. The error is estimated from the reversed start, and `on_drift` says what happens beyond
    `tolerance`.

    When to use: f must be deterministic (no fresh dropout) and its iteration short; where the gradient of few,
    unconverged steps is wanted at constant memory. Not differentiable twice.

    Source: "Reversible Deep Equilibrium Models", arXiv 2509.12917.

    Args:
        beta: share of the new value, in (0, 1).
        on_drift: "warn", "raise" `FloatingPointError` or "ignore" when the way back was lost.
        tolerance: largest estimated relative error of a sample's gradient that passes.
    """

    beta: float = 0.5
    on_drift: Literal["warn", "raise", "ignore"] = "warn"
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"Reversible.beta must lie in (0, 1), got {self.beta}.")
        if self.on_drift not in ("warn", "raise", "ignore"):
            raise ValueError(f'Reversible.on_drift must be "warn", "raise" or "ignore", got {self.on_drift!r}.')
        if not self.tolerance > 0:
            raise ValueError(f"Reversible.tolerance must be positive, got {self.tolerance}.")

    def __call__(
        self,
        f: Map,
        z0: State,
        args: tuple[Any, ...],
        solver: AbstractSolver[Any],
        stop: Stop,
        loop: Loop = Loop(),
    ) -> Solution:
        if replace(loop, batch_dims=1, trace=False) != Loop():
            raise ValueError(
                "Reversible runs an iteration of its own: leave state, keep_state, compact, callback and "
                "progress unset."
            )
        refuse_transforms(self)
        layout = Layout.of(z0, loop.batch_dims)
        phi = PackedMap(f, args, layout)
        start = layout.pack(z0)
        first, theta = _first(phi, start) if torch.is_grad_enabled() else (None, ())
        with torch.no_grad():
            run = _Run(phi, start, first, self.beta, stop, loop.trace)
        value = run.value
        if theta or (torch.is_grad_enabled() and start.requires_grad):
            value = _Reverse.apply(start, explicit(phi, theta), run, self, *theta)
        return Solution(
            value=layout.unpack(value),
            residual=run.residual,
            result=run.result,
            evals=1 + 2 * run.steps,
            trace=torch.stack(run.trace) if loop.trace else None,
        )


@torch.compiler.disable(recursive=True)  # dynamo cannot watch phi run
def _first(phi: Phi, start: Flat) -> tuple[Flat, tuple[Tensor, ...]]:
    """phi(start) and what phi closes over, found by watching it make a graph, which is thrown away."""
    with torch.enable_grad(), Outside() as seen:
        x = start.detach().requires_grad_().view_as(start)
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

    def __init__(self, phi: Phi, start: Flat, first: Flat | None, beta: float, stop: Stop, trace: bool) -> None:
        rows = start.shape[0]
        self.y = self.z = start.double()
        self.steps = torch.zeros(rows, dtype=torch.int64, device=start.device)
        self.result = torch.full((rows,), _RUNNING, dtype=torch.int8, device=start.device)
        self.trace: list[Tensor] = []
        narrow = start.dtype
        fz = phi(start) if first is None else first
        self._judge(fz, stop, trace)
        for _ in range((stop.max_evals - 1) // 2):
            running = self.result == _RUNNING
            if stop.has_tolerance and not running.any():
                break
            y = torch.lerp(self.y, fz.double(), beta)
            fy = phi(y.to(narrow))
            z = torch.lerp(self.z, fy.double(), beta)
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
        ctx.save_for_backward(start, run.y, run.z, run.steps, *theta)
        return run.value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("Reversible cannot be differentiated twice (create_graph=True): use IFT or Unrolled.")
        start, y, z, steps, *theta = ctx.saved_tensors
        pull = _Pull(ctx.phi, theta, start.dtype)
        beta = ctx.grad.beta
        everywhere = torch.ones_like(steps, dtype=torch.bool).unsqueeze(1)
        _, z_bar = pull(z, grads[0].double(), everywhere)
        y_bar = torch.zeros_like(z_bar)
        sizes = []
        for k in range(int(steps.max()) if len(steps) else 0, 0, -1):
            go = (steps >= k).unsqueeze(1)  # the samples that took step k
            sizes.append(norm(y_bar) + norm(z_bar))
            fy, bar = pull(y, beta * z_bar, go)
            y_bar = y_bar + bar
            z_before = torch.where(go, (z - beta * fy) / (1 - beta), z)
            fz, bar = pull(z_before, beta * y_bar, go)
            y = torch.where(go, (y - beta * fz) / (1 - beta), y)
            z_bar = torch.where(go, (1 - beta) * z_bar + bar, z_bar)
            y_bar = torch.where(go, (1 - beta) * y_bar, y_bar)
            z = z_before
        _judge_drift(ctx.grad, start, (y, z), steps, sizes)
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
        with torch.enable_grad():
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


def _judge_drift(
    grad: Reversible, start: Flat, back: tuple[Tensor, Tensor], steps: Tensor, sizes: list[Tensor]
) -> None:
    """Estimate the gradient's error from how far the start found by running backwards is from the true one.

    Going back one step multiplies a rounding error by up to (1 - beta)^-2 (spectral radius 1), and never beyond that
    distance. Each step's share of the gradient, of the size of the adjoint there, is off by the error there.
    """
    if grad.on_drift == "ignore" or not sizes:
        return
    true = start.double()
    size = norm(true) + math.sqrt(true.shape[1])
    off = torch.maximum(norm(back[0] - true), norm(back[1] - true)) / size
    eps = torch.finfo(torch.float64).eps
    off = torch.nan_to_num(off, nan=torch.inf).clamp(eps, 1e290)
    back_to = torch.arange(len(sizes), 0, -1, device=steps.device).unsqueeze(1)
    done = (steps - back_to + 1).clamp(min=0)  # steps gone back
    growth = torch.exp(math.log(eps) - 2 * math.log1p(-grad.beta) * done)
    drift = torch.where(done > 0, torch.minimum(growth, off), 0.0).clamp(max=1.0)
    # Adjoints taken at a lost state mean nothing: from there on the last good one stands for them.
    good = (done > 0) & (drift < 0.1)
    shares = torch.cummin(torch.where(good, torch.stack(sizes), torch.inf), dim=0).values
    shares = torch.where(done > 0, shares, 0.0)
    error = (drift * shares).sum(0) / shares.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    worst = float(torch.nan_to_num(error, nan=torch.inf).max())
    if worst <= grad.tolerance:
        return
    text = (
        f"Running the reversible iteration backwards missed its start by {float(off.max()):.2g} (relative), so this "
        f"gradient is off by about {worst:.2g}: take fewer steps (Stop.max_evals), a smaller beta than {grad.beta}, or "
        "another estimator."
    )
    if grad.on_drift == "raise":
        raise FloatingPointError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=2)
