"""Diagnosis of a fixed-point problem: causes of failure and a recommendation; each file answers one question."""

from implicit.diagnostics.diagnose.condition import Condition as Condition
from implicit.diagnostics.diagnose.condition import Finding as Finding
from implicit.diagnostics.diagnose.estimator_trials import EstimatorTable as EstimatorTable
from implicit.diagnostics.diagnose.report import Diagnosis as Diagnosis
from implicit.diagnostics.diagnose.report import Recommendation as Recommendation
from implicit.diagnostics.diagnose.run import diagnose as diagnose
from implicit.diagnostics.diagnose.solver_trials import SolverRow as SolverRow
