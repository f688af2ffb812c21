"""The sampling loop: reproducible samples, labels, reuse, effort, progress, errors."""

from typing import Any

import pytest
import torch

from apps.diffusion.models import FPDM, DiT, latent_transformer
from apps.diffusion.models.cost import cost
from apps.diffusion.rng import Stream, generator
from apps.diffusion.sampling.guidance import Guidance
from apps.diffusion.sampling.parallel import Parallel
from apps.diffusion.sampling.sampler import Solve
from apps.diffusion.sampling.warm_start import Reuse
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.schedulers.reverse_step import Reverse
from apps.diffusion.schedulers.timesteps import timesteps
from benchmarks.harness import OperatorCounter
from implicit import Anderson, Stop
from tests.apps.diffusion.helpers.small_models import randomized, sample_by
from tests.helpers import Waits, watching

SHAPE = (1, 2, 2)
TINY: dict[str, Any] = {"input_size": 4, "in_channels": 2, "hidden_size": 32, "num_heads": 4, "num_classes": 10}


def tiny(kind: Any = FPDM, **change):
    model = randomized(kind(**TINY | change))
    with torch.no_grad():
        if kind is FPDM:
            model.block_fixed_point_projection_fc2.weight.mul_(0.4)
    return model


CASES = {
    "plain": {},
    "guided": {"guidance": Guidance(scale=3.0)},
    "listed": {"solve": Solve(iterations=(4, 3, 2, 1, 1))},
    "reused": {"solve": Solve(iterations=2, reuse=Reuse()), "guidance": Guidance(scale=2.0)},
    "tolerant": {"solve": Solve(stop=Stop(rtol=1e-3), solver=Anderson(), reuse=Reuse(share=0.5, extrapolation=1.0))},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm++"])
def test_the_same_bits_however_samples_are_requested(case, kind):
    model = tiny(iterations=3)
    labels = [i % 10 for i in range(21)]
    options = {"seed": 7, "scheduler": make_scheduler(kind), "timesteps": timesteps(5), "chunk": 8, **CASES[case]}
    whole = sample_by(model, range(21), labels, **options)
    assert whole.samples.shape == (21, 2, 4, 4) and not whole.samples.requires_grad
    assert whole.samples.flatten(1).std(0).min() > 1e-2
    for indices in ([0], [20, 3, 11], list(range(5, 17))):
        part: Any = sample_by(model, indices, [labels[i] for i in indices], **options)
        assert torch.equal(part.samples, whole.samples[indices])
        assert torch.equal(part.effort.evaluations, whole.effort.evaluations[indices])
        assert part.indices == tuple(indices) and part.labels.tolist() == [labels[i] for i in indices]


def test_seed_index_and_label_all_matter():
    model = tiny(DiT, depth=2)
    options = {"scheduler": make_scheduler("ddim"), "timesteps": timesteps(3), "chunk": 4}
    base = sample_by(model, [0, 1], [3, 3], seed=0, **options).samples
    assert not torch.equal(base[0], base[1])
    for other in (
        sample_by(model, [0, 1], [3, 3], seed=1, **options),
        sample_by(model, [0, 1], [4, 4], seed=0, **options),
    ):
        assert (other.samples - base).flatten(1).abs().amax(1).min() > 1e-3


def test_unconditional_sampling():
    model = tiny(num_classes=0)
    result = sample_by(model, range(3), seed=0, scheduler=make_scheduler("ddim"), timesteps=timesteps(3), chunk=4)
    assert result.labels is None and result.samples.isfinite().all()
    with pytest.raises(ValueError, match=r"Guidance\.scale"):
        sample_by(
            model,
            range(3),
            seed=0,
            scheduler=make_scheduler("ddim"),
            timesteps=timesteps(3),
            guidance=Guidance(scale=2.0),
        )


def test_reuse_starts_from_the_solutions_before():
    """One walk of three timesteps, with the starts made by hand."""
    model = tiny().double()
    scheduler, array = make_scheduler("ddim"), timesteps(3)
    options = {"seed": 0, "scheduler": scheduler, "timesteps": array, "chunk": 2, "dtype": torch.float64}
    y, abar = torch.tensor([1, 2]), scheduler.alphas_cumprod.double()
    for reuse in (Reuse(), Reuse(share=0.3), Reuse(extrapolation=0.5), Reuse(share=0.0)):
        x = torch.stack([torch.randn(2, 4, 4, generator=generator(0, Stream.SAMPLE, i)) for i in range(2)]).double()
        past = []
        for k, t in enumerate(array):
            start = None
            if past:
                guess = past[-1] + (reuse.extrapolation * (past[-1] - past[-2]) if len(past) > 1 else 0)
                start = lambda fresh, g=guess, s=reuse.share: (1 - s) * fresh + s * g  # noqa: E731
            with torch.no_grad():
                v, solved = model(x, torch.full((2,), t), y, iterations=1, start=start, return_solution=True)
            past.append(solved.value)
            a, b = abar[t], abar[array[k + 1]] if k < 2 else torch.ones(())
            x0, eps = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
            x = b.sqrt() * x0 + (1 - b).sqrt() * eps
        result = sample_by(model, [0, 1], [1, 2], solve=Solve(iterations=1, reuse=reuse), **options)
        torch.testing.assert_close(result.samples, x, rtol=1e-9, atol=1e-9)


def test_reuse_makes_one_iteration_as_good_as_many():
    """A converged solve is the reference; one iteration from the last solution is nearer to it than one from fresh."""
    model = tiny()
    options = {"seed": 0, "scheduler": make_scheduler("ddim"), "timesteps": timesteps(25), "chunk": 8}
    solves = (Solve(iterations=40), Solve(iterations=1), Solve(iterations=1, reuse=Reuse()))
    exact, fresh, reused = (sample_by(model, range(8), [0] * 8, solve=s, **options).samples for s in solves)
    assert (reused - exact).norm() < 0.5 * (fresh - exact).norm()


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(scale=2.0)])
@pytest.mark.parametrize("kind", [FPDM, DiT])
def test_the_effort_is_what_hooks_count(kind, guidance):
    model = tiny(kind, **({"depth": 3} if kind is DiT else {"pre": 2}))
    rows = {"blocks": 0, "layer": 0}

    def count(name):
        return lambda module, inputs, output: rows.__setitem__(name, rows[name] + len(output))

    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.register_forward_hook(count("blocks"))
            if name.startswith("block_fixed_point"):
                module.register_forward_hook(count("layer"))
    solve = Solve(iterations=(5, 3, 1)) if kind is FPDM else None
    effort = sample_by(
        model,
        range(8),
        [0] * 8,
        seed=0,
        scheduler=make_scheduler("ddim"),
        timesteps=timesteps(3),
        guidance=guidance,
        solve=solve,
        chunk=4,
    ).effort
    assert effort.block_passes.sum() == rows["blocks"]
    assert effort.evaluations.sum() == rows["layer"]
    doubled = 2 if guidance.doubles else 1
    spent = [model.macs(k) for k in (5, 3, 1)] if kind is FPDM else [model.macs()] * 3
    assert effort.macs.tolist() == [doubled * sum(spent)] * 8
    assert effort.evaluations.tolist() == [[k * doubled for k in ((5, 3, 1) if kind is FPDM else (0, 0, 0))]] * 8
    summary = effort.summary()
    assert summary["seconds"] > 0 and summary["block_passes"] == rows["blocks"] / 8
    assert ("residual" in summary) == (kind is FPDM) == bool(effort.residuals.isfinite().all())


