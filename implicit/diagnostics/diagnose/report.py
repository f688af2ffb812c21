"""`Diagnosis`: the findings about a fixed-point problem and a recommendation, as fields, tables and a figure."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.estimator_trials import EstimatorTable
from implicit.diagnostics.diagnose.solver_trials import SolverRow
from implicit.diagnostics.gradient_bias import HEAD, GradientBias, cells, changed, markdown
from implicit.diagnostics.spectral_radius import Spectrum
from implicit.grads.base import AbstractGrad
from implicit.pytree import State
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recommendation:
    """One way to solve the problem.

    Attributes:
        solver, stop, grad, batch_dims: arguments of `implicit.fixed_point`.
        reasons: the reasons for these arguments, a sentence each.
    """

    solver: AbstractSolver[Any]
    stop: Stop
    grad: AbstractGrad
    batch_dims: int
    reasons: tuple[str, ...]

    @property
    def code(self) -> str:
        """The call as a line of Python, in which f, z0 and args are names of the caller."""
        parts = [f"solver={_constructor(self.solver)}", f"stop={_constructor(self.stop)}"]
        parts += [f"grad={_constructor(self.grad)}"] + (["batch_dims=0"] if self.batch_dims == 0 else [])
        return f"implicit.fixed_point(f, z0, *args, {', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The report of `implicit.diagnose`: ``print`` shows it, ``plot()`` draws it.

    Attributes:
        findings: conditions that hold, each with its evidence and samples; the kind of fixed point comes first.
        solvers: one row per candidate with its evaluations, in the order in which the candidates ran.
        tolerances: (rtol, evaluations until every sample met rtol) of the recommended solver.
        floor: the smallest relative residual ||f(z) - z|| / ||z|| that this solver reached for every sample.
        estimators: bias, time and memory of gradient estimators.
        spectrum: Ritz values of df/dz at the solution; None if f has no derivative or is noisy.
        value: the best iterate found, detached.
        found: whether a solver met the tolerance for every sample.
        recommendation: the arguments of one call, with reasons.
        evals, products: evaluations of f on the whole batch and products with its Jacobian that were made.
        budget: the limit on `evals` + `products`.
        missing: the measurements that were not made, with reasons.
        shape: (samples, numbers per sample, dtype of the state).
    """

    findings: tuple[Finding, ...]
    solvers: tuple[SolverRow, ...]
    tolerances: tuple[tuple[float, int], ...]
    floor: float
    estimators: EstimatorTable
    spectrum: Spectrum | None
    value: State
    found: bool
    recommendation: Recommendation
    evals: int
    products: int
    budget: int
    missing: tuple[str, ...]
    shape: tuple[int, int, torch.dtype]

    @property
    def conditions(self) -> frozenset[Condition]:
        """The conditions that were found, uncertain ones included."""
        return frozenset(finding.condition for finding in self.findings)

    def __getitem__(self, condition: Condition) -> Finding:
        for finding in self.findings:
            if finding.condition is condition:
                return finding
        raise KeyError(f"{condition.name} was not found; there are {', '.join(c.name for c in self.conditions)}.")

    def __str__(self) -> str:
        samples, numbers, dtype = self.shape
        blocks = [
            f"Fixed point of f: {samples} sample{'s' * (samples != 1)} of {numbers} numbers, {str(dtype)[6:]}; "
            + ("found." if self.found else "not found for every sample."),
            self._findings(),
            self._solvers(),
        ]
        if self.tolerances:
            head = ("rtol", *(f"{rtol:.0e}" for rtol, _ in self.tolerances), "")
            count = ("evaluations", *(str(n) for _, n in self.tolerances), "")
            blocks.append(markdown(head, [count]) + f"\n\nSmallest relative residual: {self.floor:.1e}.")
        if self.estimators.rows:
            blocks.append(markdown(HEAD, [cells(row) for row in self.estimators.rows]))
        reasons = "\n".join(f"- {reason}" for reason in self.recommendation.reasons)
        blocks.append(f"Recommended:\n\n    {self.recommendation.code}\n\n{reasons}")
        blocks += [f"Not measured: {'; '.join(self.missing)}."] if self.missing else []
        blocks.append(
            f"Cost: {self.evals} evaluations of f and {self.products} products with its Jacobian, of {self.budget}."
        )
        return "\n\n".join(blocks)

    def _findings(self) -> str:
        body = []
        for finding in self.findings:
            name = finding.condition.value + ("" if finding.certain else " (uncertain)")
            body.append((name, f"{len(finding.samples)} of {self.shape[0]}", finding.evidence))
        return markdown(("finding", "samples", "note"), body or [("nothing unusual", "", "-")])

    def _solvers(self) -> str:
        body = []
        for row in self.solvers:
            ends = ", ".join(f"{count} {name}" for name, count in row.ends if name != "CONVERGED")
            mean = f"{float(row.evals.cpu().double().mean()):.1f}" if len(row.evals) else "-"
            body.append(
                (
                    row.name,
                    f"{row.converged} of {row.samples}" if row.samples else "-",
                    str(row.most) if row.samples else "-",
                    mean,
                    "-" if math.isnan(row.residual) else f"{row.residual:.1e}",
                    (row.note or ends).replace("|", "/").replace("\n", " ")[:80],
                )
            )
        return markdown(("solver", "converged", "evaluations", "mean", "residual", "note"), body)

    def plot(self) -> "Figure":
        """Residual curves of the solvers, and beside them the eigenvalues of df/dz where they are known."""
        from matplotlib import pyplot as plt
        from matplotlib.figure import Figure

        from implicit import plotting

        plt.draw_if_interactive()  # loads the backend, without which a notebook shows a figure as text
        both = self.spectrum is not None
        figure = Figure(figsize=(11 if both else 6, 4), layout="constrained")
        axes = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
        traces = {row.name: row.trace for row in self.solvers if row.trace is not None and len(row.trace)}
        plotting.residuals(traces, axes[0], relative=True)
        if self.spectrum is not None:
            plotting.spectrum({"at the solution" if self.found else "at the best iterate": self.spectrum}, axes[1])
        return figure

    @property
    def bias(self) -> GradientBias:
        """The estimators as the table that `implicit.diagnostics.gradient_bias` returns."""
        return GradientBias(rows=self.estimators.rows, truth=self.estimators.truth)


def _constructor(thing: Any, name: str = "") -> str:
    """The expression that makes a setting; functions are variables named like the setting, and so are generators."""
    if isinstance(thing, AbstractSolver | Stop | AbstractGrad):
        settings = [f"{name}={_constructor(value, name)}" for name, value in changed(thing).items()]
        return f"implicit.{type(thing).__name__}({', '.join(settings)})"
    if isinstance(thing, torch.Generator):
        return "generator"
    return name if callable(thing) else repr(thing)
