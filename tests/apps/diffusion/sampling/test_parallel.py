"""Parallel-in-time sampling gives the images of sequential sampling in fewer rounds."""

from typing import Any

import pytest
import torch

from apps.diffusion.models import FPDM, DiT
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.parallel import Parallel, TriangularAnderson
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import make_scheduler, same_noise
from apps.diffusion.schedulers.reverse_step import Reverse
from apps.diffusion.schedulers.timesteps import timesteps
from implicit import Stop, iterate
from tests.apps.diffusion.helpers.small_models import randomized, sample_by

SMALL: dict[str, Any] = {"input_size": 4, "in_channels": 2, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
STEPS = 16


def network(kind):
    model = randomized(FPDM(**SMALL) if kind == "fpdm" else DiT(**SMALL, depth=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("final"):
                p.mul_(0.3)  # so that the prediction does not swamp x, as a trained network's does not
    return model


def options(kind, scheduler="ddim", **change):
    chosen = {
        "labels": [1, 2, 3],
        "seed": 0,
        "scheduler": same_noise(make_scheduler("ddpm"), scheduler),
        "timesteps": timesteps(STEPS),
        "chunk": 4,
        "dtype": torch.float64,
        "solve": Solve(iterations=3) if kind == "fpdm" else None,
    }
    return chosen | change


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_the_image_is_the_sequential_one(kind, scheduler, solver):
    model = network(kind).double()
    chosen = options(kind, scheduler, guidance=Guidance(scale=1.5))
    sequential = sample_by(model, range(3), **chosen)
    found = sample_by(model, range(3), parallel=Parallel(solver=solver, rtol=1e-9), **chosen)
    torch.testing.assert_close(found.samples, sequential.samples, rtol=1e-6, atol=1e-6)
    rounds = int(found.effort.rounds[0])
    assert rounds <= STEPS + 1 and sequential.effort.rounds.tolist() == [STEPS] * 3
    calls = 2 * STEPS * rounds  # two rows with guidance
    explicit, each = (2, 3) if kind == "fpdm" else (2, 0)
    assert found.effort.block_passes.tolist() == [calls * (explicit + each)] * 3
    assert found.effort.evaluations.sum(1).tolist() == [calls * each] * 3


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_timesteps_are_exact_within_the_rounds_of_picard(steps, window):
    model, chosen = network("dit").double(), options("dit", "ddpm", timesteps=timesteps(steps))
    sequential = sample_by(model, range(3), **chosen)
    found = sample_by(model, range(3), parallel=Parallel(solver="anderson", rtol=1e-9, window=window), **chosen)
    torch.testing.assert_close(found.samples, sequential.samples, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_loose_tolerance_takes_fewer_rounds_than_timesteps(solver):
    model, chosen = network("dit"), options("dit", timesteps=timesteps(40), dtype=torch.float32)
    sequential = sample_by(model, range(3), **chosen)
    found = sample_by(model, range(3), parallel=Parallel(solver=solver, rtol=1e-3), **chosen)
    assert int(found.effort.rounds[0]) < 20
    assert (found.samples - sequential.samples).norm() < 0.02 * sequential.samples.norm()


def test_windows_follow_one_another():
    model, chosen = network("dit").double(), options("dit")
    whole = sample_by(model, range(3), parallel=Parallel(rtol=1e-9), **chosen)
    parts = sample_by(model, range(3), parallel=Parallel(rtol=1e-9, window=5), **chosen)
    torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-6, atol=1e-6)
    single = sample_by(model, range(3), parallel=Parallel(window=1), **chosen)
    torch.testing.assert_close(single.samples, sample_by(model, range(3), **chosen).samples)
    assert int(single.effort.rounds[0]) >= STEPS


def test_a_sample_depends_on_no_other():
    model, chosen = network("fpdm"), options("fpdm", dtype=torch.float32)
    together = sample_by(model, range(3), parallel=Parallel(), **chosen).samples
    alone = sample_by(model, [1], parallel=Parallel(), **chosen | {"labels": [2]}).samples
    # the weights of the mixture are solved for in batches of another size only where the chunk has another size
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_the_gain_is_the_derivative_of_a_step():
    for kind in ("ddim", "ddpm"):
        reverse = Reverse(same_noise(make_scheduler("ddpm", clip=None), kind), timesteps(7))
        prediction, x = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
        for k in range(7):
            moved = reverse.step_with(k, prediction, x + 1e-3, None) - reverse.step_with(k, prediction, x, None)
            assert float(moved.mean()) / 1e-3 == pytest.approx(reverse.gain(k), rel=1e-6)


def test_triangular_anderson_is_causal_and_solves_a_triangular_system():
    torch.manual_seed(0)
    k, n = 6, 4
    lower = torch.tril(torch.ones(k, k, dtype=torch.float64), -1).repeat_interleave(n, 0).repeat_interleave(n, 1)
    matrix, shift = 0.3 * torch.randn(k * n, k * n, dtype=torch.float64) * lower, torch.randn(1, k * n).double()
    exact = torch.linalg.solve(torch.eye(k * n).double() - matrix, shift[0])
    stop = Stop(rtol=1e-10, atol=0, max_evals=30)
    solver = TriangularAnderson(k, 3)
    found = iterate(lambda z: z @ matrix.T + shift, torch.zeros(1, k * n).double(), solver, stop).check()
    torch.testing.assert_close(found.value[0], exact, rtol=1e-7, atol=1e-8)

    def prefix(scale):
        """The first half of the iterates when the second half of the system changes."""
        other = shift.clone()
        other[:, k * n // 2 :] *= scale
        fixed = Stop(rtol=0, atol=0, max_evals=5)
        value = iterate(lambda z: z @ matrix.T + other, torch.zeros(1, k * n).double(), solver, fixed).value
        return value[:, : k * n // 2]

    torch.testing.assert_close(prefix(1.0), prefix(10.0))


@pytest.mark.parametrize(
    "change", [{"solver": "newton"}, {"rtol": 0.0}, {"rtol": 1.0}, {"window": 0}, {"memory": 0}], ids=str
)
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Parallel(**change)


def test_what_carries_a_state_over_timesteps_is_refused():
    model = network("fpdm")
    for change, word in (
        ({"scheduler": same_noise(make_scheduler("ddpm"), "dpm++")}, "DPMSolver"),
        ({"solve": Solve(reuse=Reuse())}, "reuse"),
        ({"solve": Solve(iterations=tuple(range(1, STEPS + 1)))}, "iterations"),
    ):
        with pytest.raises(ValueError, match=word):
            sample_by(model, range(3), parallel=Parallel(), **options("fpdm", dtype=torch.float32) | change)