def by_hand(model, reverse, guidance, solve, y):
    """Samples 0 and 1 step by step, with the guided prediction of two rows within the interval alone."""
    x = torch.stack([torch.randn(2, 4, 4, generator=generator(0, Stream.SAMPLE, i)) for i in range(len(y))]).double()
    past: list[Any] = []
    low, high = guidance.interval
    for k, t in enumerate(reverse.timesteps):
        inputs = (x, torch.full((2,), t), y)
        if low <= t <= high:
            inputs = (torch.cat([x, x]), torch.full((4,), t), torch.cat([y, torch.full_like(y, 10)]))
        start, state, rows = None, None, len(inputs[0])
        if past and solve.reuse is not None:
            start = solve.reuse.start([(torch.cat([z, z]) if len(z) < rows else z)[:rows] for z, _ in past[-2:]])
            state = past[-1][1] if solve.reuse.history and len(past[-1][0]) == rows else None
        options: dict[str, Any] = {"iterations": 3, "solver": solve.solver, "start": start, "state": state}
        with torch.no_grad():
            v, solved = model(*inputs, keep_state=True, return_solution=True, **options)
        past.append((solved.value, solved.state))
        x = reverse.step(k, v if rows == 2 else v[2:] + guidance.scale * (v[:2] - v[2:]), x, [])
    return x


