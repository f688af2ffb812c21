"""Diagnosis of a trained FPDM's fixed point at every timestep of a sampling run.

The network generates samples, and the inputs (x_t, t, y) of its calls are recorded. For the inputs of each call,
`implicit.diagnose` diagnoses the fixed-point problem z = f(z; x_t, t, y): its kind, the spectral radius of df/dz, and
the evaluations of f that each solver takes to each tolerance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apps.diffusion.config.fixed_point import SOLVERS
from apps.diffusion.models.fpdm import FPDM
from apps.diffusion.sampling.sampler import SamplingPlan, sample
from implicit import Diagnosis, Stop, diagnose

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True, eq=False)
class TimestepDiagnosis:
    """The diagnosis at one timestep.

    Attributes:
        t: the timestep.
        report: the diagnosis of the batch at t.
    """

    t: int
    report: Diagnosis

    @property
    def radius(self) -> list[float]:
        """Spectral radius of every sample; empty if the radius was not computed."""
        return [] if self.report.spectrum is None else self.report.spectrum.radius.tolist()

    def plain(self) -> dict[str, int | None]:
        """Evaluations of the plain iteration by relative tolerance; None for a tolerance that was not reached."""
        reached = dict(self.report.solvers[0].tolerances)
        return {f"{rtol:.0e}": reached.get(rtol) for rtol in TOLERANCES}

    def solvers(self) -> dict[str, int | None]:
        """Evaluations until every sample met the tolerance, by solver; None if a sample did not meet the tolerance."""
        return {row.name: row.most if row.converged == row.samples > 0 else None for row in self.report.solvers}

    def summary(self) -> dict[str, Any]:
        """The entry of diagnosis.json."""
        return {
            "timestep": self.t,
            "findings": {f.condition.value: f.evidence for f in self.report.findings},
            "uncertain": [f.condition.value for f in self.report.findings if not f.certain],
            "radius": self.radius,
            "plain_evaluations": self.plain(),
            "evaluations": self.solvers(),
            "recommended": self.report.recommendation.code,
            "cost": {"evaluations": self.report.evals, "products": self.report.products},
        }


def diagnose_timesteps(
    model: FPDM,
    plan: SamplingPlan,
    labels: Sequence[int] | None,
    *,
    num: int,
    seed: int,
    tolerance: float,
    budget: int,
    device: str = "cpu",
) -> list[TimestepDiagnosis]:
    """Diagnose the fixed point at each timestep for samples 0 .. num - 1.

    Args:
        model: the network, on `device`.
        plan: the plan of sampling.
        labels: class of each sample; None for an unconditional network.
        num: number of samples.
        seed: random seed of the samples.
        tolerance: relative tolerance that the solvers have to meet.
        budget: maximum number of evaluations and products with the Jacobian, together, at each timestep.
        device: device of the model.

    Raises:
        ValueError: the network has no fixed-point layer, or the plan samples in parallel over the timesteps.
    """
    if not isinstance(model, FPDM):
        raise ValueError(f"A {type(model).__name__} has no fixed-point layer; give an FPDM.")
    if plan.parallel is not None:
        raise ValueError(
            "parallel samples all timesteps at once, and a diagnosis needs one timestep after another; leave it out."
        )
    calls: list[tuple[Tensor, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    try:
        sample(model, range(num), labels, plan=plan, seed=seed, chunk=num, device=device)
    finally:
        handle.remove()
    rows = []
    for t, inputs in zip(plan.timesteps, calls, strict=True):
        with torch.no_grad():
            f, z0, args = model.fixed_point_problem(*inputs)
        stop = Stop(rtol=tolerance, max_evals=100)
        report = diagnose(f, z0, *args, stop=stop, solvers=SOLVERS, estimators=(), budget=budget)
        rows.append(TimestepDiagnosis(int(t), report))
    return rows


def table(rows: Sequence[TimestepDiagnosis]) -> str:
    """A Markdown table with a row for each timestep."""
    names = list(rows[0].solvers())
    head = ["t", "fixed point", "radius", *(f"{rtol:.0e}" for rtol in TOLERANCES), *names]
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i == 1 else "---:" for i in range(len(head))) + "|",
    ]
    for row in rows:
        counts = [*row.plain().values(), *row.solvers().values()]
        found = ", ".join(f.condition.value + ("" if f.certain else "?") for f in row.report.findings)
        radius = f"{min(row.radius):.2f} to {max(row.radius):.2f}" if row.radius else "-"
        cells = [str(row.t), found, radius, *("-" if n is None else str(n) for n in counts)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
