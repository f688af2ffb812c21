"""Steps of FPDM and DiT (`pytest benchmarks`); `python -m benchmarks.bench_diffusion` writes the tables.

What a step may cost against the same one written plainly is asserted here, on a CPU in its own time, paired.
"""

import pytest
import torch

from benchmarks import bench_diffusion, diffusion_steps


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("claim", bench_diffusion.CLAIMS, ids=lambda c: c.name)
def test_against_the_plain_step(claim, benchmark):
    pair = claim.pair(diffusion_steps.CPU)
    if not claim.tracked:
        torch.testing.assert_close(pair["ours"](), pair["plain"](), rtol=1e-4, atol=1e-5)
    found = bench_diffusion.against_plain(claim, diffusion_steps.CPU, repeats=9)
    benchmark.extra_info.update(found)
    benchmark.pedantic(pair["ours"], rounds=3)
    assert found["time ratio"]["median"] <= claim.time
    assert claim.memory is None or found["memory ratio"] <= claim.memory


def test_checkpointed_memory_against_dit(benchmark):
    network, batch = (
        diffusion_steps.fpdm(diffusion_steps.CPU, checkpointing=True),
        diffusion_steps.inputs(diffusion_steps.CPU),
    )
    found = bench_diffusion.checkpointed_memory(diffusion_steps.CPU)
    benchmark.extra_info.update(found)
    step = diffusion_steps.training(network, diffusion_steps.draw(network, batch, 6, 6), diffusion_steps.CPU)
    benchmark.pedantic(step, rounds=3)
    assert found["memory ratio"] <= found["memory limit"]
