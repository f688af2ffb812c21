"""The gradient of every step of a reversible iteration, in the memory of its last step."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from implicit.argument_types import check_fields
from implicit.autodiff.functorch import refuse_transforms
from implicit.autodiff.reversible_iteration import ReversibleIteration
from implicit.evaluation import FlatMap
from implicit.grads.base import AbstractGrad
from implicit.iterate import require_numbers
from implicit.options import Problem, SolveOptions
from implicit.pytree import Layout
from implicit.solution import Solution
from implicit.solvers.base import AbstractSolver, check_one_of
from implicit.stopping import Stop
from implicit.torch_internals import is_abstract


@dataclass(frozen=True)
class Reversible(AbstractGrad):
    """Run the coupled reversible iteration, and run it backwards in the backward pass.

        y' = (1 - beta) y + beta f(z),     z' = (1 - beta) z + beta f(y'),     value f(z_n)

    No term is dropped: the gradient is that of the iteration that was run, converged or not, and the starting state
    gets one too; at convergence it is the gradient of the fixed point. This iteration takes the place of the `solver`,
    which is not used; each sample stops by `Stop` at its own step. Memory: three states in float64, whatever the number
    of steps, and two more for every `anchor` steps. Devices without float64 (MPS) are refused.

    Cost: two evaluations per step forward, and with a tolerance one more at the value returned, which measures its
    residual; two evaluations and two vector-Jacobian products per step backward.

    The inverse is exact in exact arithmetic. In floating point, inverting a step multiplies an error by up to (1 -
    beta)^-2, and float64 suffices for some 26 steps at beta = 0.5 and 11 at 0.8. The backward run reaches the early
    steps last, with the largest error; they contribute little to the gradient if the iteration contracts fast, and much
    if it does not. Relative error of the gradient, solved to 1e-6 in float64, against the same iteration unrolled
    (about the same for beta = 0.3 and 0.8, which take more and fewer steps):

        layer (spectral radius)   steps   without anchors   anchor=12
        tanh (0.32)               27      3e-13             5e-16
        adaLN (0.55)              38      9e-07             4e-15
        tanh (0.94)               270     2e-02             1e-12

    The error is estimated from the distance between the states found by running backwards and the known ones (the
    start and each anchor); `on_drift` is the action beyond `tolerance`.

    When to use: for the exact gradient of few, unconverged steps in the memory of the graph of one evaluation. f must
    be deterministic (no fresh dropout). Not differentiable twice.

    Source: "Reversible Deep Equilibrium Models", arXiv 2509.12917.

    Args:
        beta: share of the new value, in (0, 1).
        on_drift: "warn", "raise" `FloatingPointError` or "ignore" if the estimated error exceeds `tolerance`.
        tolerance: largest accepted estimate of the relative error of a sample's gradient.
        anchor: keep the pair (y, z) after every so many steps, >= 1, for exact gradients of long runs; None: keep none.
    """

    beta: float = 0.5
    on_drift: Literal["warn", "raise", "ignore"] = "warn"
    tolerance: float = 1e-3
    anchor: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.beta < 1:
            raise ValueError(f"Reversible.beta must lie in (0, 1), got {self.beta}.")
        check_one_of(self, "on_drift", "warn", "raise", "ignore")
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
        require_numbers(problem.z0, stop)
        flat = FlatMap(problem.f, problem.args, layout)
        _require_float64(layout.device)
        run = ReversibleIteration(flat, layout.pack(problem.z0), stop, self.beta, self.anchor, self._report)
        value = run.forward(bool(options.trace))
        return Solution(
            value=layout.unpack(value),
            residual=run.residual,
            result=run.result,
            evals=1 + 2 * run.steps + run.verified,
            trace=torch.stack(run.trace) if options.trace else None,
        )

    def _report(self, error: Tensor) -> None:
        """Warn or raise if the estimated error of a sample's gradient exceeds `tolerance`."""
        if self.on_drift == "ignore" or is_abstract(error) or not len(error) or not float(error.max()) > self.tolerance:
            return
        # one text, so that the default filter of warnings shows it once
        text = (
            "Running the reversible iteration backwards missed its start so far that the gradient's estimated relative "
            f"error is above Reversible.tolerance={self.tolerance:g}: set Reversible.anchor (12 at beta=0.5), take "
            "fewer steps (Stop.max_evals), or another estimator."
        )
        if self.on_drift == "raise":
            raise FloatingPointError(f"{text} The estimated error is {float(error.max()):.2g}.")
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def _require_float64(device: torch.device) -> None:
    """Refuse a device without float64.

    Raises:
        TypeError: naming the device.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"Reversible keeps its states in float64, which the device {device} does not have: use IFT, or Unrolled "
            "with a checkpoint, or solve on another device."
        ) from error
