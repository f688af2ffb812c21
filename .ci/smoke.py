"""Import every module of an installed `implicit`, and solve with every solver and estimator: a check of an environment.

python .ci/smoke.py            # from another folder than the checkout, so that the installed package is found
"""

import importlib
import pkgutil
from importlib.metadata import PackageNotFoundError, version

import torch

import implicit
from implicit import IFT, SHINE, AbstractGrad, AbstractSolver, Broyden, Stop, Unrolled, fixed_point

OPTIONAL = {"implicit.interop.scipy", "implicit.interop.torchdeq"}  # need the library of that name


def main() -> None:
    names = [module.name for module in pkgutil.walk_packages(implicit.__path__, "implicit.")]
    for name in names:
        if name not in OPTIONAL:
            importlib.import_module(name)
    public = [getattr(implicit, name) for name in dir(implicit) if not name.startswith("_")]
    classes = [thing for thing in public if isinstance(thing, type)]
    solvers = [c() for c in classes if issubclass(c, AbstractSolver) and c is not AbstractSolver]
    grads = [c() for c in classes if issubclass(c, AbstractGrad) and c is not AbstractGrad]
    for solver in solvers:
        slope(solver, IFT())
    for grad in grads:
        exact = isinstance(grad, IFT | Unrolled)
        assert abs(slope(Broyden() if isinstance(grad, SHINE) else implicit.Picard(), grad) - 2) < (
            1e-3 if exact else 2
        )
    # derivatives of derivatives inside torch.func
    second = torch.func.grad(torch.func.grad(lambda a: root(a)))(torch.tensor(4.0, dtype=torch.float64))
    assert abs(second + 1 / 32) < 1e-6
    # weights that autocast has cast without a graph before
    layer = torch.nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        solution = fixed_point(lambda z: torch.tanh(layer(z)).float(), torch.zeros(2, 3), stop=Stop(rtol=1e-2))
    solution.value.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    try:
        installed = version("implicit-fixed-points")
    except PackageNotFoundError:
        installed = "not installed"
    print(f"implicit {implicit.__version__} ({installed}), torch {torch.__version__}: {len(names)} modules,")
    print(f"{len(solvers)} solvers and {len(grads)} estimators work")


def slope(solver: AbstractSolver, grad: AbstractGrad) -> float:
    """d sum(z*) / dx of one entry at z = z / 2 + x: 2."""
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    stop = Stop(rtol=1e-6, max_evals=100)
    solution = fixed_point(
        lambda z, x: 0.5 * z + x, torch.zeros(3, 4, dtype=torch.float64), x, solver=solver, grad=grad, stop=stop
    )
    solution.value.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    return float(x.grad[0, 0])


def root(a: torch.Tensor) -> torch.Tensor:
    """sqrt(a), by Heron's iteration."""
    stop = Stop(rtol=1e-12, max_evals=100)
    z0 = torch.ones(1, dtype=torch.float64)
    return fixed_point(lambda z: 0.5 * (z + a / z), z0, batch_dims=0, grad=IFT(stop=stop), stop=stop).value.sum()


if __name__ == "__main__":
    main()
