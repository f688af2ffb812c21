"""Bias and cost of gradient estimators on one layer and one batch.

`implicit.diagnostics.reference_gradient` computes the exact gradient.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit.argument_types import check_arguments
from implicit.diagnostics.gradient_problem import GradientProblem, require_samples
from implicit.diagnostics.profiling import Measured, measure, paced
from implicit.diagnostics.reference_gradient import Loss, exact_gradient
from implicit.fixed_point import check_types
from implicit.grads import IFT, JFB, SHINE, AbstractGrad, Neumann, Phantom, Reversible, StochasticJFB, Unrolled
from implicit.options import Problem
from implicit.pytree import Layout, Map, State, map_tensors
from implicit.solvers import AbstractSolver, Multisecant, Picard
from implicit.stopping import Stop


@dataclass(frozen=True)
class BiasRow:
    """One estimator on one batch.

    Attributes:
        name: the label of the estimator.
        cosine: cosine of its gradient and the exact gradient; 1 is the right direction.
        error: ||gradient - exact|| / ||exact||.
        saved: bytes held between the forward and the backward pass: the value counts, parameters and inputs do not.
        peak: largest number of such bytes in use at once; workspaces inside operators are not counted.
        evals: evaluations of f on the whole batch, forward and backward together.
        products: vector-Jacobian products with f on the whole batch.
        time: time of forward and backward, as a ratio to the forward solve without gradients.
        note: warnings, or the reason if there is no gradient (then cosine and error are NaN).
    """

    name: str
    cosine: float
    error: float
    saved: float
    peak: float
    evals: float
    products: float
    time: float
    note: str = ""


@dataclass(frozen=True)
class GradientBias:
    """Gradient estimators compared with the exact gradient: ``table["JFB"].cosine``; prints as a Markdown table.

    Attributes:
        rows: one row per estimator.
        truth: how the exact gradient was found.
    """

    rows: tuple[BiasRow, ...]
    truth: str

    def __getitem__(self, name: str) -> BiasRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no row {name!r}; there are {', '.join(row.name for row in self.rows)}.")

    def __str__(self) -> str:
        return markdown(HEAD, [cells(row) for row in self.rows])


def every_estimator() -> list[AbstractGrad]:
    """Every estimator with its defaults, and variants of `Unrolled` and `JFB`."""
    exact: list[AbstractGrad] = [IFT(), Unrolled(), Unrolled(checkpoint=True), Reversible()]
    draws = StochasticJFB(generator=torch.Generator().manual_seed(0))
    return [*exact, JFB(), JFB(5), Phantom(), Neumann(), SHINE(), draws]


def gradient_bias(
    f: Map,
    z0: State,
    *args: Any,
    estimators: Iterable[AbstractGrad] | Mapping[str, AbstractGrad] | None = None,
    params: Iterable[Tensor] | None = None,
    loss: Loss | None = None,
    solver: AbstractSolver[Any] = Multisecant(),
    stop: Stop = Stop(),
    batch_dims: int = 1,
    draws: int = 8,
    repeats: int = 5,
) -> GradientBias:
    """Compare gradient estimators with the exact gradient on one batch.

    Every estimator runs its own solve, ``fixed_point(f, z0, *args, grad=..., solver=solver, stop=stop)``, so the error
    includes that of stopping early. The row of an estimator that fails has the reason as its note. f must be
    deterministic (no fresh dropout). The exact gradient has the precision of the state's dtype: to measure errors below
    1e-6, use float64. Cost: a tight solve, and `draws` or `repeats` + 2 gradients per estimator.

    Args:
        f: the map f(z, *args).
        z0: the starting state, ``(B, *)`` tensors.
        args: passed on to f.
        estimators: the estimators, with labels or labeled by their settings; default `every_estimator()`.
        params: tensors to differentiate for; default every tensor that f uses and that requires gradients.
        loss: a scalar function of the solution's value; default a fixed random projection, which favors no direction.
        solver, stop: as in `fixed_point`.
        batch_dims: 0 makes the whole state one system.
        draws: number of gradients averaged for `StochasticJFB`, whose bias is that of its mean.
        repeats: rounds of timing, in which all estimators take turns; with 0 no time is measured.

    Returns:
        A `GradientBias`; print it for a Markdown table.

    Raises:
        ValueError: no tensor requires gradients, or the loss does not depend on one that does.
        TypeError: `solver`, `stop` or an estimator is not an instance of its class.
        NotConverged: the exact gradient was not found.

    Example:
        >>> import torch
        >>> from implicit.diagnostics import gradient_bias
        >>> w = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        >>> table = gradient_bias(lambda z, w: w * z + 1, torch.zeros(1, 1, dtype=torch.float64), w)
        >>> round(table["JFB"].error, 6)  # 1 / (1 - w) is dropped
        0.5
    """
    given = {"f": f, "estimators": estimators, "params": params, "loss": loss, "draws": draws, "repeats": repeats}
    check_arguments(gradient_bias, given)
    if draws < 1 or repeats < 0:
        raise ValueError(f"draws must be at least 1 and repeats at least 0, got {draws} and {repeats}.")
    chosen = labeled(every_estimator() if estimators is None else estimators)
    for grad in chosen.values():
        check_types(solver, grad, stop)
    z0 = map_tensors(Tensor.detach, z0)
    layout = Layout.of(z0, batch_dims)
    require_samples(z0, layout)
    problem = GradientProblem.of(Problem(f, z0, args), solver, stop, layout, loss, params)
    wanted = problem.wanted
    if not wanted or not all(p.requires_grad for p in wanted):
        raise ValueError("params must be tensors that require gradients and that f uses; there are none.")
    truth, kind = exact_gradient(problem.problem, wanted, problem.loss, solver, layout)
    if not truth.norm() > 0:
        raise ValueError("The gradient is 0: the loss must depend on params through the solution.")
    taken: dict[str, list[Measured]] = {}
    runs: dict[str, Callable[[], object]] = {"": problem.solve}
    for label, grad in chosen.items():
        count = draws if isinstance(grad, StochasticJFB) else 1
        taken[label] = [measure(partial(problem.forward, grad), f, wanted) for _ in range(count)]
        if all(one.gradient is not None for one in taken[label]):
            runs[label] = partial(problem.gradient, grad)
    times = paced(runs, repeats, layout.device) if repeats else {}
    rows = tuple(
        row(label, taken[label], truth, times[label] / times[""] if label in times else torch.nan) for label in chosen
    )
    return GradientBias(rows=rows, truth=kind)


def row(label: str, taken: Sequence[Measured], truth: Float[Tensor, " n"], time: float) -> BiasRow:
    """The row that compares the mean of the measured gradients with the exact gradient `truth`."""
    gradients = [one.gradient for one in taken if one.gradient is not None]
    cosine = error = torch.nan
    if len(gradients) == len(taken):
        mean = torch.stack(gradients).mean(dim=0)
        cosine = float(torch.nn.functional.cosine_similarity(mean, truth, dim=0))
        error = float((mean - truth).norm() / truth.norm())
    costs = (sum(getattr(one, cost) for one in taken) / len(taken) for cost in ("saved", "peak", "evals", "products"))
    note = " ".join(dict.fromkeys(one.note for one in taken if one.note))
    return BiasRow(label, cosine, error, *costs, time=time, note=note)


def labeled(estimators: Iterable[AbstractGrad] | Mapping[str, AbstractGrad]) -> dict[str, AbstractGrad]:
    """Estimators by their names, or by labels made of their settings."""
    if isinstance(estimators, Mapping):
        return {str(name): grad for name, grad in estimators.items()}
    labeled: dict[str, AbstractGrad] = {}
    for grad in estimators:
        check_types(Picard(), grad, Stop())
        name, count = label(grad), 2
        while name in labeled:  # estimators whose labels are the same, such as two that differ in a generator only
            name, count = f"{label(grad)} #{count}", count + 1
        labeled[name] = grad
    return labeled


def label(grad: AbstractGrad | AbstractSolver[Any] | Stop) -> str:
    """The name of an estimator, solver or criterion with the settings that are not its defaults: ``JFB(steps=5)``."""
    settings = [f"{name}={value}" for name, value in changed(grad).items() if not isinstance(value, torch.Generator)]
    return type(grad).__name__ + (f"({', '.join(settings)})" if settings else "")


def changed(grad: AbstractGrad | AbstractSolver[Any] | Stop) -> dict[str, Any]:
    """The settings that are not defaults."""
    settings = {}
    for f in fields(grad):  # pyright: ignore[reportArgumentType]: estimators are dataclasses
        value = getattr(grad, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default:
            settings[f.name] = value
    return settings


HEAD = ("estimator", "cosine", "error", "saved", "peak", "f", "VJPs", "time", "note")


def cells(row: BiasRow) -> tuple[str, ...]:
    """A row as text, in the order of `HEAD`."""
    return (
        row.name,
        _number(row.cosine, ".4f"),
        _number(row.error, ".1e"),
        size(row.saved),
        size(row.peak),
        _number(row.evals, ".4g"),
        _number(row.products, ".4g"),
        _number(row.time, ".2f"),
        _short(row.note),
    )


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def markdown(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """An aligned Markdown table, names left and numbers right; an empty last column is left out."""
    if not any(line[-1] for line in body):
        head, body = head[:-1], [line[:-1] for line in body]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    left = {0} | ({len(head) - 1} if head[-1] == "note" else set())

    def line(texts: tuple[str, ...]) -> str:
        padded = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(texts) for texts in body)])


def _number(x: float, form: str) -> str:
    return "-" if math.isnan(x) else format(x, form)


def _short(note: str, most: int = 80) -> str:
    note = note.replace("|", "/").replace("\n", " ")
    return note if len(note) <= most else note[: most - 3].rsplit(" ", 1)[0] + " ..."
