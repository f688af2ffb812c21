"""Optional terms of an FPDM's training loss, each compared with its formula, and the start with noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.models import FPDM
from apps.diffusion.training.loss import loss
from apps.diffusion.training.penalties import NoisyStart, Penalties
from apps.diffusion.training.solve import grown
from apps.diffusion.training.trainer import Trainer
from implicit import JFB, StochasticJFB
from tests.apps.diffusion.helpers.small_models import batch, randomized

SMALL: dict[str, Any] = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 10}


def called(penalty, **options):
    model = randomized(FPDM(**SMALL))
    answer = model(*batch(model), iterations=3, penalty=penalty, return_solution=True, **options)
    return model, answer


def penalties(**weights):
    return Penalties(**weights, generator=torch.Generator().manual_seed(0))


def test_each_term_is_its_formula():
    seen: dict[str, Any] = {}

    def record(f, decode, fresh, z, prediction):
        seen.update(f=f, decode=decode, fresh=fresh, z=z, prediction=prediction)
        return prediction.new_zeros(())

    model, (prediction, solution, zero) = called(record)
    assert float(zero) == 0 and torch.equal(seen["decode"](solution.value), prediction)
    assert torch.equal(prediction, model(*batch(model), iterations=3))
    torch.testing.assert_close(model(*batch(model), iterations=1), seen["decode"](seen["f"](seen["fresh"])))
    f, z = seen["f"], solution.value.detach()
    gap = (f(z) - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
    early = seen["decode"](f(seen["fresh"])) - prediction
    earlier = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    reuse = seen["decode"](f(earlier)) - prediction
    # the mean of many probes is ||df/dz||_F^2 / N, here of the dense Jacobian of one sample
    tokens, width = z.shape[1:]
    full = torch.autograd.functional.jacobian(f, z, vectorize=False).reshape(3, tokens * width, 3, tokens * width)
    norms = torch.stack([full[b, :, b].square().sum() for b in range(3)]) / (tokens * width)
    values = {"residual": gap.square().mean(), "early": early.square().mean(), "jacobian": norms.mean()}
    values["reuse"] = reuse.square().mean()
    arguments = (f, seen["decode"], seen["fresh"], z, prediction)
    for name, value in values.items():
        term = penalties(**{name: 2.0}, earlier=earlier if name == "reuse" else None)
        if name == "jacobian":
            found = torch.stack([term(*arguments).detach() for _ in range(100)])
            assert float(found.mean()) == pytest.approx(2 * float(value), rel=0.15)
        else:
            torch.testing.assert_close(term(*arguments), 2 * value)


@pytest.mark.parametrize("name", ["residual", "jacobian", "early", "reuse"])
def test_gradient_checkpointing_changes_no_term_and_no_gradient(name):
    """Also for a term that evaluates attention by another kernel than the backward pass would."""

    def found(checkpointing):
        model = randomized(FPDM(**SMALL))
        if checkpointing:
            model.enable_gradient_checkpointing()
        earlier = torch.ones(3, 4, 16) if name == "reuse" else None
        prediction, _, value = model(*batch(model), iterations=3, penalty=penalties(**{name: 1.0}, earlier=earlier))
        (prediction.square().mean() + value).backward()
        return [value.detach(), *(p.grad for p in model.parameters())]

    for one, other in zip(found(False), found(True), strict=True):
        torch.testing.assert_close(one, other)


def test_the_target_of_the_early_prediction_has_no_gradient():
    _, (prediction, _, value) = called(penalties(early=1.0))
    assert value.requires_grad and prediction.requires_grad
    through = torch.autograd.grad(value, prediction, allow_unused=True)[0]
    assert through is None


def test_the_earlier_solution_is_that_of_a_noisier_timestep_of_the_same_image():
    made = Trainer(
        c.Config(
            model=c.ModelConfig(hidden=16, heads=2, patch=4),
            optimizer=c.OptimizerConfig(images=64, batch=16),
            loss=c.LossConfig(reuse=0.5),
            grad=StochasticJFB(N=1, M=1),
            track="none",
        ),
        digits("train"),
    )
    model: Any = randomized(made.model)
    x, y, noise = made._batch()
    solves: list[Any] = [made._solve(noise) for _ in range(3)]  # each with a generator of its own
    s = solves[0].earlier
    assert ((s > noise.t) | (noise.t == 999)).all() and (s - noise.t <= 100).all() and (s <= 999).all()
    options: dict[str, Any] = {"scheduler": made.scheduler, "null_class": made.null_class}
    total = made._loss(x, y, noise).total
    without = loss(model, x, y, noise, solve=replace(solves[1], penalty=None, earlier=None), **options).total
    # the term by hand: solutions at s by the model's own iterations, and one iteration at t from there
    labels, abar = torch.where(noise.dropped, 10, y), made.scheduler.alphas_cumprod
    inputs = [
        (abar[t].sqrt().view(-1, 1, 1, 1) * x + (1 - abar[t]).sqrt().view(-1, 1, 1, 1) * noise.noise, t, labels)
        for t in (s, noise.t)
    ]
    with torch.no_grad():
        _, earlier = model(*inputs[0], return_solution=True)
        near = model(*inputs[1], iterations=1, start=earlier.value)
        prediction = model(*inputs[1], grad=solves[2].grad, stop=solves[2].stop)
    expected = 0.5 * (near - prediction).square().mean()
    assert (total - without).item() == pytest.approx(float(expected), rel=1e-4)


def test_iterations_grow_to_their_numbers():
    grad = StochasticJFB(N=6, M=3)
    found = [(g.N, g.M) for g in (grown(grad, done, 0.5) for done in (0.0, 0.1, 0.25, 0.4, 0.5, 1.0))]
    assert found == [(0, 1), (1, 1), (3, 2), (5, 2), (6, 3), (6, 3)]
    assert grown(grad, 0.0, 0.0) == grad
    config = c.Config(
        model=c.ModelConfig(hidden=16, heads=2, patch=4),
        optimizer=c.OptimizerConfig(images=160, batch=16),
        grad=grad,
        growth=0.5,
        track="none",
    )
    made, seen = Trainer(config, digits("train")), []
    while not made.finished:
        solve: Any = made._solve(made._batch()[2])
        seen.append((solve.grad.N, solve.grad.M))
        made.step()
    assert seen == [(g.N, g.M) for g in (grown(grad, k / 10, 0.5) for k in range(10))]
    for changes in ({"growth": 1.5}, {"grad": JFB()}, {"model": c.ModelConfig(kind="dit")}):
        with pytest.raises(ValueError, match="growth"):
            replace(config, **changes)


def test_a_start_with_noise_is_relative_and_of_each_image():
    fresh, positions = torch.randn(3, 4, 16) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1), torch.arange(3)
    noisy = NoisyStart(scale=0.5, seed=0, positions=positions)(fresh)
    size = (noisy - fresh).square().mean(dim=(1, 2)).sqrt() / fresh.square().mean(dim=(1, 2)).sqrt()
    assert ((0.3 < size) & (size < 0.7)).all()
    last = NoisyStart(scale=0.5, seed=0, positions=positions[2:])(fresh[2:])
    torch.testing.assert_close(last, noisy[2:])
    assert torch.equal(NoisyStart(scale=0.0, seed=0, positions=positions)(fresh), fresh)


def test_training_with_every_term_learns_and_repeats():
    config = c.Config(
        model=c.ModelConfig(hidden=16, heads=2, patch=4),
        optimizer=c.OptimizerConfig(images=480, batch=16, lr=1e-2, warmup=0),
        loss=c.LossConfig(residual=0.1, jacobian=0.01, early=0.1, reuse=0.1, start_noise=0.3),
        growth=0.5,
        track="none",
    )

    def losses(config, steps=12):
        trainer = Trainer(config, digits("train"))
        return [float(trainer.step()[0]) for _ in range(steps)]

    found = losses(config)
    assert found[:6] == losses(config, 6) and sum(found[-4:]) < sum(found[:4])
    plain = losses(replace(config, loss=c.LossConfig()), 3)
    for name in c.LossConfig.FIXED_POINT:
        assert losses(replace(config, loss=c.LossConfig(**{name: 0.1})), 3) != plain, name


def test_terms_are_checked():
    for name in c.LossConfig.FIXED_POINT:
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            c.LossConfig(**{name: -1.0})
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            c.Config(model=c.ModelConfig(kind="dit"), loss=c.LossConfig(**{name: 0.1}))
