"""Types of arguments: every field of every public setting, and of a solve, is checked by name."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest
import torch

from implicit import GMRES, IFT, Adjoint, SolveOptions, Stop, fixed_point
from implicit.argument_types import check_arguments, check_fields
from tests.helpers import ESTIMATORS, SOLVERS, half

SETTINGS = {type(s): s for s in (*SOLVERS, *(make() for make in ESTIMATORS.values()), GMRES(), Stop(), SolveOptions())}
FIELDS = [
    pytest.param(s, field.name, id=f"{type(s).__name__}.{field.name}")
    for s in SETTINGS.values()
    for field in fields(s)
    if field.name != "state"  # whose type is that of the solver
]


@pytest.mark.parametrize(("setting", "name"), FIELDS)
def test_a_field_of_another_type_is_named(setting, name):
    """By `__post_init__` alone, since the types that the tests check before would refuse it."""
    other: Any = copy.copy(setting)
    object.__setattr__(other, name, object())
    with pytest.raises(TypeError, match=rf"{type(setting).__name__}\.{name}"):
        other.__post_init__()


@dataclass
class Kinds:
    count: int = 1
    share: float = 0.5
    flag: bool = True
    word: Literal["a", "b"] = "a"
    limit: float | None = None
    act: Callable[[int], int] | None = None
    flags: bool | tuple[bool, ...] = False
    rng: torch.Generator | None = None
    other: Any = None


GOOD: dict[str, list[Any]] = {
    "count": [3, torch.tensor([2]).numpy()[0]],
    "share": [1, 0.5, torch.tensor([0.5]).numpy()[0]],
    "flag": [False],
    "word": ["b", "neither, which the owner refuses"],
    "limit": [None, 2],
    "act": [abs, None],
    "flags": [True, (True, False)],
    "rng": [torch.Generator()],
    "other": [object(), "x"],
}
BAD: dict[str, list[Any]] = {
    "count": [2.0, "3", True, None, torch.ones(1)],
    "share": ["0.5", 1j, True, torch.ones(2)],
    "flag": [1, None, "yes"],
    "word": [1, None],
    "limit": ["x"],
    "act": [3],
    "flags": [[True], (1,), 1],
    "rng": [0],
}


@pytest.mark.parametrize("name", GOOD)
def test_values_of_the_annotated_type_are_taken(name):
    for value in GOOD[name]:
        check_arguments(Kinds, {name: value})


@pytest.mark.parametrize("name", BAD)
def test_values_of_another_type_are_refused(name):
    for value in BAD[name]:
        kinds = Kinds()
        setattr(kinds, name, value)
        with pytest.raises(TypeError, match=rf"Kinds\.{name}"):
            check_fields(kinds)


@pytest.mark.parametrize(
    ("name", "value"),
    [("starts", 2.5), ("has_aux", "x"), ("generator", 0), ("callback", 1), ("adjoint", torch.ones(1)), ("trace", "x")],
)
def test_an_argument_of_a_solve_is_named(name, value):
    with pytest.raises(Exception, match=name):  # a TypeError, where the tests do not check types before
        fixed_point(half, torch.zeros(2, 3), **{name: value})


def test_a_state_and_a_result_that_are_not_dense_are_named():
    with pytest.raises(ValueError, match="to_dense"):
        fixed_point(half, torch.zeros(2, 3).to_sparse())
    with pytest.raises(ValueError, match="to_dense"):
        fixed_point(lambda z: (0.5 * z + 1).to_sparse(), torch.zeros(2, 3))


def test_an_adjoint_of_another_structure_is_named():
    w = torch.ones(3, requires_grad=True)
    for value in (3, (torch.zeros(2, 3),), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="adjoint"):
            fixed_point(lambda z: 0.5 * z * w + 1, torch.zeros(2, 3), grad=IFT(), adjoint=Adjoint(value))
