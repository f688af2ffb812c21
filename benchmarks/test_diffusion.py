"""Steps of FPDM and DiT (`pytest benchmarks`); `python -m benchmarks.diffusion.run` writes the tables.

The tests assert memory ratios and equal outputs, and report times. Rows at XL/2 need a GPU.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.diffusion import run as bench_diffusion
from benchmarks.diffusion import steps as diffusion_steps
from benchmarks.diffusion import tables as diffusion_tables
from benchmarks.diffusion.steps import CPU, XL
from benchmarks.harness import peak_bytes

ROUNDS = {"cpu": 2, "cuda": 10}
FEW = replace(CPU, batch=2)
SCALES = [
    pytest.param(FEW, id="CPU"),
    *(
        pytest.param(replace(XL, batch=batch, precision=precision), id=f"XL-{batch}-{precision}", marks=pytest.mark.gpu)
        for precision in ("fp32", "bf16")
        for batch in (8, 16, 32, 64, 128)
    ),
]


@pytest.mark.parametrize("claim", bench_diffusion.CLAIMS, ids=lambda c: c.name)
def test_against_the_plain_step(claim, benchmark):
    pair = claim.pair(CPU)
    if not claim.tracked:
        torch.testing.assert_close(pair["ours"](), pair["plain"](), rtol=1e-4, atol=1e-4)
    found = bench_diffusion.against_plain(claim, CPU, repeats=3)
    benchmark.group = "beside the same step in plain PyTorch"
    benchmark.extra_info |= {"time ratio": found["time ratio"]["median"], "memory ratio": found["memory ratio"]}
    benchmark.pedantic(pair["ours"], rounds=2)
    assert claim.memory is None or found["memory ratio"] <= claim.memory


def test_checkpointed_memory_against_dit(benchmark):
    network, batch = diffusion_steps.fpdm(CPU, checkpointing=True), diffusion_steps.inputs(CPU)
    found = bench_diffusion.checkpointed_memory(CPU)
    benchmark.group = "checkpointed training step beside DiT's"
    benchmark.extra_info["memory ratio"] = found["memory ratio"]
    step = diffusion_steps.training(network, diffusion_steps.draw(network, batch, 6, 6), CPU)
    benchmark.pedantic(step, rounds=3)
    assert found["memory ratio"] <= found["memory limit"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("row", diffusion_tables.TRAINED, ids=lambda row: row.name)
def test_training_step(row, scale, benchmark):
    benchmark.group = f"training step, {scale.device}, batch {scale.batch}, {scale.precision}"
    try:
        step = row.step(scale)
        benchmark.extra_info["peak bytes"] = peak_bytes(step, scale.device)
        benchmark.pedantic(step, rounds=ROUNDS[scale.device])
        assert benchmark.extra_info["peak bytes"] > 0
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"batch {scale.batch} does not fit")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own imports
@pytest.mark.parametrize("scale", SCALES[:1] + [p for p in SCALES if "-8-" in str(p.id)])
@pytest.mark.parametrize("iterations", [None, *diffusion_tables.SAMPLING])
@pytest.mark.parametrize("mode", ["eager", "compiled", pytest.param("graph", marks=pytest.mark.gpu)])
def test_sampling_step(iterations, mode, scale, benchmark):
    benchmark.group = f"sampling step, {scale.device}, {scale.precision}"
    if mode == "graph" and scale.device == "cpu":
        pytest.skip("CUDA graphs need the scale of a CUDA device")
    network = (diffusion_steps.dit if iterations is None else diffusion_steps.fpdm)(scale)
    batch = diffusion_steps.inputs(scale)
    if mode != "eager":
        network.compile_blocks()
    options = {} if iterations is None else {"iterations": iterations}
    step = diffusion_steps.sampling(lambda: network(*batch, **options), scale)
    step = diffusion_steps.captured(step) if mode == "graph" else step
    step()
    benchmark.pedantic(step, rounds=ROUNDS[scale.device])
