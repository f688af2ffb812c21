"""The shapes and types that `implicit` declares are checked in the tests."""

import functools
import os

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from implicit.testing import jacobian
from tests.shape_checks import checked_once_a_kind, turn_on


@pytest.mark.skipif(os.environ.get("CHECK_TYPES") == "0", reason="without checks")
def test_a_function_of_the_package_refuses_another_shape():
    with pytest.raises(jaxtyping.TypeCheckError, match="z"):
        jacobian(torch.cos, torch.zeros(3))


def test_each_kind_of_arguments_is_checked_at_its_first_call():
    calls = []

    def counted(function):
        typed = beartype(function)
        return functools.wraps(function)(lambda *args, **kwargs: calls.append(args) or typed(*args, **kwargs))

    def row(z: Float[Tensor, "B N"], scale: float = 1.0) -> Float[Tensor, "1 N"]:
        return scale * z[:1]

    checked = checked_once_a_kind(lambda function, **_: counted(function), row, typechecker=None)
    for z in (torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.float64)):
        torch.testing.assert_close(checked(z, scale=2.0), 2 * z[:1])
    assert len(calls) == 3  # the second has the kind of the first
    turn_on(False)
    checked(torch.zeros(5, 5))
    assert len(calls) == 3


def test_wrong_values_of_a_known_function_raise_after_right_ones():
    def first(z: Float[Tensor, "B N"], same: Float[Tensor, "B N"]) -> Float[Tensor, "1 N"]:
        return z[:1]

    checked = checked_once_a_kind(jaxtyping.jaxtyped, first, typechecker=beartype)
    checked(torch.zeros(2, 3), torch.zeros(2, 3))
    for other in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64), None):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(torch.zeros(2, 3), other)
