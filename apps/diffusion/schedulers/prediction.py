"""Prediction targets: from a prediction of v, eps or x_0 to the pair (x_0, eps).

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
"""

from torch import Tensor


def clean_and_noise(prediction: Tensor, x: Tensor, abar: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(x_0, eps) of x = sqrt(abar) x_0 + sqrt(1 - abar) eps, given a prediction of v, eps or x_0."""
    a, b = (float(c) if c.ndim == 0 else c for c in (abar.sqrt(), (1 - abar).sqrt()))
    if kind == "v_prediction":
        return a * x - b * prediction, a * prediction + b * x
    if kind == "epsilon":
        return (x - b * prediction) / a, prediction
    return prediction, (x - a * prediction) / b
