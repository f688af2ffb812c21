"""Learning rate, skipped steps, and the moving average."""

import pytest
import torch
from torch import nn

from apps.diffusion.config.training import OptimizerConfig
from apps.diffusion.training.optimizer import AveragedWeights, adamw, decay_at, step_if_finite


def step(model, optimizer, gradient):
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    step_if_finite(optimizer, norm.isfinite())
    return norm.isfinite()


def test_steps_are_those_of_plain_adamw():
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, beta2=0.9)
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = adamw(models[0].parameters(), config)
    plain = torch.optim.AdamW(models[1].parameters(), lr=0.1, betas=(0.9, 0.9), weight_decay=0.3, foreach=False)
    for gradient in (1.0, -2.0, 0.5):
        step(models[0], ours, gradient)
        for p in models[1].parameters():
            p.grad = torch.full_like(p, gradient)
        plain.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_changes_no_bit(gradient):
    model = nn.Linear(3, 2)
    optimizer = adamw(model.parameters(), OptimizerConfig(lr=0.1, weight_decay=0.3))
    average, steps = AveragedWeights(model, 0.5), torch.tensor(0)
    for value in (1.0, gradient, -1.0):
        before = [t.clone() for t in (*model.parameters(), *average.module.parameters())]
        moments = [t.clone() for entry in optimizer.state.values() for t in entry.values()]
        finite = step(model, optimizer, value)
        steps = steps + finite
        average.update(model, steps, finite)
        after = [*model.parameters(), *average.module.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == (not bool(finite))
        if not bool(finite):
            held = [t for entry in optimizer.state.values() for t in entry.values()]
            assert all(torch.equal(a, b) for a, b in zip(moments, held, strict=True))
    assert int(steps) == 2


def test_the_average_follows_its_recursion():
    model = nn.Linear(2, 1)
    average, expected = AveragedWeights(model, 0.6), None
    for k in range(8):
        with torch.no_grad():
            model.weight.fill_(float(k * k))
        average.update(model, torch.tensor(k + 1), torch.tensor(True))
        d = min(0.6, (1 + k) / (10 + k))
        expected = float(k * k) if expected is None else d * expected + (1 - d) * k * k
    assert float(next(average.module.parameters())[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert float(decay_at(0.6, torch.tensor(10**9))) == pytest.approx(0.6)
