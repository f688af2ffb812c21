"""Converted checkpoints give the outputs of the published networks, computed independently; other files raise."""

import argparse
import json
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from apps.diffusion import convert
from apps.diffusion.checkpoint import state_dicts as layouts
from apps.diffusion.checkpoint import training_state as checkpoint
from apps.diffusion.checkpoint.open_network import open_network
from apps.diffusion.config.network import NoiseSchedule
from apps.diffusion.models import FPDM, DiT
from apps.diffusion.schedulers.noise_levels import prediction_kind
from tests.apps.diffusion.helpers import reference_networks as pub
from tests.apps.diffusion.helpers.training_runs import barely_trained

HEADS = ["--heads", str(pub.HEADS)]


def call(path, out, *options):
    return convert.main([str(path), "--out", str(out), *options])


def agree(ours, expected):
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def saved(tensors, folder, form):
    """The tensors in a file, in one of the forms that people have."""
    if form == "safetensors":
        save_file(tensors, folder / "a.safetensors")
        return folder / "a.safetensors"
    wrapped = {
        "pt": tensors,
        "ddp": {f"module.{name}": value for name, value in tensors.items()},
        "training": {
            "model": {name: torch.zeros(1) for name in tensors},
            "ema": tensors,
            "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="DiT-XL/2", data_path="/data"),
        },
    }[form]
    torch.save(wrapped, folder / "a.pt")
    return folder / "a.pt"


@pytest.mark.parametrize("form", ["safetensors", "pt", "ddp", "training"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_published_dit(tmp_path, form, learn_sigma):
    weights = pub.drawn(pub.dit_shapes(learn_sigma=learn_sigma))
    assert call(saved(weights, tmp_path, form), tmp_path / "out", *HEADS) == 0
    model = DiT.from_pretrained(tmp_path / "out").eval()
    config = {"input_size": [8, 8], "in_channels": 4, "patch_size": 2, "hidden_size": pub.D, "depth": 3}
    config |= {"num_heads": 4, "mlp_ratio": 4.0, "num_classes": pub.CLASSES, "learn_sigma": learn_sigma}
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in found.items() if not k.startswith("_")} == config
    with torch.no_grad():
        agree(model(*pub.inputs()), pub.dit(weights, *pub.inputs()))


@pytest.mark.parametrize("condition_on_time", [False, True])
@pytest.mark.parametrize(("pre", "post"), [(1, 1), (3, 0), (0, 2)])
def test_published_fpdm(tmp_path, pre, post, condition_on_time):
    weights = pub.drawn(pub.fpdm_shapes(pre, post), seed=1)
    options = [*HEADS, *(["--condition-on-time"] if condition_on_time else [])]
    assert call(saved(weights, tmp_path, "training"), tmp_path / "out", *options) == 0
    model = FPDM.from_pretrained(tmp_path / "out").eval()
    assert (len(model.blocks_pre), len(model.blocks_post)) == (pre, post)
    for iterations in (1, 4):
        with torch.no_grad():
            ours = model(*pub.inputs(), iterations=iterations)
        agree(ours, pub.fpdm(weights, *pub.inputs(), iterations, condition_on_time))


def test_the_two_ways_to_condition_an_fpdm_differ():
    weights = pub.drawn(pub.fpdm_shapes(1, 1))
    one, other = (pub.fpdm(weights, *pub.inputs(), 2, flag) for flag in (False, True))
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize(("shapes", "layout"), [(pub.dit_shapes(), "dit"), (pub.fpdm_shapes(), "fpdm")])
def test_there_and_back_is_the_same_bits(tmp_path, shapes, layout):
    weights = pub.drawn(shapes)
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "ours", *HEADS) == 0
    assert call(tmp_path / "ours", tmp_path / "back", "--to", layout) == 0
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_dit_through_diffusers(tmp_path):
    weights = pub.drawn(pub.dit_shapes())
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "diffusers", "--to", "diffusers", *HEADS) == 0
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "diffusers").eval()
    x, t, y = pub.inputs()
    expected = pub.dit(weights, x, t, y)
    with torch.no_grad():
        as_it_loads = theirs(x, t, y).sample
        agree(layouts.use_dit_frequencies(theirs)(x, t, y).sample, expected)
    assert (as_it_loads - expected).abs().max() > 1e-3  # what use_dit_frequencies is for
    # a model that diffusers itself wrote, in several files, in a pipeline's folder
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))) > 1
    assert call(tmp_path / "pipeline", tmp_path / "ours") == 0  # heads: from its config
    with torch.no_grad():
        agree(DiT.from_pretrained(tmp_path / "ours")(x, t, y), expected)
    assert call(tmp_path / "ours", tmp_path / "back", "--to", "dit") == 0
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    assert all(torch.equal(back[name], weights[name]) for name in weights if name != "pos_embed")