@pytest.mark.parametrize("reuse", [None, Reuse(), Reuse(extrapolation=1.0), Reuse(history=True)])
def test_guidance_in_an_interval_is_guidance_there_and_none_elsewhere(reuse):
    model, scheduler, array = tiny().double(), make_scheduler("ddim"), timesteps(4)
    guidance = Guidance(scale=3.0, interval=(array[2], array[1]))
    solve, y = Solve(iterations=3, reuse=reuse, solver=Anderson(memory=3)), torch.tensor([1, 2])
    options = {"timesteps": array, "chunk": 2, "dtype": torch.float64, "guidance": guidance, "solve": solve}
    result = sample_by(model, [0, 1], [1, 2], seed=0, scheduler=scheduler, **options)
    expected = by_hand(model, Reverse(scheduler, array), guidance, solve, y)
    torch.testing.assert_close(result.samples, expected, rtol=1e-9, atol=1e-9)
    assert result.effort.evaluations.tolist() == [[3, 6, 6, 3]] * 2
    assert result.effort.block_passes.tolist() == [6 * (3 + 2)] * 2
    assert result.effort.macs.tolist() == [6 * model.macs(3)] * 2
    with pytest.raises(ValueError, match="interval"):
        sample_by(model, [0], [1], seed=0, scheduler=scheduler, **options, parallel=Parallel())


def test_a_tolerance_per_timestep_is_met_by_each_sample():
    model = tiny()
    stops = tuple(Stop(rtol=r, atol=0, max_evals=100) for r in (1e-1, 1e-3, 1e-5))
    effort = sample_by(
        model,
        range(6),
        [0] * 6,
        seed=0,
        scheduler=make_scheduler("ddim"),
        timesteps=timesteps(3),
        solve=Solve(stop=stops),
    ).effort
    for k, stop in enumerate(stops):
        assert (effort.residuals[:, k] <= 1.01 * stop.rtol).all()
    assert (effort.evaluations[:, 0] < effort.evaluations[:, 2]).all()
    block_passes, _ = cost(model, effort.evaluations, torch.full((6,), 3))
    assert torch.equal(block_passes, effort.evaluations.sum(1) + 3 * 2)


def test_progress_is_reported():
    seen = []
    model = tiny(DiT, depth=1)
    sample_by(
        model,
        range(5),
        [0] * 5,
        seed=0,
        scheduler=make_scheduler("ddim"),
        timesteps=timesteps(3),
        chunk=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k, 6) for k in range(1, 7)]


