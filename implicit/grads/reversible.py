"""A coupled iteration that can be run backwards: the gradient of every step, from the memory of the last one.

Setting: 0 < b < 1 and y_0 = z_0. A step and its exact inverse are

    y' = (1 - b) y + b f(z)              z = (z' - b f(y')) / (1 - b)
    z' = (1 - b) z + b f(y')             y = (y' - b f(z)) / (1 - b)

and the answer is f(z_n). The inverse divides errors by up to (1 - b)^2n, so y and z are kept in float64.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit.autodiff.autocast import rounding
from implicit.autodiff.batched import is_batched
from implicit.autodiff.closure_convert import SameReads
from implicit.autodiff.functorch import refuse_transforms
from implicit.evaluation import FlatMap
from implicit.grads.base import AbstractGrad
from implicit.options import Problem, SolveOptions
from implicit.pytree import Flat, Layout, norm, to_device, to_host
from implicit.recomputation import CHANGED
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Criterion, Stop

_RUNNING = -1
_FAR = 1e4  # relative; a way back that misses by more says nothing of when it was lost


@dataclass(frozen=True)
class Reversible(AbstractGrad):
    """Run the coupled reversible iteration, and run it backwards in the backward pass.

        y' = (1 - beta) y + beta f(z),     z' = (1 - beta) z + beta f(y'),     value f(z_n)

    Drops nothing: the gradient of the iteration as it was run, converged or not, the starting state included; at
    convergence it is that of the fixed point. It is an iteration of its own, so the `solver` plays no part; a sample
    stops by `Stop` at its own step. Memory: three states in float64, whatever the number of steps, and two more for
    every `anchor` steps; a device without float64 (MPS) cannot run it.

    Cost: two evaluations a step forward, and with a tolerance one at the value
    returned, which tests its residual and claim; two evaluations and two vector-Jacobian products a step backward.

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
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        if replace(options, batch_dims=1, trace=callable(options.trace)) != SolveOptions() or stop.when is not None:
            raise ValueError(
                "Reversible runs an iteration of its own: leave state, keep_state, compact, callback, progress and "
                "Stop.when unset, and trace True or False."
            )
        refuse_transforms(self)
        layout = Layout.of(problem.z0, options.batch_dims)
        flat = FlatMap(problem.f, problem.args, layout)
        run = _Run(flat, layout.pack(problem.z0), self, stop)
        value = run.forward(bool(options.trace))
        return Solution(
            value=layout.unpack(value),
            residual=run.residual,
            result=run.result,
            evals=1 + 2 * run.steps + run.verified,
            trace=torch.stack(run.trace) if options.trace else None,
        )


class _Run:
    """The iteration, every sample until it has converged, failed or spent the budget; then it is held.

    The loop of `implicit.iterate` returns the best iterate; a run that will be reversed needs its very last pair and
    the number of steps each sample took.

    Evaluation 2k is f(z_k) and evaluation 2k - 1 is f(y_k). The graph of each is built without its saved tensors, as
    `torch.utils.checkpoint` does, and without its input too: when the engine asks for the saved tensors of evaluation
    j, the run goes back from where it is to the input of evaluation j, and evaluates f there again.
    """

    def __init__(self, flat: FlatMap, start: Flat, grad: Reversible, stop: Stop) -> None:
        self.flat, self.grad, self.stop = flat, grad, stop
        self.start, self.narrow = start, start.dtype
        self.criterion = Criterion(stop, flat.layout)
        self.verified = 0  # evaluations at the value returned
        self.steps = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        self.result = torch.full_like(self.steps, _RUNNING, dtype=torch.int8)
        self.trace: list[Tensor] = []
        self.anchors: list[Tensor] = []  # y, z after every `anchor` steps

    def forward(self, trace: bool) -> Flat:
        """f(z_n), attached to the graph of all evaluations if autograd is on."""
        # values and, with the suffix _node, their places in the graph: samples that fail have other values there
        y = z = self.start.detach().double()
        y_node = z_node = self.start.double()
        f_node = self._evaluate(0, z_node)
        fz = f_node.detach()
        self._judge(fz, z, trace)
        for k in range(1, (self.stop.max_evals - 1) // 2 + 1):
            running = self.result == _RUNNING
            if self.stop.has_tolerance and not running.any():
                break
            if self.grad.anchor and k > 1 and (k - 1) % self.grad.anchor == 0:
                self.anchors += [y, z]
            # y' = (1 - b) y + b f(z), z' = (1 - b) z + b f(y')
            y_node = _Step.apply(y_node, f_node, y, fz, running, self, k)
            f_node = self._evaluate(2 * k - 1, y_node)
            fy = f_node.detach()
            z_node = _Step.apply(z_node, f_node, z, fy, running, self, k)
            f_node = self._evaluate(2 * k, z_node)
            moved = f_node.detach()
            # samples with a value that is not finite have failed and stay where they were
            lost = ~(torch.isfinite(norm(fy)) & torch.isfinite(norm(moved)))
            self.result = torch.where(running & lost, int(Result.NONFINITE), self.result)
            go = (running & ~lost).unsqueeze(1)
            y, z = torch.where(go, y_node.detach(), y), torch.where(go, z_node.detach(), z)
            fz = torch.where(go, moved, fz)
            self.steps = self.steps + go.squeeze(1)
            self._judge(fz, z, trace)
        self.result = torch.where(self.result == _RUNNING, int(Result.MAX_EVALS), self.result)
        value = torch.where(torch.isfinite(norm(fz)).unsqueeze(1), fz, self.start.detach())
        self._verify(value)
        if f_node.requires_grad:
            value = _End.apply(f_node, value, y, z, self.start.detach(), self, *self.anchors)
        del self.start, self.anchors  # saved for the backward pass, if there is one
        return value

    def _judge(self, fz: Flat, z: Flat, trace: bool) -> None:
        size, small = norm(fz), self._meets_tolerance(fz, z)
        running = self.result == _RUNNING
        if trace:
            self.trace.append(torch.where(running, self.residual, torch.nan))
        self.result = torch.where(running & small & torch.isfinite(size), int(Result.CONVERGED), self.result)
        self.result = torch.where(running & ~torch.isfinite(size), int(Result.NONFINITE), self.result)

    def _meets_tolerance(self, fz: Flat, z: Flat) -> Tensor:
        """(B,) whether the criterion of `Stop` holds at z; sets `residual`."""
        r, criterion = fz - z.to(fz.dtype), self.criterion
        if not self.stop.has_tolerance:
            sizes = criterion.measure(r, scaled=True)
            self.residual = sizes if sizes.ndim == 1 else sizes.amax(dim=1)
            return (r == 0).all(dim=1) & (len(r) == 1)  # f may couple samples that go on
        r_size, s_size = (to_host(criterion.measure(x, scaled=True)) for x in (r, fz))
        if not isinstance(criterion.first, np.ndarray):
            criterion.first = np.where(np.isfinite(s_size), s_size, 0.0)
        residual, _, tolerance = criterion.compare(r_size, s_size, criterion.first)
        self.residual = to_device(residual, fz.device, fz.dtype)
        return to_device(residual <= tolerance, fz.device)

    def _verify(self, value: Flat) -> None:
        """Residual and claims of convergence at f(z_n), which is returned, by one evaluation more."""
        if not self.stop.has_tolerance:
            return
        before = self.residual
        with torch.no_grad():
            small = self._meets_tolerance(self.flat(value), value)
        self.residual = torch.where(torch.isfinite(self.residual), self.residual, before)
        lost = (self.result == int(Result.CONVERGED)) & ~small
        self.result = torch.where(lost, int(Result.MAX_EVALS), self.result)
        self.verified = 1

    def _evaluate(self, index: int, at: Float[Tensor, "B N"]) -> Flat:
        if not torch.is_grad_enabled():
            return self.flat(at.to(self.narrow))
        with set_checkpoint_early_stop(False):  # the value is needed too
            return checkpoint(
                _Evaluation(self, index, at.to(self.narrow)), use_reentrant=False, preserve_rng_state=False
            )

    # -- backward

    def begin(self, saved: Sequence[Tensor]) -> None:
        """Stand at the end of the run, with a backward pass before it."""
        self.value, self.y, self.z, self.begun, *self.true = saved
        self.last = self.at = 2 * (int(self.steps.max()) if len(self.steps) else 0)
        self.image: Tensor | None = None  # of the evaluation that the run stands at
        self.drift = _Drift(self.steps, self.grad.beta)

    def rewind(self, index: int) -> Float[Tensor, "B N"]:
        """The input of an evaluation, found by running backwards."""
        while self.at > index:
            self._back()
        return self.y if self.at % 2 else self.z

    def _back(self) -> None:
        """From evaluation `at` to the one before."""
        k, beta = (self.at + 1) // 2, self.grad.beta
        if self.at == self.last:
            self._anchor(self.at // 2)
        elif self.at % 2:
            # z = (z' - b f(y')) / (1 - b) for the samples that took step k
            go = (self.steps >= k).unsqueeze(1)
            self.z = torch.where(go, (self.z - beta * self._value(self.y)) / (1 - beta), self.z)
        else:
            # y = (y' - b f(z)) / (1 - b), y' of step k + 1
            go = (self.steps >= k + 1).unsqueeze(1)
            self.y = torch.where(go, (self.y - beta * self._value(self.z)) / (1 - beta), self.y)
            self._anchor(k)
        self.at, self.image = self.at - 1, None

    def _value(self, at: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """f where the run stands, in float64."""
        if self.image is None:
            with torch.no_grad():
                self.image = self.flat(at.to(self.narrow))
        return self.image.double()

    def _anchor(self, k: int) -> None:
        """Take the pair after k steps as it was kept, if it was."""
        every = self.grad.anchor
        if every and k and k % every == 0 and 2 * k <= every * len(self.true):
            pair = self.true[2 * (k // every) - 2 : 2 * (k // every)]
            self.drift.measure(pair, (self.y, self.z))
            self.y, self.z = pair

    def evaluated(self, index: int, image: Flat) -> None:
        """Take in f of an evaluation that was made again."""
        if index == self.last:
            # Rows that are not finite compare as equal
            with torch.no_grad():
                eps = rounding(self.flat.f, self.flat.layout)
                if bool((norm(image - self.value) > 1e3 * eps * norm(self.value)).any()):
                    raise RuntimeError(CHANGED)
        self.image = image
        if index == 0 and self.last:
            # back at the start, which is known: y_0 = z_0
            y = (self.y - self.grad.beta * image.double()) / (1 - self.grad.beta)
            y = torch.where((self.steps >= 1).unsqueeze(1), y, self.y)
            self.drift.measure((self.begun.double(), self.begun.double()), (y, self.z))
            self.drift.judge(self.grad)


class _Evaluation:
    """One evaluation of f: first with the input it is given, in the backward pass with the one that the run finds."""

    def __init__(self, run: _Run, index: int, at: Flat) -> None:
        self.run, self.index = run, index
        # the first evaluation is compared with its repetition by the tensors that it reads too
        self.flat = SameReads(run.flat) if index == 0 and not torch.compiler.is_compiling() else run.flat
        self.at: Flat | None = at
        self.differentiated = at.requires_grad

    def __call__(self) -> Flat:
        at, self.at = self.at, None
        if at is not None:
            return self.flat(at)
        at = self.run.rewind(self.index).to(self.run.narrow)
        image = self.flat(at.detach().clone().requires_grad_(self.differentiated))
        self.run.evaluated(self.index, image.detach())
        return image


class _Step(torch.autograd.Function):
    """(1 - b) old + b image, for the samples that take the step."""

    @staticmethod
    def forward(
        ctx: Any, node: Tensor, f_node: Tensor, old: Tensor, image: Tensor, running: Tensor, run: _Run, k: int
    ) -> Tensor:
        ctx.run, ctx.k, ctx.dtype = run, k, f_node.dtype
        return torch.where(running.unsqueeze(1), torch.lerp(old, image.double(), run.grad.beta), old)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        beta, go = ctx.run.grad.beta, (ctx.run.steps >= ctx.k).unsqueeze(1)
        ctx.run.drift.step(ctx.k, norm(g), go.squeeze(1))
        return torch.where(go, (1 - beta) * g, g), torch.where(go, beta * g, 0.0).to(ctx.dtype), *[None] * 5


class _End(torch.autograd.Function):
    """The value of the run, which has the gradient of its last evaluation."""

    @staticmethod
    def forward(
        ctx: Any, f_node: Tensor, value: Tensor, y: Tensor, z: Tensor, start: Tensor, run: _Run, *anchors: Tensor
    ) -> Tensor:
        ctx.run = run
        value = value.clone()
        ctx.save_for_backward(value, y, z, start, *anchors)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("Reversible cannot be differentiated twice (create_graph=True): use IFT or Unrolled.")
        if is_batched(grads[0]):
            raise NotImplementedError(
                "Reversible takes one cotangent at a time, since it runs backwards once: pass vectorize=False and "
                "is_grads_batched=False, or use IFT."
            )
        ctx.run.begin(ctx.saved_tensors)
        return (grads[0], *[None] * (5 + len(ctx.run.true)))


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
        self.k = -1

    def step(self, k: int, share: Tensor, go: Tensor) -> None:
        """Take in the size of the adjoint of y or z at step k, for the samples that took it."""
        share = torch.where(go, share, 0.0)
        if self.k == k and self.shares:
            self.shares[-1] = self.shares[-1] + share
        else:
            self.shares.append(share)
        self.k = k

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
