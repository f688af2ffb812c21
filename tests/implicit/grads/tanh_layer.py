"""The map tanh(z W^T + x) in float64, and estimators as parameters of a test."""

import pytest
import torch
from torch import Tensor, nn

from implicit import (
    Stop,
)

TIGHT = Stop(rtol=1e-11, atol=0, max_evals=400)
SOLVE = Stop(rtol=1e-11, atol=0, max_evals=200)
F64 = torch.float64


def named(*estimators):
    return pytest.mark.parametrize("grad", estimators, ids=lambda g: type(g).__name__)


def weight(seed: int = 0) -> Tensor:
    w = torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (0.5 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()


X = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(9))
ZERO = torch.zeros_like(X)


class Late(nn.Module):
    """A layer that reads its context from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(weight().detach())
        self.context = X

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.T + self.context)
