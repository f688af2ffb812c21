"""Every estimator and solver of the library can be given on the command line and trains a network."""

from typing import get_args

import pytest
import torch

import implicit
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.train import parse
from apps.diffusion.training.trainer import Trainer

TINY = (
    "--model.hidden 16 --model.heads 2 --model.patch 4 --optimizer.batch 8 --optimizer.warmup 0 --stop.rtol 1e-3 "
    "--stop.max-evals 8"
).split()

GRADS = [
    ("grad:stochastic-jfb --grad.N 12 --grad.M 12", "solver:picard", implicit.StochasticJFB(12, 12)),
    ("grad:jfb --grad.steps 2", "solver:anderson", implicit.JFB(2)),
    ("grad:ift", "solver:picard", implicit.IFT()),
    ("grad:phantom --grad.steps 3 --grad.damping 0.25", "solver:picard", implicit.Phantom(3, 0.25)),
    ("grad:neumann --grad.terms 4", "solver:anderson", implicit.Neumann(4)),
    ("grad:shine --grad.refine 1", "solver:broyden", implicit.SHINE(1)),
    ("grad:shine", "solver:anderson-gs", implicit.SHINE()),
    ("grad:reversible --grad.beta 0.6", "solver:picard", implicit.Reversible(0.6)),
    ("grad:unrolled", "solver:picard", implicit.Unrolled()),
    ("grad:unrolled --grad.checkpoint True", "solver:anderson", implicit.Unrolled(checkpoint=True)),
]
SOLVERS = [
    ("solver:picard --solver.damping 0.5", implicit.Picard(damping=0.5)),
    ("solver:anderson --solver.memory 3", implicit.Anderson(memory=3)),
    ("solver:anderson-gs --solver.memory 7", implicit.AndersonGS(memory=7)),
    ("solver:bad-broyden --solver.memory 8", implicit.BadBroyden(memory=8)),
    ("solver:broyden --solver.memory 9 --solver.search 3", implicit.Broyden(memory=9, search=3)),
    ("solver:multisecant --solver.memory 6 --solver.filter 0.1", implicit.Multisecant(memory=6, filter=0.1)),
    ("solver:newton-krylov --solver.inner 5", implicit.NewtonKrylov(inner=5)),
]


def step(config):
    """Two steps of a network that is no identity; the gradient of the second reached every weight."""
    trainer = Trainer(config, digits("train"))
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.03 * torch.sin(torch.arange(p.numel()).view(p.shape)))
    for _ in range(2):
        loss, finite = trainer.step()
        assert finite and 0 < loss < 10
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.parameters())


def known(estimator):
    """Without the generator, which belongs to a step."""
    return (estimator.N, estimator.M) if isinstance(estimator, implicit.StochasticJFB) else estimator


@pytest.mark.filterwarnings("ignore::UserWarning")  # eight evaluations do not always converge
@pytest.mark.parametrize(("grad", "solver", "meant"), GRADS, ids=lambda value: str(value).split(" ")[0])
def test_every_estimator(grad, solver, meant):
    config, _ = parse([*TINY, *grad.split(), *solver.split()])
    assert known(config.grad) == known(meant)
    assert c.Config.from_json(config.to_json()) == config
    step(config)


@pytest.mark.parametrize(("solver", "meant"), SOLVERS, ids=lambda value: str(value).split(" ")[0])
def test_every_solver(solver, meant):
    config, _ = parse([*TINY, "grad:jfb", *solver.split()])
    assert config.solver == meant
    assert c.Config.from_json(config.to_json()) == config
    step(config)


def test_none_of_the_library_is_left_out():
    def concrete(base):
        return {x.__name__ for x in vars(implicit).values() if isinstance(x, type) and issubclass(x, base)} - {
            base.__name__
        }

    def choices(union):
        return {get_args(member)[0].__name__ for member in get_args(union)}

    def tried(rows):
        return {type(row[-1]).__name__ for row in rows}

    assert choices(c.Grad) == concrete(implicit.AbstractGrad) == tried(GRADS)
    assert choices(c.Solver) == concrete(implicit.AbstractSolver) == tried(SOLVERS)


@pytest.mark.parametrize(
    ("grad", "solver", "name"),
    [
        (implicit.SHINE(), implicit.Picard(), "solver:broyden"),
        (implicit.Reversible(), implicit.Anderson(), "solver:picard"),
        (implicit.SHINE(), implicit.NewtonKrylov(), "NewtonKrylov"),
        (implicit.Unrolled(), implicit.NewtonKrylov(), "Unrolled"),
    ],
)
def test_pairs_that_cannot_work_are_refused(grad, solver, name):
    with pytest.raises(ValueError, match=name):
        c.Config(grad=grad, solver=solver)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: implicit.Phantom(damping=1.0), "Phantom.damping"),
        (lambda: implicit.Neumann(terms=0), "Neumann.terms"),
        (lambda: implicit.SHINE(fallback=0.0), "SHINE.fallback"),
        (lambda: implicit.Reversible(beta=1.0), "Reversible.beta"),
        (lambda: implicit.NewtonKrylov(inner=0), "NewtonKrylov.inner"),
        (lambda: implicit.AndersonGS(memory=0), "AndersonGS.memory"),
    ],
)
def test_impossible_values_are_refused(build, name):
    with pytest.raises(ValueError, match=name):
        build()
