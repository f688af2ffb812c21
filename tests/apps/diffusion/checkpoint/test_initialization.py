"""Initialization from a trained network of the same class, or of an FPDM from a DiT."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.initialization import initialize, warn_of_another_target
from apps.diffusion.config import training as c
from apps.diffusion.data import digits
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.schedulers.noise_schedule import make_scheduler
from apps.diffusion.training.trainer import Trainer
from implicit import Stop
from tests.apps.diffusion.helpers.small_models import randomized

SMALL = {"input_size": 4, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 5}


def inputs(batch=3):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 2, 4, 4, generator=source)
    return x, torch.tensor([3, 500, 999][:batch]), torch.tensor([0, 4, 5][:batch])


def by_hand(dit, blocks, x, t, y):
    """The output of a DiT with the blocks of these numbers only."""
    h, t_emb, y_emb = dit.embed(x, t, y)
    for number in blocks:
        h = dit.blocks[number](h, t_emb + y_emb)
    return dit.output(h, t_emb + y_emb)


@pytest.mark.parametrize(("pre", "post", "blocks"), [(1, 1, (0, 3, 5)), (2, 1, (0, 1, 3, 5)), (0, 2, (2, 4, 5))])
def test_an_fpdm_from_a_dit_is_the_dit_of_these_blocks_at_one_iteration(tmp_path, pre, post, blocks):
    """With z = x at the start, the injection is x, so one iteration is the block itself."""
    dit = randomized(DiT(depth=6, **SMALL)).eval()
    save_file({k: v.contiguous() for k, v in dit.state_dict().items()}, tmp_path / "dit.safetensors")
    dit.save_pretrained(tmp_path / "folder")
    for path in (tmp_path / "dit.safetensors", tmp_path / "folder"):
        model = FPDM(pre=pre, post=post, condition_on_time=True, **SMALL).eval()
        assert isinstance(initialize(model, path), DiT)
        found = model(*inputs(), iterations=1)
        torch.testing.assert_close(found, by_hand(dit, blocks, *inputs()), rtol=1e-4, atol=1e-5)
    solution = model(*inputs(), stop=Stop(rtol=1e-3, max_evals=5), return_solution=True)[1]
    assert solution.value.isfinite().all()


def test_the_same_architecture_takes_every_weight(tmp_path):
    source = randomized(FPDM(**SMALL))
    source.save_pretrained(tmp_path / "folder")
    model = FPDM(**SMALL)
    initialize(model, tmp_path / "folder")
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    other = FPDM(**{**SMALL, "num_classes": 7})
    table = other.y_embedder.embedding_table.weight.detach().clone()
    initialize(other, tmp_path / "folder")
    assert torch.equal(other.y_embedder.embedding_table.weight, table)
    assert torch.equal(other.final_layer.linear.weight, source.final_layer.linear.weight)


def test_what_does_not_fit_is_refused(tmp_path):
    DiT(depth=2, **SMALL).save_pretrained(tmp_path / "shallow")
    FPDM(**SMALL).save_pretrained(tmp_path / "fpdm")
    with pytest.raises(ValueError, match=r"--model\.pre"):
        initialize(FPDM(**SMALL), tmp_path / "shallow")
    with pytest.raises(ValueError, match=r"--model\.hidden"):
        initialize(FPDM(**{**SMALL, "hidden_size": 32}), tmp_path / "fpdm")
    with pytest.raises(ValueError, match=r"--model\.kind"):
        initialize(DiT(depth=2, **SMALL), tmp_path / "fpdm")
    with pytest.raises(ValueError, match="nowhere"):
        initialize(FPDM(**SMALL), tmp_path / "nowhere")


def test_training_starts_from_the_weights_and_resumes_without_them(tmp_path):
    model = c.ModelConfig(hidden=16, heads=2)
    config = c.Config(model=model, optimizer=c.OptimizerConfig(images=32, batch=16, lr=1e-3), init=tmp_path / "first")
    source = randomized(FPDM(input_size=8, in_channels=1, hidden_size=16, num_heads=2, num_classes=10))
    source.save_pretrained(tmp_path / "first")
    trainer = Trainer(config, digits("train"))
    for network in (trainer.model, trainer.ema.module):
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
    states = []
    trainer.run(states.append)
    checkpoint.save(tmp_path / "run", states[-1])
    gone = dataclasses.replace(config, init=tmp_path / "gone")
    assert Trainer(gone, digits("train"), checkpoint.newest(tmp_path / "run")).progress.images == 32


def test_weights_that_predict_something_else_are_named():
    """mnist-dit predicts the image."""
    with pytest.warns(UserWarning, match="--schedule.prediction"):
        warn_of_another_target(Path("mnist-dit"), make_scheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_another_target(Path("mnist-dit"), make_scheduler(prediction="sample"))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_heads": 4}, "--model.heads"),
        ({"input_size": (2, 8)}, "--data.size"),
        ({"in_channels": 1}, "--data.channels"),
        ({"patch_size": 1}, "--model.patch"),
        ({"mlp_ratio": 2.0}, "--model.mlp-ratio"),
        ({"learn_sigma": True}, "--model.learn-sigma"),
        ({"condition_on_time": True}, "--model.condition-on-time"),
        ({"post": 2}, "--model.post"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_its_flag(tmp_path, change, flag):
    """Weights of equal shapes are other networks with other heads, another grid or another conditioning."""
    sizes = {**SMALL, "input_size": (8, 2) if "input_size" in change else 4}
    FPDM(**sizes).save_pretrained(tmp_path / "fpdm")
    with pytest.raises(ValueError, match=flag):
        initialize(FPDM(**{**sizes, **change}), tmp_path / "fpdm")
    if flag in ("--data.size", "--data.channels"):
        weights = DiT(depth=3, **sizes).state_dict()
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "dit.safetensors")
        with pytest.raises(ValueError, match=flag):
            initialize(FPDM(**{**sizes, **change}), tmp_path / "dit.safetensors")
