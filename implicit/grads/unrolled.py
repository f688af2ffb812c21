"""Backpropagation through every iteration of the solver."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from implicit.argument_types import check_fields
from implicit.autodiff.closure_convert import SameReads
from implicit.autodiff.failed_samples import failed, without
from implicit.autodiff.functorch import refuse_threads
from implicit.autodiff.recomputation import SameValue, Segments
from implicit.grads.base import AbstractGrad
from implicit.iterate import iterate
from implicit.options import Problem, SolveOptions
from implicit.pytree import Layout, Map, State, tensors
from implicit.solution import Result, Solution
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop
from implicit.torch_internals import has_derivative, transforms_active


@dataclass(frozen=True)
class Unrolled(AbstractGrad):
    """Record the whole solve, the solver's steps included, and backpropagate through all iterations.

        dL/dtheta = g^T dz_n/dtheta,     z_n = f(solver^{n-1}(z0))

    No term is dropped: the gradient is exact for the iterations taken, whether or not they converged; the starting
    state gets one too, and derivatives of any order are right. The value is f(z) of the last tested z, so that even a
    solve that starts at its answer depends on f's parameters. Cost: n vector-Jacobian products, and with `checkpoint` n
    evaluations more. A residual is read at every evaluation: `Stop.check_every` and `Stop.late` have no effect. A
    solver whose steps have no graph (`NewtonKrylov`) is refused. When to use: as the reference for other estimators,
    and to train a few iterations as a network of that depth.

    Memory, for n evaluations whose graphs keep a states each, and a solver whose step keeps s states:

        plain               n (a + s)
        checkpoint=True     n (1 + s) + a           the input of every evaluation, and the graph of one evaluation
        checkpoint=k        2 n / k + k (a + s)     z and f(z) of every k-th, and the graph of one segment; and the
                                                    solver's history at every k-th

    so k = sqrt(2 n / (a + s)) is best, of order sqrt(n), if the solver has no history (`Picard`).

    Source: Griewank and Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000 (checkpointing); Chen et al., "Training
    Deep Nets with Sublinear Memory Cost", arXiv 1604.06174 (segments).

    Args:
        checkpoint: True: keep the input of every evaluation of f and evaluate f again in the backward pass. A number k:
            keep the point and the solver state at every k-th evaluation, and run segments of k evaluations and solver
            steps again; needs a fixed number of evaluations, ``Stop(rtol=0, atol=0, max_evals=n)``. PyTorch's
            checkpoints are used with ``use_reentrant=False``.
    """

    checkpoint: bool | int = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.checkpoint, bool) and self.checkpoint < 1:
            raise ValueError(f"Unrolled.checkpoint must be True, False or at least 1, got {self.checkpoint}.")

    @property
    def _segment(self) -> int:
        return 0 if isinstance(self.checkpoint, bool) else self.checkpoint

    def __call__(
        self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions = SolveOptions()
    ) -> Solution:
        if transforms_active():
            self._refuse_transform(stop, options)
            refuse_threads(problem, Layout.of(problem.z0, options.batch_dims))
        if self._segment and (stop.has_tolerance or options.observed or options.trace):
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint}) runs segments twice and may not read residuals meanwhile: "
                "pass stop=Stop(rtol=0, atol=0, max_evals=n) and no trace or callback, or checkpoint=True."
            )
        if stop.has_tolerance:  # read every evaluation, since an f(z) of NaN must not stay in the graph
            stop = replace(stop, check_every=1, late=False)
        solved = self._solve(problem, solver, stop, options)
        if transforms_active():
            solved = replace(solved, evals=solved.evals + 1)  # of `refuse_threads`
        lost = solved.result == int(Result.NONFINITE)
        if not any(map(has_derivative, tensors(solved.value))) or not failed(lost, stop):
            return solved
        # once more, with the failed samples out of the graph
        folded = replace(
            options, callback=None, progress=False, trace=options.trace if callable(options.trace) else False
        )
        helped = self._solve(without(problem, lost, options.batch_dims), solver, stop, folded)
        layout = Layout.of(problem.z0, options.batch_dims)
        first, second = layout.pack(solved.value).detach(), layout.pack(helped.value)
        value = layout.unpack(torch.where(lost.unsqueeze(1), first, second))
        trace = helped.trace if callable(options.trace) else solved.trace
        return replace(solved, value=value, evals=solved.evals + helped.evals, trace=trace)

    def _solve(self, problem: Problem, solver: AbstractSolver[Any], stop: Stop, options: SolveOptions) -> Solution:
        f, segments = problem.f, None
        if torch.is_grad_enabled():
            f = _Checkpointed(f) if self.checkpoint is True else f
            segments = Segments(self._segment, SameReads) if self._segment else None
        return iterate(f, problem.z0, solver, stop, args=problem.args, options=options, image=True, segments=segments)

    def _refuse_transform(self, stop: Stop, options: SolveOptions) -> None:
        """Refuse decisions on the host, and checkpoints, inside torch.func."""
        if stop.has_tolerance or options.observed or options.trace:
            raise NotImplementedError(
                "Unrolled inside a torch.func transform takes a fixed number of evaluations: pass "
                "stop=Stop(rtol=0, atol=0, max_evals=n) and no trace or callback, or use IFT, JFB or Phantom there."
            )
        if self.checkpoint:
            raise NotImplementedError(
                "Unrolled(checkpoint=...) does not work inside torch.func transforms, which do not support hooks on "
                "saved tensors: leave checkpoint=False, or use IFT, JFB or Phantom there."
            )


class _Checkpointed:
    """f in a checkpoint whose second run raises if f has changed.

    The values of all evaluations are compared, and for the first one the tensors that f reads too.
    """

    def __init__(self, f: Map) -> None:
        self.f = f
        self.evaluated = torch.compiler.is_compiling()

    def __call__(self, z: State, *args: Any) -> State:
        f = self.f if self.evaluated else SameReads(self.f)
        self.evaluated = True
        with set_checkpoint_early_stop(False):  # the second run must reach the value, which is compared
            return checkpoint(SameValue(f), z, *args, use_reentrant=False)
