"""A new solver or estimator of the library takes one line in one file to be accepted by every command."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import tyro

import implicit
from apps.diffusion.config import fixed_point
from apps.diffusion.config.serialization import from_plain, to_plain

ROOT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Halving(implicit.Picard):
    """Half a plain step."""

    share: float = 0.5


@dataclass(frozen=True)
class Once(implicit.JFB):
    """One evaluation with a graph."""

    weight: float = 1.0


def test_a_new_choice_is_parsed_and_saved():
    @dataclass(frozen=True)
    class Settings:
        solver: fixed_point.Solver | Halving = field(default_factory=implicit.Picard)
        grad: fixed_point.Grad | Once = field(default_factory=implicit.JFB)

    options = (tyro.conf.CascadeSubcommandArgs,)
    argv = "solver:halving --solver.share 0.25 grad:once --grad.weight 2".split()
    found = tyro.cli(Settings, args=argv, config=options)
    assert found == Settings(Halving(share=0.25), Once(weight=2.0))
    for kind, value in ((fixed_point.Solver | Halving, found.solver), (fixed_point.Grad | Once, found.grad)):
        assert from_plain(kind, to_plain(value), "here") == value


def test_a_linear_problem_takes_every_solver_by_the_name_that_the_forward_solve_has():
    @dataclass(frozen=True)
    class Settings:
        solver: fixed_point.Solver = field(default_factory=implicit.Picard)
        linear: implicit.AbstractSolver = field(default_factory=implicit.Picard)

    options = (tyro.conf.CascadeSubcommandArgs,)
    for name, kind in fixed_point.BY_NAME.items():
        argv = ["--linear", name, f"solver:{name}"]
        found = tyro.cli(Settings, args=argv, config=options, registry=fixed_point.REGISTRY)
        assert found == Settings(kind(), kind())
    assert set(fixed_point.BY_NAME.values()) == {get_args(choice)[0] for choice in get_args(fixed_point.Solver)}


def test_one_file_of_the_application_lists_solvers_and_estimators():
    """A new one touches five files: its own, two __init__.py, tests/helpers.py, and this file of the application."""
    files = [file for file in (ROOT / "apps").rglob("*.py") if "BadBroyden" in file.read_text()]
    assert [file.name for file in files] == ["fixed_point.py"]
    files = [file for file in (ROOT / "apps").rglob("*.py") if "Neumann" in file.read_text()]
    assert [file.name for file in files] == ["fixed_point.py"]