def test_a_bare_diffusers_file_needs_the_size(tmp_path, capsys):
    weights = pub.drawn(pub.dit_shapes())
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "diffusers", "--to", "diffusers", *HEADS) == 0
    file = tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"
    assert call(file, tmp_path / "ours", *HEADS) == 2
    assert "--input-size" in capsys.readouterr().err
    assert call(file, tmp_path / "ours", *HEADS, "--input-size", "8", "8") == 0
    with torch.no_grad():
        agree(DiT.from_pretrained(tmp_path / "ours")(*pub.inputs()), pub.dit(weights, *pub.inputs()))


def test_embedders_that_differ_between_blocks_are_refused(tmp_path, capsys):
    assert call(saved(pub.drawn(pub.dit_shapes()), tmp_path, "pt"), tmp_path / "a", "--to", "diffusers", *HEADS) == 0
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"][3] += 1
    save_file(tensors, file)
    assert call(tmp_path / "a", tmp_path / "b") == 2
    assert "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias" in capsys.readouterr().err


@pytest.mark.parametrize("shapes", [pub.dit_shapes(), pub.fpdm_shapes()])
def test_unknown_and_missing_tensors_are_all_listed(tmp_path, capsys, shapes):
    weights = pub.drawn(shapes)
    gone = [name for name in weights if name.endswith("attn.proj.bias")]
    added = ["blocks.0.attn.norm.weight", "scale"] if "blocks.0.mlp.fc1.weight" in weights else ["scale"]
    left = {name: value for name, value in weights.items() if name not in gone} | {n: torch.ones(2) for n in added}
    assert call(saved(left, tmp_path, "pt"), tmp_path / "out", *HEADS) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in [*gone, *added]) and "mlp.fc2" not in error
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def _misshapen(weights):
    weights["blocks.1.mlp.fc2.weight"] = torch.zeros(3, 3)


def _odd_outputs(weights):
    weights["final_layer.linear.weight"] = torch.zeros(30, pub.D)


def _no_square(weights):
    weights["pos_embed"] = torch.zeros(1, 12, pub.D)


def _every(change):
    """Replaces every tensor of a state dict."""
    return lambda weights: weights.update({name: change(value) for name, value in weights.items()})


@pytest.mark.parametrize(
    ("change", "options", "name"),
    [
        (lambda w: w.clear() or w.update(a=torch.ones(1)), HEADS, "block_fixed_point.*"),
        (lambda w: w.pop("pos_embed"), HEADS, "pos_embed"),
        (_misshapen, HEADS, "blocks.1.mlp.fc2.weight"),
        (_odd_outputs, HEADS, "final_layer.linear.weight"),
        (_no_square, HEADS, "--input-size"),
        (_no_square, [*HEADS, "--input-size", "4", "4"], "--input-size 4 4"),
        (lambda w: None, [], "--heads"),
        (lambda w: None, ["--heads", "5"], "num_heads"),
        (lambda w: None, [*HEADS, "--to", "fpdm"], "--to fpdm"),
        (lambda w: None, [*HEADS, "--weights", "ema"], "--weights"),
        (lambda w: w.update(y_embedder="text"), HEADS, "y_embedder"),
        (lambda w: w.update({3: torch.ones(1)}), HEADS, "3"),
        (lambda w: w.update({"blocks.99999999.attn.qkv.weight": torch.ones(1)}), HEADS, "blocks.99999999"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(pub.D, 4, 0, 0)}), HEADS, "x_embedder.proj.weight"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}), HEADS, "x_embedder.proj.weight"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 0, pub.D)), HEADS, "pos_embed"),
        (_every(torch.Tensor.to_sparse), HEADS, "sparse"),
        (_every(lambda v: v.to("meta")), HEADS, "meta"),
        (_every(lambda v: v.to(torch.int8)), HEADS, "int8"),
        (_every(lambda v: v.to(torch.complex64)), HEADS, "complex64"),
        (_every(lambda v: v.to(torch.float8_e4m3fn)), HEADS, "float8_e4m3fn"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, change, options, name):
    weights = pub.drawn(pub.dit_shapes())
    change(weights)
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert name in error and error.startswith("convert: ") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_no_heads_is_refused(tmp_path, capsys):
    assert call(tmp_path / "a.pt", tmp_path / "out", "--heads", "0") == 2
    assert "--heads" in capsys.readouterr().err


