"""A coupled iteration that can be run backwards.

Setting: 0 < b < 1 and y_0 = z_0. A step and its exact inverse are

    y' = (1 - b) y + b f(z)              z = (z' - b f(y')) / (1 - b)
    z' = (1 - b) z + b f(y')             y = (y' - b f(z)) / (1 - b)

and the answer is f(z_n). The inverse divides errors by up to (1 - b)^2n, so y and z are kept in float64.

A sample that has converged is frozen at its z while the others go on. If f gives another value there later, f couples
the samples: all of them go on from their present pairs as one system, which ends in one evaluation.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit.autodiff.autocast import rounding
from implicit.autodiff.closure_convert import SameReads
from implicit.autodiff.failed_samples import failed, finite
from implicit.autodiff.recomputation import repeated_inexactly, require_same_image, summary
from implicit.evaluation import FlatMap
from implicit.loop.repeated_points import REPEATABLE
from implicit.loop.verification import COUPLED
from implicit.pytree import Flat, norm, scaled_norm, to_device, to_host
from implicit.solution import Result
from implicit.stopping import Criterion, Stop, classify, classify_count
from implicit.torch_internals import is_abstract, split_batched

_RUNNING = -1
_COARSE = 4.0  # `REPEATABLE` in dtypes narrower than float32
_FAR = 1e4  # a larger relative error does not tell at which step the backward run has diverged


class ReversibleIteration:
    """The iteration; each sample runs until it has converged, failed or spent the budget, and is then frozen.

    The loop of `implicit.iterate` returns the best iterate, but the backward run needs the last pair (y, z) and the
    number of steps of each sample.

    Evaluation 2k is f(z_k) and evaluation 2k - 1 is f(y_k). The graph of an evaluation keeps no saved tensors, as in
    `torch.utils.checkpoint`, and not even its input: when the engine unpacks the saved tensors of evaluation j, the
    iteration runs backwards from its present evaluation to the input of evaluation j, and f is evaluated there again.

    Args:
        flat: f on (B, N) matrices.
        start: z_0.
        stop: tolerance and budget.
        beta: b.
        anchor: keep the pair (y, z) after every so many steps; None: keep none.
        report: called at the end of a backward pass with the (B,) estimated relative errors of the gradient.
    """

    def __init__(
        self,
        flat: FlatMap,
        start: Flat,
        stop: Stop,
        beta: float,
        anchor: int | None,
        report: Callable[[Tensor], None],
    ) -> None:
        self.flat, self.stop, self.beta, self.anchor, self.report = flat, stop, beta, anchor, report
        self.start, self.narrow = start, start.dtype
        self.criterion = Criterion(stop, flat.layout)
        self.verified = 0  # evaluations at the value returned, and those that distinguish coupling from noise
        self.joint: bool | None = False  # whether the batch is one system; None: not looked for any more
        self.steps = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        self.went: list[Tensor] = []  # (B,) which samples took each step
        self.result = torch.full_like(self.steps, _RUNNING, dtype=torch.int8)
        self.trace: list[Tensor] = []
        self.anchors: list[Tensor] = []  # y, z after every `anchor` steps

    def forward(self, trace: bool) -> Flat:
        """f(z_n), attached to the graph of all evaluations if autograd is on."""
        # values and, with the suffix _node, their graph nodes, whose values differ in samples that fail
        y = z = self.start.detach().double()
        y_node = z_node = self.start.double()
        f_node = self._evaluate(0, z_node)
        fz = f_node.detach()
        self._classify(fz, z, trace)
        for k in range(1, (self.stop.max_evals - 1) // 2 + 1):
            running = self.result == _RUNNING
            if self.stop.has_tolerance and not running.any():
                break
            if self.anchor and k > 1 and (k - 1) % self.anchor == 0:
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
            lost = (running & lost).any().expand_as(lost) if self.joint else lost
            self.result = torch.where(running & lost, int(Result.NONFINITE), self.result)
            go = (running & ~lost).unsqueeze(1)
            y, z = torch.where(go, y_node.detach(), y), torch.where(go, z_node.detach(), z)
            coupled = self._coupled(running, z, fz, moved)
            fz = moved if coupled else torch.where(go, moved, fz)
            self.steps = self.steps + go.squeeze(1)
            self.went.append(go.squeeze(1))
            self._classify(fz, z, trace)
        self.result = torch.where(self.result == _RUNNING, int(Result.MAX_EVALS), self.result)
        self.answered = finite(fz)  # a norm may overflow where f(z) does not
        value = torch.where(self.answered, fz, self.start.detach())
        self._verify(value)
        if f_node.requires_grad:
            value = _End.apply(f_node, value, y, z, self.start.detach(), self, *self.anchors)
        del self.start, self.anchors  # `_End` has saved them if there is a graph
        return value

    def _coupled(self, running: Tensor, z: Float[Tensor, "B N"], fz: Flat, moved: Flat) -> bool:
        """Whether f gives a frozen sample another value `moved` at its z than the `fz` before; if so the batch is one
        system from here on, unless f gives two values at the same batch (noise).
        """
        if self.joint is not False or not self.stop.has_tolerance or len(running) < 2 or bool(running.all()):
            return False
        eps = rounding(self.flat.f, self.flat.layout)
        least = (REPEATABLE if eps < 1e-6 else _COARSE) * eps * scaled_norm(fz)
        if not bool((~running & (scaled_norm(moved - fz) > least)).any() and finite(moved).all()):
            return False
        with torch.no_grad():
            again = self.flat(z.to(self.narrow))
        self.verified += 1
        if bool((scaled_norm(again - moved) > least).any()):
            self.joint = None
            return False
        warnings.warn(COUPLED, RuntimeWarning, stacklevel=2)
        self.joint, self.result = True, torch.full_like(self.result, _RUNNING)
        return True

    def _classify(self, fz: Flat, z: Flat, trace: bool) -> None:
        code, running = self._codes(fz, z), self.result == _RUNNING
        if self.joint and not bool((code == int(Result.CONVERGED)).all()):
            code = torch.where(code == int(Result.CONVERGED), int(Result.MAX_EVALS), code)
        if trace:
            self.trace.append(torch.where(running, self.residual, torch.nan))
        self.result = torch.where(running & (code != int(Result.MAX_EVALS)), code, self.result)

    def _codes(self, fz: Flat, z: Flat) -> Tensor:
        """(B,) `Result` codes by the criterion of `Stop` at z; sets `residual`."""
        r, criterion = fz - z.to(fz.dtype), self.criterion
        if not self.stop.has_tolerance:
            sizes = criterion.measure(r, scaled=True)
            self.residual = sizes if sizes.ndim == 1 else sizes.amax(dim=1)
            return classify_count((r == 0).all(dim=1), ~torch.isfinite(norm(fz)))
        r_size, s_size = (to_host(criterion.measure(x, scaled=True)) for x in (r, fz))
        if not isinstance(criterion.first, np.ndarray):
            criterion.first = np.where(np.isfinite(s_size), s_size, 0.0)
        residual, _, tolerance = criterion.compare(r_size, s_size, criterion.first)
        self.residual = to_device(residual, fz.device, fz.dtype)
        return to_device(classify(residual, tolerance), fz.device)

    def _verify(self, value: Flat) -> None:
        """Measure the residual and the `Result` at f(z_n), which is returned, by one more evaluation."""
        if not self.stop.has_tolerance:
            return
        with torch.no_grad():
            code = self._codes(self.flat(value), value)
        self.residual = self.residual.nan_to_num(math.inf, math.inf)
        self.result = torch.where(self.result == int(Result.NONFINITE), self.result, code)
        self.verified += 1

    def _evaluate(self, index: int, at: Float[Tensor, "B N"]) -> Flat:
        if not torch.is_grad_enabled():
            return self.flat(at.to(self.narrow))
        with set_checkpoint_early_stop(False):  # the second run must reach the value, which is used
            return checkpoint(
                _Evaluation(self, index, at.to(self.narrow)), use_reentrant=False, preserve_rng_state=False
            )

    # -- backward

    def begin_backward(self, saved: Sequence[Tensor]) -> None:
        """Reset to the end of the run, before a backward pass."""
        self.value, self.y, self.z, self.first, *self.kept = saved
        self.last = self.at = 2 * self._most_steps()
        self.image: Tensor | None = None  # value of evaluation `at`; None: not computed yet
        self.drift = _Drift(self.steps, self.beta)

    def _most_steps(self) -> int:
        """The number of the last step that a sample took; for abstract tensors, which never fail, the whole budget."""
        if is_abstract(self.steps):
            return (self.stop.max_evals - 1) // 2
        return max((k for k, went in enumerate(self.went, 1) if bool(went.any())), default=0)

    def rewind(self, index: int) -> Float[Tensor, "B N"]:
        """The input of evaluation `index`, found by running backwards; the input of evaluation 0 is known."""
        while self.at > index:
            self._back()
        if index == 0:
            return self.first
        return self.y if self.at % 2 else self.z

    def _back(self) -> None:
        """Run backwards from evaluation `at` to the evaluation before."""
        k, beta = (self.at + 1) // 2, self.beta
        if self.at == self.last:
            self._restore_anchor(self.at // 2)
        elif self.at % 2:
            # z = (z' - b f(y')) / (1 - b) for the samples that took step k
            go = self.went[k - 1].unsqueeze(1)
            self.z = torch.where(go, (self.z - beta * self._value(self.y)) / (1 - beta), self.z)
        else:
            # y = (y' - b f(z)) / (1 - b), y' of step k + 1
            go = self.went[k].unsqueeze(1)
            self.y = torch.where(go, (self.y - beta * self._value(self.z)) / (1 - beta), self.y)
            self._restore_anchor(k)
        self.at, self.image = self.at - 1, None

    def _value(self, at: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """f at the present input, in float64."""
        if self.image is None:
            with torch.no_grad():
                self.image = self.flat(at.to(self.narrow))
        return self.image.double()

    def _restore_anchor(self, k: int) -> None:
        """Replace the pair after k steps by its anchor, the pair kept in the forward run, if there is one."""
        every = self.anchor
        if every and k and k % every == 0 and 2 * k <= every * len(self.kept):
            pair = self.kept[2 * (k // every) - 2 : 2 * (k // every)]
            self.drift.measure(pair, (self.y, self.z))
            self.y, self.z = pair

    def evaluated(self, index: int, image: Flat) -> None:
        """Store the value of a repeated evaluation; the last one is checked, the first one ends the drift estimate."""
        if index == self.last:
            layout = self.flat.layout
            # the value of a sample whose f is not finite at the start is the start
            again = torch.where(self.answered, image, self.value.detach())
            require_same_image(again, summary(self.value, layout.widths), rounding(self.flat.f, layout), layout.widths)
        self.image = image
        if index == 0 and self.last:
            # the start is known: y_0 = z_0
            y = (self.y - self.beta * image.double()) / (1 - self.beta)
            y = torch.where(self.went[0].unsqueeze(1), y, self.y)
            self.drift.measure((self.first.double(), self.first.double()), (y, self.z))
            self.report(self.drift.error())


class _Evaluation:
    """One evaluation of f: first at the input `at`, and in the backward pass at the input that running back gives."""

    def __init__(self, run: ReversibleIteration, index: int, at: Flat) -> None:
        self.run, self.index = run, index
        # evaluation 0 has the same input both times, so the tensors that it reads are compared too
        self.flat = SameReads(run.flat) if index == 0 and not torch.compiler.is_compiling() else run.flat
        self.at: Flat | None = at
        self.differentiated = at.requires_grad

    def __call__(self) -> Flat:
        at, self.at = self.at, None
        if at is not None:
            with repeated_inexactly():
                return self.flat(at)
        if not hasattr(self.run, "at"):
            raise NotImplementedError(
                "f takes a derivative of its own (torch.autograd.grad), and Reversible keeps no graph while it runs "
                "forward: use IFT, or Unrolled."
            )
        at = self.run.rewind(self.index).to(self.run.narrow).detach()
        kept: list[Tensor] = []  # the saved tensors of this evaluation, which the checkpoint gets only if they are used
        with saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda none: none):
            image = self.flat(at.clone().requires_grad_(self.differentiated))
        self.run.evaluated(self.index, image.detach())
        # a sample whose backward run has left the domain of f must not put NaN into the gradients of shared parameters
        lost = ~(finite(at) & finite(image))
        if not failed(lost, self.run.stop):
            return _Save.apply(image, *kept)
        return self.flat(torch.where(lost, self.run.first, at).requires_grad_(self.differentiated))


class _Save(torch.autograd.Function):
    """Identity that saves the tensors `kept`, in the same order; the checkpoint differentiates none of its values."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * len(ctx.saved_tensors)


