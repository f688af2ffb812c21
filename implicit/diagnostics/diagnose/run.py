"""`diagnose`: measurements of a fixed-point problem on its own batch, and a recommendation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from implicit.argument_types import check_arguments
from implicit.diagnostics.diagnose import jacobian, map_checks, other_starts, solutions, solver_trials
from implicit.diagnostics.diagnose.budget import Budget, BudgetSpent
from implicit.diagnostics.diagnose.condition import Condition, Finding
from implicit.diagnostics.diagnose.estimator_trials import EstimatorTable, default_estimators, try_estimators
from implicit.diagnostics.diagnose.jacobian import Kinds
from implicit.diagnostics.diagnose.other_starts import OtherStarts
from implicit.diagnostics.diagnose.recommendation import recommend
from implicit.diagnostics.diagnose.report import Diagnosis
from implicit.diagnostics.diagnose.restore import restored
from implicit.diagnostics.diagnose.solver_trials import SolverTrials, Trial
from implicit.diagnostics.gradient_problem import GradientProblem, differentiable_tensors, require_samples
from implicit.diagnostics.reference_gradient import Loss
from implicit.diagnostics.spectral_radius import Spectrum, spectrum
from implicit.evaluation import FlatMap
from implicit.fixed_point import check_types
from implicit.grads import IFT
from implicit.grads.base import AbstractGrad
from implicit.options import Problem
from implicit.pytree import Layout, Map, State, map_tensors, norm
from implicit.solution import Result
from implicit.solvers import Picard
from implicit.solvers.base import AbstractSolver
from implicit.stopping import Stop

_PRODUCTS = 40  # largest number of Ritz values, or of all eigenvalues of samples of at most _WHOLE numbers
_WHOLE = 100
_TOL = 1e-6  # relative residual of the leading Ritz pair at which Arnoldi's method ends
_DEEP = 200  # largest number of evaluations of the solve to rounding error
_NOTHING = float("nan")


def diagnose(
    f: Map,
    z0: State,
    *args: Any,
    stop: Stop = Stop(),
    solvers: Sequence[AbstractSolver[Any]] | None = None,
    estimators: Sequence[AbstractGrad] | None = None,
    params: Iterable[Tensor] | None = None,
    loss: Loss | None = None,
    gradient_error: float = 0.01,
    batch_dims: int = 1,
    budget: int = 3000,
    repeats: int = 3,
) -> Diagnosis:
    """Whether z = f(z, *args) converges from z0, why not, and which solver, tolerance and gradient estimator to take.

    All findings are measured on the given batch. Modules, generators and global random state are restored afterwards; f
    runs in its present mode, training or evaluation. Memory: forty states for the eigenvalues, and the memory of the
    solvers and estimators.

    Args:
        f: the map f(z, *args).
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        stop: the tolerance to be met; `when` is ignored. A solver may take `max_evals` evaluations, at least 100.
        solvers: candidates, simplest first; default `solver_trials.CANDIDATES`.
        estimators: candidates; default the seven of `default_estimators`; with () no gradient is measured.
        params: tensors to differentiate for; default every tensor that f uses and that requires gradients.
        loss: a scalar function of the solution's value; default a fixed random projection.
        gradient_error: an inexact estimator of at most this relative error is recommended if it saves a fifth of the
            exact estimator's time.
        batch_dims: 0 makes the whole state one system. Samples that f couples are diagnosed as one system in any case.
        budget: limit on evaluations of f plus products with its Jacobian; measurements beyond it become `missing`.
        repeats: rounds of timing.

    Raises:
        ValueError: `fixed_point` would refuse f or z0, `stop` has no tolerance, or a number is out of range.
        TypeError: a solver, an estimator or `stop` is not an instance of its class.

    Example:
        >>> import torch, implicit
        >>> report = implicit.diagnose(lambda z: 1 - 1.5 * torch.sin(z), torch.zeros(1, 1, dtype=torch.float64))
        >>> [finding.condition.value for finding in report.findings]
        ['oscillating']
    """
    numbers = {"gradient_error": gradient_error, "budget": budget, "repeats": repeats}
    others = {"solvers": solvers, "estimators": estimators, "params": params, "loss": loss}
    check_arguments(diagnose, {"f": f, **numbers, **others})
    candidates = solver_trials.CANDIDATES if solvers is None else tuple(solvers)
    chosen = default_estimators() if estimators is None else list(estimators)
    for solver in candidates or (Picard(),):
        check_types(solver, IFT(), stop)
    for grad in chosen:
        check_types(Picard(), grad, stop)
    if not (stop.rtol or stop.atol):
        raise ValueError("stop must have a tolerance to be met, got rtol = atol = 0: pass Stop(rtol=1e-4).")
    if not gradient_error >= 0:
        raise ValueError(f"gradient_error must be at least 0, got {gradient_error}.")
    if budget < 1 or repeats < 0:
        raise ValueError(f"budget must be at least 1 and repeats at least 0, got {budget} and {repeats}.")
    # the caller's gradient and inference mode do not change what is measured
    with torch.inference_mode(False), torch.enable_grad(), restored(f, args, solvers, estimators, loss):
        z0 = map_tensors(lambda t: _recordable(t).detach(), z0)
        args, stop = tuple(map(_recordable, args)), replace(stop, when=None)
        layout = Layout.of(z0, batch_dims)
        require_samples(z0, layout)
        run = _Run(Problem(f, z0, args), stop, layout, Budget(limit=budget))
        try:
            run.check_map()
            if not run.has(Condition.NONFINITE):
                run.try_solvers(candidates)
                run.look_at_solution()
                run.measure_gradients(chosen, params, loss, repeats)
        except BudgetSpent:
            run.missing.append("the measurements that the budget did not suffice for")
    return run.report(chosen, gradient_error)


def _recordable(thing: Any) -> Any:
    """A tensor of inference mode as one that autograd can record."""
    return thing.clone() if isinstance(thing, Tensor) and thing.is_inference() else thing


@dataclass(eq=False)
class _Run:
    """A diagnosis in progress."""

    problem: Problem
    stop: Stop
    layout: Layout
    budget: Budget
    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    deep: Trial | None = None
    spectrum: Spectrum | None = None
    scale: Tensor | None = None  # (B, N) root mean square of a typical state
    table: EstimatorTable = field(default_factory=EstimatorTable)

    def has(self, condition: Condition) -> bool:
        """Whether a condition was found."""
        return any(finding.condition is condition for finding in self.findings)

    def flat(self) -> FlatMap:
        """f on (B, N) matrices, within the budget."""
        return FlatMap(self.budget.plain(self.problem.f), self.problem.args, self.layout)

    def solves(self) -> SolverTrials:
        """Solves of the problem, within the budget."""
        return SolverTrials(self.problem, self.layout, self.budget)

    @torch.no_grad()
    def check_map(self) -> None:
        """Whether f is finite at the start, gives one value at one z, and treats each sample by itself."""
        flat, start = self.flat(), self.layout.pack(self.problem.z0)
        first = flat(start)
        lost = ~torch.isfinite(first).all(dim=1)
        if bool(lost.any()):
            self.findings.append(Finding.of(Condition.NONFINITE, "f(z0) is NaN or infinite", lost))
            return
        point = map_checks.generic_point(flat, start, first)
        noisy = map_checks.noise(flat, point)
        if noisy is not None:
            self.findings.append(noisy)
            self.missing.append("whether samples are coupled, eigenvalues, kinks and gradients, since f is noisy")
            return
        self.scale, coupled = point.scale, map_checks.coupling(flat, point)
        if coupled is not None:
            self.findings.append(coupled)
            apart, self.layout = self.layout, Layout.of(self.problem.z0, 0)
            self.scale = self.layout.pack(apart.unpack(point.scale))

    def try_solvers(self, candidates: Sequence[AbstractSolver[Any]]) -> None:
        """Run the candidates, and the best of them down to rounding error."""
        if self.has(Condition.NOISY):  # no solver can converge; one solver shows how small a residual is reached
            candidates = [s for s in candidates if not isinstance(s, Picard)][:1] or candidates[:1]
        self.trials = self.solves().candidates(candidates, self.stop)
        self.best = solver_trials.best(self.trials)
        if lost := [trial.row.name for trial in self.trials if trial.row.note == solver_trials.UNFINISHED]:
            self.missing.append(f"solves by {', '.join(lost)}, for lack of budget")
        if self.best is None or self.best.solution is None:
            return
        self._note_noise()
        if self.has(Condition.NOISY):
            self.deep = self.best
            return
        # down to the rounding error of the state's dtype
        most = max(1, min(_DEEP, self.budget.remaining - 5))
        stop = replace(self.stop, rtol=1e-30, atol=0.0, max_evals=most)
        deep = self.solves().run(self.best.row.solver, stop)
        better = deep.solution is not None and not deep.row.residual > self.best.row.residual
        self.deep = deep if better else self.best
        with torch.no_grad():
            left = self.budget.remaining
            if left < solutions.ROUNDING and bool(solutions.unmet(self.stop, self.best, self.deep, self.layout).any()):
                self.missing.append("whether f rounds coarser than the state's dtype, for lack of budget")
            self.findings += solutions.below_rounding(self.stop, self.best, self.deep, self.flat(), left)

    def _note_noise(self) -> None:
        """Add the finding of noise if only a solve has shown the noise."""
        for trial in self.trials:
            if trial.solution is None or self.has(Condition.NOISY):
                continue
            noisy = trial.solution.result == Result.NONDETERMINISTIC
            if bool(noisy.any()):
                evidence = f"{trial.row.name} met two values of f at one state"
                self.findings.append(Finding.of(Condition.NOISY, evidence, noisy))

    def look_at_solution(self) -> None:
        """Findings at the solution: the Jacobian, kinks, the distance to the start, and solutions from other starts."""
        if self.deep is None or self.deep.solution is None or self.scale is None or self.has(Condition.NOISY):
            return
        z = self.layout.pack(self.deep.solution.value)
        found = self._found(solver_trials.relative(self.deep.solution, self.layout, self.stop.norm))
        kinds = self._eigenvalues(z, found)
        if self.layout.eps > jacobian.COARSEST:
            self.missing.append("kinks, which the rounding error of the state's dtype hides")
        else:
            with torch.no_grad():
                self.findings += jacobian.kinks(self.flat(), z, found, self.scale)
        self.findings += solutions.at_start(self.problem.z0, self.deep, self.layout, self.stop.norm)
        if bool(found.any()):
            if self.budget.remaining < other_starts.COST:
                self.missing.append("whether other starts give other answers, for lack of budget")
            gap, attracts = (None, ~found) if kinds is None else (kinds.gap, kinds.radius.to(z.device) < 1)
            others = self.solves(), self.stop, self.deep.solution, found, gap, attracts, self.scale
            self.findings += OtherStarts(*others).findings(self.deep)

    def _found(self, relative: Tensor) -> Tensor:
        """(B,) whether the best iterates are fixed points: up to the tolerance, or up to the rounding error of f."""
        found = relative <= max(self.stop.rtol, solver_trials.attainable(self.layout))
        for finding in self.findings:
            if finding.condition is Condition.BELOW_ROUNDING:
                found[list(finding.samples)] |= relative[list(finding.samples)] <= solutions.SMALL
        return found

    def _eigenvalues(self, z: Tensor, found: Tensor) -> Kinds | None:
        """Add the findings from the spectrum of df/dz at z, and return what is known of it."""
        most = z.shape[1] if z.shape[1] <= _WHOLE else _PRODUCTS
        products = min(most, self.budget.remaining - 1)
        if products < 1:
            self.missing.append("eigenvalues, for lack of budget")
            return None
        recorded, found_values = [], None
        flat = self.flat()

        def watched(x: Tensor) -> Tensor:
            y = flat(x)
            recorded.append(y.requires_grad)
            return y

        try:
            found_values = spectrum(watched, z, products=products, tol=_TOL)
        except RuntimeError as error:
            self.missing.append(f"a derivative of f ({str(error).splitlines()[0][:80]})")
        if found_values is None or not all(recorded):
            self.missing.append("eigenvalues, since autograd records no derivative of f")
            self.findings = jacobian.kind_from_iterations([trial.row for trial in self.trials]) + self.findings
            return None
        self.budget.count(products=found_values.values.shape[1])
        self.spectrum, kinds = found_values, Kinds.of(found_values)
        attracted = self._attracted(kinds, z)
        kinds = kinds.attracting(attracted, found_values.growth)
        lost = ~torch.isfinite(kinds.radius)
        if bool(lost.any()):
            self.missing.append(f"eigenvalues of {int(lost.sum())} samples, since a derivative of f is NaN or infinite")
        if bool(lost.all()):
            self.findings = jacobian.kind_from_iterations([trial.row for trial in self.trials]) + self.findings
        self.findings = jacobian.kind(kinds, found_values, found, attracted) + self.findings
        return kinds

    def _attracted(self, kinds: Kinds, z: Tensor) -> Tensor:
        """(B,) on the host: a radius of at least 1 is refuted by plain iteration, also from beside the solution."""
        start = self.layout.pack(self.problem.z0)
        away = norm(z - start) > 0.01 * norm(z)  # from the solution itself every iteration converges
        doubt = (kinds.radius >= 1) & away.cpu()
        for trial in self.trials:
            if trial.row.solver == Picard() and trial.solution is not None:
                doubt &= trial.solution.converged.cpu()
        if not bool(doubt.any()) or self.budget.remaining < solutions.PLAIN or self.scale is None:
            return torch.zeros_like(doubt)
        return doubt & solutions.attracted(self.solves(), z, self.scale).cpu()

    def measure_gradients(
        self,
        estimators: Sequence[AbstractGrad],
        params: Iterable[Tensor] | None,
        loss: Loss | None,
        repeats: int,
    ) -> None:
        """Bias, time and memory of the estimators, with the best solver."""
        if self.best is None or self.deep is None or self.deep.solution is None or self.has(Condition.NOISY):
            return
        row = self.best.row
        if row.converged < row.samples:
            self.table = EstimatorTable(missing="no solver converged every sample")
            return
        stop = replace(self.stop, max_evals=max(self.stop.max_evals, 2 * row.most))
        if params is None:
            params = differentiable_tensors(replace(self.problem, f=self.budget.plain(self.problem.f)))
        problem = GradientProblem.of(self.problem, row.solver, stop, self.layout, loss, params)
        self.table = try_estimators(problem, self.deep.solution.value, estimators, repeats, row.most, self.budget)

    def report(self, estimators: Sequence[AbstractGrad], error: float) -> Diagnosis:
        """The frozen report."""
        row = None if self.best is None else self.best.row
        rows = tuple(trial.row for trial in self.trials)
        floor = _NOTHING if self.deep is None else self.deep.row.residual
        found = self.findings, row, rows, self.stop, floor
        advice = recommend(*found, self.table, estimators, error, self.layout)
        samples = self.layout.pack(self.problem.z0).shape
        missing = [*self.missing, *([f"gradients: {self.table.missing}"] if self.table.missing else [])]
        solution = None if self.deep is None else self.deep.solution
        return Diagnosis(
            findings=tuple(self.findings),
            solvers=rows,
            tolerances=() if self.deep is None else self.deep.row.tolerances,
            floor=floor,
            estimators=self.table,
            spectrum=self.spectrum,
            value=self.problem.z0 if solution is None else solution.value,
            found=row is not None and row.samples > 0 and row.converged == row.samples,
            recommendation=advice,
            evals=self.budget.evals,
            products=self.budget.products,
            budget=self.budget.limit,
            missing=tuple(dict.fromkeys(missing)),
            shape=(samples[0], samples[1], self.layout.dtypes[0]),
        )
