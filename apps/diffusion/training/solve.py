"""How a training step of an FPDM solves its fixed point: estimator, start and penalty, from the configuration."""

from dataclasses import replace
from typing import Any

from apps.diffusion.config.training import Config
from apps.diffusion.rng import Stream, generator
from apps.diffusion.training.loss import TrainingNoise, TrainingSolve
from apps.diffusion.training.penalties import NoisyStart, Penalties, earlier_timesteps
from implicit import AbstractGrad, StochasticJFB, Stop


def training_solve(config: Config, noise: TrainingNoise, images: int, done: float) -> TrainingSolve | None:
    """The solve of a training step; None for a DiT.

    Args:
        config: the run's configuration.
        noise: the randomness of the step, with `positions`.
        images: number of images seen before the step.
        done: share of the training that is done, in [0, 1].
    """
    if config.model.kind == "dit":
        return None
    terms, seed, positions = config.loss, config.seed, noise.positions
    assert positions is not None
    start = NoisyStart(scale=terms.start_noise, seed=seed, positions=positions) if terms.start_noise else None
    earlier = earlier_timesteps(seed, positions, noise.t, config.schedule.timesteps) if terms.reuse else None
    weights = {name: getattr(terms, name) for name in ("residual", "jacobian", "early", "reuse")}
    probes = generator(seed, Stream.PROBES, images)
    penalty = Penalties(**weights, generator=probes) if any(weights.values()) else None
    return TrainingSolve(
        solver=config.solver,
        grad=_estimator(config, images, done),
        stop=_stop(config),
        start=start,
        penalty=penalty,
        earlier=earlier,
    )


def grown(grad: StochasticJFB, done: float, growth: float) -> StochasticJFB:
    """S-JFB with iterations that grow with training: N and M rise while a share g of the training passes.

        N_s = round(r N),   M_s = max(1, round(r M)),   r = min(1, s / g)    s the share of the training that is done

    Early steps are then cheaper, so more of them fit into the same time; late steps iterate toward the fixed point. Bai
    et al. 2019 (DEQ, arXiv 1909.01377) begin with a shallow unrolled network; McLeish et al. 2025 (arXiv 2511.07384)
    raise the recurrences of a language model over training.

    Args:
        grad: the estimator with the final N and M.
        done: s, in [0, 1].
        growth: g; 0: N and M are constant.
    """
    ratio = min(1.0, done / growth) if growth else 1.0
    return replace(grad, N=round(ratio * grad.N), M=max(1, round(ratio * grad.M)))


def _stop(config: Config) -> Stop:
    """The stopping criterion. A fixed count reads nothing from the device: the loss has no sample to leave out."""
    fixed = isinstance(config.grad, StochasticJFB) or not config.stop.has_tolerance
    return replace(config.stop, late=True) if fixed else config.stop


def _estimator(config: Config, images: int, done: float) -> AbstractGrad:
    """The gradient estimator of a step; a random estimator gets a generator seeded by (seed, images seen)."""
    grad: Any = config.grad
    if not hasattr(grad, "generator"):
        return grad
    if config.growth:
        grad = grown(grad, done, config.growth)
    return replace(grad, generator=generator(config.seed, Stream.SOLVE, images))