class _Step(torch.autograd.Function):
    """(1 - b) old + b image, for the samples that take the step."""

    @staticmethod
    def forward(
        ctx: Any,
        node: Tensor,
        f_node: Tensor,
        old: Tensor,
        image: Tensor,
        running: Tensor,
        run: ReversibleIteration,
        k: int,
    ) -> Tensor:
        ctx.run, ctx.k, ctx.dtype = run, k, f_node.dtype
        return torch.where(running.unsqueeze(1), torch.lerp(old, image.double(), run.beta), old)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        beta, go = ctx.run.beta, ctx.run.went[ctx.k - 1].unsqueeze(1)
        ctx.run.drift.step(ctx.k, norm(g), go.squeeze(1))
        return torch.where(go, (1 - beta) * g, g), torch.where(go, beta * g, 0.0).to(ctx.dtype), *[None] * 5


class _End(torch.autograd.Function):
    """The value of the run, which has the gradient of its last evaluation."""

    @staticmethod
    def forward(
        ctx: Any,
        f_node: Tensor,
        value: Tensor,
        y: Tensor,
        z: Tensor,
        start: Tensor,
        run: ReversibleIteration,
        *anchors: Tensor,
    ) -> Tensor:
        ctx.run = run
        value = value.clone()
        ctx.save_for_backward(value, y, z, start, *anchors)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("Reversible cannot be differentiated twice (create_graph=True): use IFT or Unrolled.")
        if split_batched(grads[0]) is not None:
            raise NotImplementedError(
                "Reversible takes one cotangent at a time, since it runs backwards once: pass vectorize=False and "
                "is_grads_batched=False, or use IFT."
            )
        ctx.run.begin_backward(ctx.saved_tensors)
        return (grads[0], *[None] * (5 + len(ctx.run.kept)))


