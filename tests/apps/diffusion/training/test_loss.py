"""The training loss, compared with its formulas for one sample at a time."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from apps.diffusion.models import FPDM
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.training.loss import TrainingNoise, TrainingSolve, loss
from implicit import JFB, Picard, Stop
from tests.apps.diffusion.helpers.small_models import randomized


def a_draw(n=6, shape=(2, 4, 4), seed=0, dropped=False, t=None):
    source = torch.Generator().manual_seed(seed)
    return TrainingNoise(
        noise=torch.randn(n, *shape, generator=source, dtype=torch.float64),
        t=torch.randint(1000, (n,), generator=source) if t is None else torch.tensor(t),
        dropped=torch.full((n,), dropped),
    )


def clean(n=6, shape=(2, 4, 4)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_loss_is_the_mean_squared_error_of_the_target_uniform_over_time(prediction):
    scheduler = make_scheduler(prediction=prediction, zero_snr=prediction != "epsilon")
    x0, draw = clean(), a_draw(t=[0, 10, 300, 700, 998, 999])
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return torch.full_like(x, 0.25)

    result = loss(model, x0, None, draw, scheduler=scheduler)
    for i, t in enumerate(draw.t.tolist()):
        a, b = float(scheduler.alphas_cumprod[t]) ** 0.5, (1 - float(scheduler.alphas_cumprod[t])) ** 0.5
        eps = draw.noise[i]
        torch.testing.assert_close(seen["x"][i], a * x0[i] + b * eps, rtol=1e-6, atol=1e-7)
        target = {"v_prediction": a * eps - b * x0[i], "epsilon": eps, "sample": x0[i]}[prediction]
        assert float(result.error[i]) == pytest.approx(float((0.25 - target).square().mean()), rel=1e-5)
    assert float(result.total) == pytest.approx(float(result.error.mean()), rel=1e-6)
    assert seen["y"] is None and torch.equal(seen["t"], draw.t) and result.bound is None


def test_at_the_last_timestep_the_image_is_gone_and_v_is_minus_it():
    x0, draw = clean(), a_draw(t=[999] * 6)
    result = loss(lambda x, t, y: (x == draw.noise).all() * -x0, x0, None, draw, scheduler=make_scheduler())
    assert float(result.total) == 0


def test_dropped_labels_become_the_null_class_and_no_others():
    x0, y = clean(), torch.arange(6)
    seen = []
    drop = torch.tensor([True, False, False, True, False, False])
    draw = TrainingNoise(noise=a_draw().noise, t=a_draw().t, dropped=drop)
    loss(lambda x, t, y: seen.append(y) or x, x0, y, draw, scheduler=make_scheduler(), null_class=10)
    assert seen[0].tolist() == [10, 1, 2, 10, 4, 5]
    assert y.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="null_class"):
        loss(lambda x, t, y: x, x0, y, draw, scheduler=make_scheduler())


def test_a_draw_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="noise"):
        loss(lambda x, t, y: x, clean(5), None, a_draw(6), scheduler=make_scheduler())


@pytest.mark.parametrize(("prediction", "zero_snr"), [("v_prediction", True), ("epsilon", False)])
def test_the_bound_is_the_divergence_of_the_two_steps(prediction, zero_snr):
    scheduler = make_scheduler(prediction=prediction, zero_snr=zero_snr, learn_sigma=True)
    abar = scheduler.alphas_cumprod.double()
    x0, draw = clean(), a_draw(t=[0, 1, 250, 500, 900, 999])
    out = torch.randn(6, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    seen = []
    result = loss(lambda x, t, y: seen.append(x) or out, x0, None, draw, scheduler=scheduler)
    for i, t in enumerate(draw.t.tolist()):
        a, before = abar[t], abar[t - 1] if t else torch.ones(())
        beta, x = 1 - a / before, seen[0][i]
        rho, said = (out[i, 2:] + 1) / 2, out[i, :2]
        guess = a.sqrt() * x - (1 - a).sqrt() * said
        if prediction == "epsilon":
            guess = (x - (1 - a).sqrt() * said) / a.sqrt()

        def mean(image, a=a, before=before, beta=beta, x=x):
            return before.sqrt() * beta / (1 - a) * image + (a / before).sqrt() * (1 - before) / (1 - a) * x

        small = beta * (1 - before) / (1 - a)
        if t == 0:
            small = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
        model_step = Normal(mean(guess), (rho * beta.log() + (1 - rho) * small.log()).mul(0.5).exp())
        if t == 0:
            nats = -model_step.log_prob(x0[i])
        else:
            nats = kl_divergence(Normal(mean(x0[i]), small.sqrt()), model_step)
        bits = float(nats.mean() / torch.tensor(2.0).log())
        assert float(result.bound[i]) == pytest.approx(bits, rel=1e-4)
    assert float(result.total) == pytest.approx(float(result.error.mean() + result.bound.mean()), rel=1e-6)


def test_the_bound_teaches_the_variance_alone():
    scheduler = make_scheduler(learn_sigma=True)
    x0, draw = clean(), a_draw(t=[0, 1, 250, 500, 900, 999])
    out = torch.randn(6, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    result = loss(lambda x, t, y: out, x0, None, draw, scheduler=scheduler)
    (gradient,) = torch.autograd.grad(result.total, out)
    plain = out.detach()[:, :2].requires_grad_()
    error = loss(lambda x, t, y: plain, x0, None, draw, scheduler=scheduler).total
    torch.testing.assert_close(gradient[:, :2], torch.autograd.grad(error, plain)[0])
    assert (gradient[:, 2:].abs().amax(dim=(1, 2, 3)) > 0).all()


def test_the_bound_is_least_where_the_variance_is_right():
    """A perfect mean wants the posterior's variance, which rho = -1 gives."""
    scheduler = make_scheduler(learn_sigma=True)
    x0, draw = clean(), a_draw(t=[5, 100, 400, 600, 800, 950])

    def bound(rho):
        def model(x, t, y):
            v = scheduler.get_velocity(x0, draw.noise, t)
            return torch.cat([v, torch.full_like(v, rho)], dim=1)

        return loss(model, x0, None, draw, scheduler=scheduler).bound

    assert (bound(-1.0).abs() < 1e-6).all()
    assert (bound(-0.8) > bound(-1.0)).all() and (bound(0.0) > bound(-0.8)).all()


def test_an_fpdm_is_trained_through_its_estimator_and_gives_its_solve_back():
    model = randomized(FPDM(input_size=4, in_channels=2, hidden_size=32, num_heads=4, num_classes=10))
    x0, draw = clean().float(), a_draw()
    draw = TrainingNoise(noise=draw.noise.float(), t=draw.t, dropped=draw.t > 500)
    solve = TrainingSolve(solver=Picard(), grad=JFB(), stop=Stop(rtol=0.0, atol=0.0, max_evals=3))
    result = loss(
        model, x0, torch.arange(6), draw, scheduler=make_scheduler(), null_class=model.null_class, solve=solve
    )
    result.total.backward()
    assert result.solution.evals.tolist() == [4] * 6
    assert all(p.grad is not None for p in model.parameters())
    again = loss(model, x0, torch.arange(6), draw, scheduler=make_scheduler(), null_class=model.null_class, solve=solve)
    assert torch.equal(result.total, again.total)
