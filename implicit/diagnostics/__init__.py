"""Diagnostics of fixed points and of gradient estimators; each file answers one question."""

from implicit.diagnostics.diagnose import Condition as Condition
from implicit.diagnostics.diagnose import Diagnosis as Diagnosis
from implicit.diagnostics.diagnose import Finding as Finding
from implicit.diagnostics.diagnose import Recommendation as Recommendation
from implicit.diagnostics.diagnose import SolverRow as SolverRow
from implicit.diagnostics.diagnose import diagnose as diagnose
from implicit.diagnostics.gradient_bias import BiasRow as BiasRow
from implicit.diagnostics.gradient_bias import GradientBias as GradientBias
from implicit.diagnostics.gradient_bias import every_estimator as every_estimator
from implicit.diagnostics.gradient_bias import gradient_bias as gradient_bias
from implicit.diagnostics.jacobian_penalty import jacobian_penalty as jacobian_penalty
from implicit.diagnostics.path_independence import PathIndependence as PathIndependence
from implicit.diagnostics.path_independence import path_independence as path_independence
from implicit.diagnostics.spectral_radius import Spectrum as Spectrum
from implicit.diagnostics.spectral_radius import spectral_radius as spectral_radius
from implicit.diagnostics.spectral_radius import spectrum as spectrum
