"""Options that save memory and time in training do not change the trained weights, but for rounding."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

import implicit
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.models import latent_transformer
from apps.diffusion.training import distributed as sharding
from apps.diffusion.training import trainer as t
from apps.diffusion.training.noise import training_noise
from tests.helpers import Waits, watching

SMALL = c.Config(
    model=c.ModelConfig(hidden=16, heads=2, condition_on_time=True),
    optimizer=c.OptimizerConfig(images=96, batch=16, warmup=16, decay="constant"),
    grad=implicit.StochasticJFB(N=3, M=3),
)


def trained(steps=4, config=SMALL, **optimizer):
    o = dataclasses.replace(config.optimizer, **optimizer)
    trainer = t.Trainer(dataclasses.replace(config, optimizer=o), digits("train"))
    losses = [float(trainer.step()[0]) for _ in range(steps)]
    return trainer, torch.tensor(losses)


def assert_same(a, b, **tolerance):
    (x, losses), (y, others) = a, b
    torch.testing.assert_close(losses, others, **tolerance)
    for (name, p), q in zip(x.model.named_parameters(), y.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, **tolerance)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_parts_of_a_batch_add_up_to_the_batch(kind):
    config = SMALL
    if kind == "dit":
        config = dataclasses.replace(SMALL, model=c.ModelConfig(kind="dit", depth=2, hidden=16, heads=2))
    # plain gradient descent would agree to rounding; Adam divides by the gradient's size
    assert_same(trained(config=config), trained(config=config, accumulate=4), rtol=1e-3, atol=2e-5)


def test_parts_are_that_many_calls_of_the_model():
    trainer, _ = trained(steps=0, accumulate=4)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    trainer.step()
    assert sizes == [4, 4, 4, 4]


def test_checkpointing_changes_no_bit_and_keeps_less():
    plain, checked = trained(), trained(checkpointing=True)
    assert_same(plain, checked, rtol=0, atol=0)
    assert kept(checked[0]) < 0.5 * kept(plain[0])


def kept(trainer):
    """Bytes that the forward pass of the next step keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    seen: dict[int, int] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x, y, noise = trainer._batch()
    config = dataclasses.replace(trainer.config, grad=implicit.JFB(steps=4), stop=implicit.Stop(max_evals=2))
    trainer.config = config
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = trainer._loss(x, y, noise)
    assert found.total.requires_grad
    return sum(seen.values())


@pytest.mark.filterwarnings("default")  # torch.compile looks at .grad of everything
def test_compiled_blocks_learn_the_same():
    plain, compiled = trained(steps=2), trained(steps=2, compile="aot_eager")
    assert compiled[0].model._compiled is not None
    assert_same(plain, compiled, rtol=1e-4, atol=1e-6)
    assert compiled[0].checkpoint().model.keys() == plain[0].checkpoint().model.keys()


def test_bf16_trains_weights_in_float32():
    _, losses = trained(steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate fixes the precision once a process
    try:
        half, others = trained(steps=2, precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())
    assert not torch.equal(losses, others)
    torch.testing.assert_close(losses, others, rtol=0.05, atol=0.0)


def test_draws_of_n_and_m_belong_to_the_step():
    """The same for every process and every part of a step, and another one for another step."""
    trainer, _ = trained(steps=0)
    noise = trainer._batch()[2]

    def draws():
        return [trainer._solve(noise).grad.draw() for _ in range(3)]  # one for each of three parts

    first = draws()
    assert len(set(first)) == 1
    found = set()
    for trainer.progress.images in range(0, 640, 16):
        found |= set(draws())
    assert {n for n, _ in found} == {0, 1, 2, 3} and {m for _, m in found} == {1, 2, 3}


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="3"):
        trained(accumulate=3)
    accelerator: Any = SimpleNamespace(num_processes=2, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DEEPSPEED"):
        sharding.check_processes(SMALL.optimizer, accelerator)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", r"--optimizer\.checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params"),
        ("FSDP_IGNORED_MODULES", "final_layer", "--fsdp_ignored_modules"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(monkeypatch, name, value, flag):
    for key, given in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(key, given)
    with pytest.raises(ValueError, match=flag):
        trained(steps=0)


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_processes_draw_their_part_of_the_step(timesteps):
    config = dataclasses.replace(SMALL, loss=c.LossConfig(timesteps=timesteps))
    cpu = torch.device("cpu")
    whole = training_noise(config, (1, 8, 8), 160, slice(0, 16), cpu)
    parts = [training_noise(config, (1, 8, 8), 160, slice(k, k + 4), cpu) for k in range(0, 16, 4)]
    for name in ("noise", "t", "dropped"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    if timesteps == "uniform":  # stratified: one timestep from each sixteenth
        low = torch.arange(16) * 1000 / 16
        assert ((low.floor() <= whole.t) & (whole.t < low + 1000 / 16)).all()
    other = training_noise(config, (1, 8, 8), 176, slice(0, 16), cpu)
    assert not torch.isclose(other.noise, whole.noise).any()


def test_dropped_labels_have_their_share():
    dropped = [
        training_noise(SMALL, (1, 1, 1), s, slice(0, 16), torch.device("cpu")).dropped for s in range(0, 8000, 16)
    ]
    assert abs(float(torch.cat(dropped).double().mean()) - 0.1) < 4 * (0.09 / 8000) ** 0.5


def test_a_profile_is_a_trace_of_steps(tmp_path):
    config = dataclasses.replace(SMALL, profile=True, out=tmp_path, track="none")
    o = dataclasses.replace(config.optimizer, images=16 * 13)
    t.Trainer(dataclasses.replace(config, optimizer=o), digits("train")).run(lambda state: None)
    trace = json.loads((tmp_path / "logs" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"ProfilerStep#{k}" for k in range(7, 12)} <= names and "aten::addmm" in names


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device"):
        t.Trainer(dataclasses.replace(SMALL, device="nonsense"), digits("train"))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "checkpointing": True}])
def test_a_step_never_waits_for_the_device(options, monkeypatch):
    """On the emulated device of `tests.helpers`, which counts reads of values; logging reads once every few steps.

    The loader, which computes on the host, has done its part before. A check of values is made on a CPU alone, by
    `device.type`, which is a CPU's here.
    """
    monkeypatch.setattr(latent_transformer, "check_inputs", lambda *args, **kwargs: None)
    trainer, _ = trained(steps=2, **options)
    mode, batch = Waits(), trainer._batch()
    monkeypatch.setattr(trainer, "_batch", lambda: batch)
    with watching(mode):
        for mode.evals in range(3):
            trainer.step()
    assert not mode.counts
    with watching(mode):
        mode.busy = True
        trainer.synchronize()
    assert sum(mode.counts.values()) == 1


def test_the_log_is_written_every_so_many_steps_and_at_the_end():
    config = dataclasses.replace(SMALL, optimizer=dataclasses.replace(SMALL.optimizer, images=16 * (t.LOG_EVERY + 3)))
    trainer, seen = t.Trainer(config, digits("train")), []
    trainer.run(lambda state: None, log=lambda entry, images: seen.append(images))
    assert seen == [16 * t.LOG_EVERY, 16 * (t.LOG_EVERY + 3)]