def test_bad_requests_are_refused():
    model = tiny()
    options = {"seed": 0, "scheduler": make_scheduler("ddim"), "timesteps": timesteps(3)}
    bad = [
        (([0, 1], [0]), {}, "labels"),
        (([], []), {}, "indices"),
        (([-1], [0]), {}, "indices"),
        (([0], [0]), {"chunk": 0}, "chunk"),
        (([0], [11]), {}, r"^y\b"),
        (([0],), {}, r"^y\b"),
        (([0], [0]), {"solve": Solve(iterations=(1, 2))}, r"Solve\.iterations"),
        (([0], [0]), {"solve": Solve(stop=(Stop(),))}, r"Solve\.stop"),
    ]
    for arguments, change, name in bad:
        with pytest.raises(ValueError, match=name):
            sample_by(model, *arguments, **options | change)
    with pytest.raises(ValueError, match=r"Solve\.iterations"):
        Solve(iterations=3, stop=Stop())
    for change in ({"share": 1.5}, {"extrapolation": -0.1}):
        with pytest.raises(ValueError, match="Reuse"):
            Reuse(**change)
    with pytest.raises(ValueError, match="FPDM"):
        sample_by(lambda x, t, y: x, [0], solve=Solve(iterations=2), shape=SHAPE, **options)


@pytest.mark.parametrize("network", [FPDM, DiT])
def test_precision_and_compilation_change_rounding_alone(network):
    model = randomized(network(**TINY)).eval()
    options = {"seed": 2, "scheduler": make_scheduler("ddim"), "timesteps": timesteps(3), "chunk": 4}

    def samples(**more):
        return sample_by(model, range(4), [0, 1, 2, 3], **options, **more)

    plain, half = samples(), samples(precision="bf16")
    assert half.samples.dtype == torch.float32 and not torch.equal(half.samples, plain.samples)
    size = plain.samples.square().mean().sqrt()
    assert (half.samples - plain.samples).square().mean().sqrt() < 0.05 * size
    assert torch.equal(half.effort.evaluations, plain.effort.evaluations)
    model.compile_blocks(backend="eager")
    compiled = samples()
    torch.testing.assert_close(compiled.samples, plain.samples, rtol=1e-4, atol=1e-4)


def test_requested_samples_alone_agree_to_rounding():
    model = randomized(FPDM(**TINY)).eval()
    options = {"seed": 4, "scheduler": make_scheduler("ddpm"), "timesteps": timesteps(3)}
    indices, labels = [9, 2, 30, 31, 5], [0, 1, 2, 3, 4]
    whole = sample_by(model, indices, labels, chunk=8, **options)
    apart = sample_by(model, indices, labels, chunk=2, reproducible=False, **options)
    torch.testing.assert_close(apart.samples, whole.samples, rtol=1e-4, atol=1e-4)
    per_image = int(whole.effort.block_passes[0])
    assert (apart.effort.computed, whole.effort.computed) == (5 * per_image, 3 * 8 * per_image)
    parts = [
        sample_by(model, indices[k:][:2], labels[k:][:2], chunk=2, reproducible=False, **options) for k in (0, 2, 4)
    ]
    joined = type(whole).joined(parts)
    assert torch.equal(joined.samples, apart.samples) and joined.indices == tuple(indices)
    assert torch.equal(joined.effort.block_passes, apart.effort.block_passes)


@pytest.mark.parametrize(("network", "guidance"), [(FPDM, Guidance()), (FPDM, Guidance(scale=2.0)), (DiT, Guidance())])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_timestep_never_waits_for_the_device_and_adds_a_constant(network, guidance, name, monkeypatch):
    """A fixed count; on the emulated device of `tests.helpers`. The results are read at the end."""
    monkeypatch.setattr(latent_transformer, "check_inputs", lambda *args, **kwargs: None)  # it reads labels on a CPU
    model = randomized(network(**TINY)).eval()

    def walk(steps):
        options = {"solve": Solve(iterations=3)} if network is FPDM else {}
        options |= {"scheduler": make_scheduler(name), "timesteps": timesteps(steps), "guidance": guidance}
        sample_by(model, range(2), [1, 2], seed=0, reproducible=False, **options)

    reads, kernels = [], []
    for steps in (2, 4, 6):
        waits, counter = Waits(), OperatorCounter()
        with watching(waits):
            walk(steps)
        with counter:
            walk(steps)
        reads.append(sum(waits.counts.values()))
        kernels.append(counter.count)
    assert reads == [reads[0]] * 3 and 1 <= reads[0] <= 4
    assert kernels[2] - kernels[1] == kernels[1] - kernels[0]