def test_a_latent_that_is_no_square(tmp_path):
    weights = pub.drawn(pub.dit_shapes())
    weights["pos_embed"] = torch.randn(1, 12, pub.D, generator=torch.Generator().manual_seed(0))
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "out", *HEADS, "--input-size", "6", "8") == 0
    model = DiT.from_pretrained(tmp_path / "out")
    assert model.latent == (4, 6, 8) and torch.equal(model.pos_embed, weights["pos_embed"])
    assert call(tmp_path / "out", tmp_path / "b", "--to", "diffusers") == 2


def test_an_fpdm_or_an_unconditional_network_does_not_fit_diffusers(tmp_path, capsys):
    assert call(saved(pub.drawn(pub.fpdm_shapes()), tmp_path, "pt"), tmp_path / "a", "--to", "diffusers", *HEADS) == 2
    assert "--to ours" in capsys.readouterr().err
    weights = pub.drawn(pub.dit_shapes())
    del weights["y_embedder.embedding_table.weight"]
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "b", "--to", "diffusers", *HEADS) == 2
    assert "--to ours" in capsys.readouterr().err
    assert call(saved(weights, tmp_path, "pt"), tmp_path / "c", *HEADS) == 0
    assert DiT.from_pretrained(tmp_path / "c").num_classes == 0


@pytest.mark.parametrize(("hidden", "heads"), [(384, 6), (1024, 16)])
def test_heads_of_the_published_sizes_are_known(hidden, heads):
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in pub.dit_shapes(1, d=hidden).items()}
    assert layouts.network(weights).config["num_heads"] == heads


class Runs:
    """Executes something where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": pub.drawn(pub.dit_shapes()), "args": Runs()}, tmp_path / "a.pt")
    assert call(tmp_path / "a.pt", tmp_path / "out", *HEADS) == 2
    assert "posix.mkdir" in capsys.readouterr().err
    for protocol in range(6):  # a pickle without torch's archive around it
        (tmp_path / "b.pt").write_bytes(pickle.dumps(OrderedDict(ema=Runs()), protocol))
        assert call(tmp_path / "b.pt", tmp_path / "out", *HEADS) == 2
        said = capsys.readouterr().err
        assert "posix.mkdir" in said and said.count("\n") == 1
    assert not Path("executed").exists()


def test_a_file_of_another_kind_is_no_reason_to_execute_it(tmp_path, capsys):
    """torch.load's own message advises weights_only=False."""
    for content in (b"{}", b"\x89PNG\r\n\x1a\n" + bytes(range(200)), b"PK\x03\x04" * 30, b"text " * 20):
        (tmp_path / "a.pt").write_bytes(content)
        assert call(tmp_path / "a.pt", tmp_path / "out", *HEADS) == 2
        said = capsys.readouterr().err
        assert "a.pt" in said and "weights_only" not in said and said.count("\n") == 1


@pytest.mark.parametrize("form", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_is_a_sentence(tmp_path, capsys, form):
    """Bytes flipped in the pickle and in the directory of the archive, where torch and zipfile raise errors of many
    classes."""
    state = {name: value[:1].clone() for name, value in pub.drawn(pub.dit_shapes()).items()}
    torch.save(state, tmp_path / "whole.pt", _use_new_zipfile_serialization=form)
    whole = (tmp_path / "whole.pt").read_bytes()
    source = random.Random(0)
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            place = source.randrange(3000)
            damaged[place if source.random() < 0.5 else -1 - place] ^= source.randint(1, 255)
        (tmp_path / "a.pt").write_bytes(damaged)
        assert call(tmp_path / "a.pt", tmp_path / "out", *HEADS) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.999])
def test_a_truncated_file_is_refused(tmp_path, capsys, name, share):
    file = saved(pub.drawn(pub.dit_shapes()), tmp_path, name[2:])
    os.truncate(file, int(share * file.stat().st_size))
    assert call(file, tmp_path / "out", *HEADS) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["dit", "ours"])
