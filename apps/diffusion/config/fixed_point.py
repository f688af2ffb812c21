"""The solvers and gradient estimators of the commands: `implicit`'s own dataclasses, with all their options.

A new solver or estimator of `implicit` takes one more line here. Every command (`solver:picard`, `grad:jfb`) and
config.json then accept it.
"""

import inspect
import re
from typing import Annotated, Any, get_args

import tyro

import implicit


def _summary(kind: type) -> Any:
    """The first sentence of a class, for `--help`."""
    return tyro.conf.subcommand(description=(inspect.getdoc(kind) or "").split("\n\n")[0])


Solver = (
    Annotated[implicit.Picard, _summary(implicit.Picard)]
    | Annotated[implicit.Anderson, _summary(implicit.Anderson)]
    | Annotated[implicit.AndersonGS, _summary(implicit.AndersonGS)]
    | Annotated[implicit.Multisecant, _summary(implicit.Multisecant)]
    | Annotated[implicit.Broyden, _summary(implicit.Broyden)]
    | Annotated[implicit.BadBroyden, _summary(implicit.BadBroyden)]
    | Annotated[implicit.NewtonKrylov, _summary(implicit.NewtonKrylov)]
)
Grad = (
    Annotated[implicit.StochasticJFB, _summary(implicit.StochasticJFB)]
    | Annotated[implicit.JFB, _summary(implicit.JFB)]
    | Annotated[implicit.IFT, _summary(implicit.IFT)]
    | Annotated[implicit.Phantom, _summary(implicit.Phantom)]
    | Annotated[implicit.Neumann, _summary(implicit.Neumann)]
    | Annotated[implicit.SHINE, _summary(implicit.SHINE)]
    | Annotated[implicit.Reversible, _summary(implicit.Reversible)]
    | Annotated[implicit.Unrolled, _summary(implicit.Unrolled)]
)


# names on the command line: AndersonGS is anderson-gs, as in `solver:anderson-gs`
BY_NAME = {
    re.sub("(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower(): kind for kind, _ in map(get_args, get_args(Solver))
}
SOLVERS: tuple[implicit.AbstractSolver[Any], ...] = tuple(kind() for kind in BY_NAME.values())
"""Every solver, with its default options."""
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _any_solver(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Lets a field of type `AbstractSolver`, such as the solver of IFT's linear problem, be given on the command line
    by the solver's name; the solver then has its default options.
    """
    if info.type is not implicit.AbstractSolver and info.type_origin is not implicit.AbstractSolver:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(BY_NAME) + "}",
        instance_from_str=lambda words: BY_NAME[words[0]](),
        is_instance=lambda value: isinstance(value, implicit.AbstractSolver),
        str_from_instance=lambda value: [n for n, kind in BY_NAME.items() if kind is type(value)],
        choices=tuple(BY_NAME),
    )


def check_pair(grad: implicit.AbstractGrad, solver: implicit.AbstractSolver[Any]) -> None:
    """Raises ValueError if the estimator cannot work with the solver, or would ignore the solver."""
    own = type(solver)
    if isinstance(grad, implicit.SHINE) and own.inverse_transpose is implicit.AbstractSolver.inverse_transpose:
        raise ValueError(
            f"SHINE needs a solver with an approximate inverse of I - df/dz, which {own.__name__} does not have; use "
            "solver:broyden, solver:anderson, solver:anderson-gs, solver:multisecant or solver:bad-broyden."
        )
    if isinstance(grad, implicit.Unrolled) and not solver.differentiable:
        raise ValueError(f"Unrolled cannot record the steps of {own.__name__}; use grad:ift, or another solver.")
    if isinstance(grad, implicit.Reversible) and solver != implicit.Picard():
        raise ValueError(
            f"Reversible has its own iteration and would ignore {own.__name__}; leave the solver at solver:picard."
        )