class _Drift:
    """The gradient's error, estimated from the distance between states found by running backwards and the true ones.

    Between two true states the error is assumed to grow by a constant factor per step, from rounding to the measured
    error; by the largest factor (1 - beta)^-2 if the measured error is above `_FAR`. The share of a step in the
    gradient has the size of the adjoint at this step, and the relative error of the state at this step.
    """

    def __init__(self, steps: Tensor, beta: float) -> None:
        self.worst = (1 - beta) ** -2
        self.wrong = torch.zeros(len(steps), dtype=torch.float64, device=steps.device)
        self.total = torch.zeros_like(self.wrong)
        self.shares: list[Tensor] = []  # norms of the adjoints of the steps since the last true state
        self.k = -1

    def step(self, k: int, share: Tensor, go: Tensor) -> None:
        """Add the norm of the adjoint of y or z at step k, for the samples that took it."""
        share = torch.where(go, share, 0.0)
        if self.k == k and self.shares:
            self.shares[-1] = self.shares[-1] + share
        else:
            self.shares.append(share)
        self.k = k

    def measure(self, true: Sequence[Tensor], found: tuple[Tensor, Tensor]) -> None:
        """Add the error of the steps between the last true states and these, from the distance to the `found` ones."""
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
        # adjoints at a diverged state are invalid: the last valid one replaces them
        good = torch.cummin(torch.where(error < 0.1, shares, torch.inf), dim=0).values
        shares = torch.where((error < 0.1) | ~good.isfinite(), shares.nan_to_num(nan=1e290), good)
        self.wrong += (error * shares).sum(0)
        self.total += shares.sum(0)
        self.shares = []

    def error(self) -> Tensor:
        """(B,) the estimated relative error of every sample's gradient."""
        return self.wrong / self.total.clamp(min=torch.finfo(torch.float64).tiny)