def test_a_flipped_bit_of_what_it_wrote_is_noticed(tmp_path, capsys, layout):
    file = saved(pub.drawn(pub.dit_shapes()), tmp_path, "pt")
    assert call(file, tmp_path / "out", *HEADS, "--to", layout) == 0
    (written,) = [*(tmp_path / "out").glob("*.pt"), *(tmp_path / "out").glob("*.safetensors")]
    content = bytearray(written.read_bytes())
    content[len(content) // 2] ^= 1
    written.write_bytes(content)
    capsys.readouterr()
    assert call(tmp_path / "out", tmp_path / "again", "--to", "dit") == 2
    error = capsys.readouterr().err
    assert written.name in error and "SHA-256" in error and error.count("\n") == 1


def test_nothing_is_overwritten(tmp_path, capsys):
    file = saved(pub.drawn(pub.dit_shapes()), tmp_path, "pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out in (tmp_path / "full", file):
        assert call(file, out, *HEADS) == 2
        assert "--out" in capsys.readouterr().err
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert call(file, tmp_path / "empty", *HEADS) == 0
    assert call(tmp_path / "missing.pt", tmp_path / "out") == 2
    assert call("mnist-dit", tmp_path / "named") == 0  # a network of the repository
    assert call(tmp_path / "full", tmp_path / "out") == 2


def test_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    file = saved(pub.drawn(pub.dit_shapes()), tmp_path, "pt")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert call(file, tmp_path / "out", *HEADS, "--to", "dit") == 1
    assert "Errno 28" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_a_training_run_to_the_published_layout(tmp_path, kind):
    run = barely_trained(tmp_path / "run", images=96, model={"kind": kind})
    state = checkpoint.newest(run)
    for options, expected in (([], state.ema), (["--weights", "model"], state.model)):
        out = tmp_path / f"out{len(options)}"
        assert call(run, out, "--to", kind, *options) == 0
        found = torch.load(out / "model.pt", weights_only=True)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert not torch.equal(state.ema["final_layer.linear.weight"], state.model["final_layer.linear.weight"])
    assert call(tmp_path / "out0" / "model.pt", tmp_path / "again", "--heads", "2") == 0


def test_a_model_folder_of_a_run_that_predicts_the_image(tmp_path, capsys):
    run = barely_trained(tmp_path / "run", images=16, schedule=NoiseSchedule(prediction="sample"))
    for options, kinds in (([], ("v_prediction", "sample")), (["--to", "pipeline"], ("sample", "sample"))):
        out = tmp_path / f"out{len(options)}"
        assert call(run, out, *options) == 0
        assert ("--to pipeline" in capsys.readouterr().out) == (not options)
        found = open_network(out), open_network(out, prediction=None if options else "sample")
        assert tuple(prediction_kind(opened.scheduler) for opened in found) == kinds
        assert all(opened.scheduler.config["rescale_betas_zero_snr"] for opened in found)


@pytest.mark.parametrize(("shapes", "layout"), [(pub.dit_shapes(), "dit"), (pub.fpdm_shapes(), "fpdm")])
def test_what_it_wrote_in_a_published_layout_is_read_again(tmp_path, capsys, shapes, layout):
    weights = pub.drawn(shapes)
    assert call(saved(weights, tmp_path, "safetensors"), tmp_path / "there", *HEADS, "--to", layout) == 0
    assert call(tmp_path / "there", tmp_path / "back") == 0
    found = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_heads"] == pub.HEADS
    for source in ("there", "back"):
        for options in (HEADS, ["--condition-on-time"], ["--input-size", "8", "8"], ["--weights", "ema"]):
            assert call(tmp_path / source, tmp_path / "other", *options) == 2
            assert options[0] in capsys.readouterr().err
    (tmp_path / "there" / "conversion.json").write_text("[]")
    assert call(tmp_path / "there", tmp_path / "other") == 2
    assert "conversion.json" in capsys.readouterr().err and not (tmp_path / "other").exists()
    if layout == "dit":
        assert call(tmp_path / "a.safetensors", tmp_path / "other", *HEADS, "--condition-on-time") == 2
        assert "--condition-on-time" in capsys.readouterr().err


def test_another_grid_than_that_of_the_position_embedding_is_refused(tmp_path, capsys):
    model = DiT(input_size=(4, 16), hidden_size=16, num_heads=2, depth=1, num_classes=3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = saved(state, tmp_path, "safetensors")
    for number, options in enumerate(([], ["--input-size", "16", "4"])):
        assert call(path, tmp_path / f"out{number}", "--heads", "2", *options) == 2
        assert "--input-size" in capsys.readouterr().err
    assert call(path, tmp_path / "out", "--heads", "2", "--input-size", "4", "16") == 0
    state["pos_embed"] = torch.randn(state["pos_embed"].shape)  # a learned one fits any grid
    path = saved(state, tmp_path, "safetensors")
    assert call(path, tmp_path / "learned", "--heads", "2") == 0
