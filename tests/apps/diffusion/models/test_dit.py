"""DiT: counts and names; its outputs equal those of diffusers' DiT with the same weights."""

import copy
import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open

from apps.diffusion.models import DiT
from apps.diffusion.models.layers import SIZES
from tests.apps.diffusion.helpers.small_models import batch, randomized, saved_bytes
from tests.apps.diffusion.models.published_shapes import BLOCK, FRAME

TINY = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 10}


@pytest.mark.parametrize(
    ("size", "count"), [("S", 32_865_056), ("B", 130_315_808), ("L", 457_840_672), ("XL", 674_834_720)]
)
def test_parameter_counts(size, count):
    with torch.device("meta"):
        model = DiT(input_size=32, learn_sigma=True, **SIZES[size]._asdict())
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.block_passes() == SIZES[size].depth


def test_the_xl_default_has_the_published_names_shapes_and_cost():
    with torch.device("meta"):
        model, plain = DiT(input_size=32, learn_sigma=True), DiT(input_size=32)
    expected = FRAME | {f"blocks.{i}.{name}": shape for i in range(28) for name, shape in BLOCK.items()}
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == expected
    assert sum(v.numel() for v in model.state_dict().values()) == 675_129_632
    assert sum(p.numel() for p in plain.parameters()) == 674_816_272
    assert model.macs() / 1e9 == pytest.approx(118.62, abs=5e-3)
    assert model.block_macs() / 1e9 == pytest.approx(4.236, abs=5e-4)


def diffusers_twin(model: DiT) -> DiTTransformer2DModel:
    """diffusers' DiT with the weights of ours, and DiT's two constants where diffusers has others."""
    channels, size, _ = model.latent
    heads = model.config["num_heads"]
    twin = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=model.hidden_size // heads,
        in_channels=channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    )
    weights = model.state_dict()
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    names["proj_out_2"] = "final_layer.linear"
    for i in range(len(model.blocks)):
        block = f"transformer_blocks.{i}"
        twin.transformer_blocks[i].norm1.emb.time_proj.downscale_freq_shift = 0
        names |= {
            f"{block}.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{block}.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{block}.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
            f"{block}.norm1.linear": f"blocks.{i}.adaLN_modulation.1",
            f"{block}.attn1.to_out.0": f"blocks.{i}.attn.proj",
            f"{block}.ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            f"{block}.ff.net.2": f"blocks.{i}.mlp.fc2",
        }
    target = {}
    for theirs, ours in names.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in weights:
                target[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
    for i in range(len(model.blocks)):
        for kind in ("weight", "bias"):
            parts = weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                target[f"transformer_blocks.{i}.attn1.to_{name}.{kind}"] = part
    twin.load_state_dict(target)
    return twin.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(("patch", "learn_sigma"), [(2, False), (4, True)])
def test_agrees_with_diffusers_dit(dtype, tolerance, patch, learn_sigma):
    model = randomized(DiT(**TINY, patch_size=patch, learn_sigma=learn_sigma)).to(dtype)
    x, t, y = batch(model, dtype=dtype)
    with torch.no_grad():
        ours, theirs = model(x, t, y), diffusers_twin(model).to(dtype)(x, t, y).sample
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(8, 8), (4, 8), (16, 8)])
@pytest.mark.parametrize("patch", [2, 4])
def test_square_and_oblong_inputs(shape, patch):
    model = randomized(DiT(**TINY | {"input_size": shape, "patch_size": patch, "in_channels": 3}))
    x, t, y = batch(model)
    assert model.tokens == shape[0] * shape[1] // patch**2
    assert model(x, t, y).shape == (3, 3, *shape)


def test_position_time_and_label_all_matter_and_samples_are_independent():
    model = randomized(DiT(**TINY)).double()
    x, t, y = batch(model, dtype=torch.float64)
    out = model(x, t, y)
    torch.testing.assert_close(model(x.flip(0), t.flip(0), y.flip(0)).flip(0), out)
    moved = model(x.roll(2, dims=-1), t, y).roll(-2, dims=-1)
    for other in (moved, model(x, t + 1, y), model(x, t, (y + 1) % 11)):
        assert (other - out).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_unconditional_and_null_class():
    model = randomized(DiT(**TINY | {"num_classes": 0}))
    x, t, _ = batch(model)
    assert model(x, t).shape == x.shape
    assert model.null_class is None and not any("y_embedder" in key for key in model.state_dict())
    assert DiT(**TINY).null_class == 10


def test_a_new_model_predicts_zero():
    model = DiT(**TINY)
    assert model(*batch(model)).eq(0).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input_size": 9}, "input_size"),
        ({"input_size": (8, 7)}, "input_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"hidden_size": 30}, "num_heads"),
        ({"hidden_size": 6, "num_heads": 3}, "hidden_size"),
        ({"depth": 0}, "depth"),
        ({"num_classes": -1}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_impossible_architectures_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        DiT(**TINY | change)


def test_calls_that_do_not_fit_are_refused():
    model, unconditional = DiT(**TINY), DiT(**TINY | {"num_classes": 0})
    x, t, y = batch(model)
    for bad in (x[0], x[:, :3], x[..., :6], torch.cat([x, x], dim=2)):
        with pytest.raises(ValueError, match="in_channels"):
            model(bad, t, y)
    with pytest.raises(ValueError, match=r"^t\b"):
        model(x, t[:2], y)
    with pytest.raises(ValueError, match=r"^y\b"):
        model(x, t)
    with pytest.raises(ValueError, match=r"^y\b"):
        unconditional(x, t, y)
    for label in (-1, 11):
        with pytest.raises(ValueError, match=r"^y\b"):
            model(x, t, torch.full_like(y, label))
    with pytest.raises(ValueError, match=r"^y\b"):
        model(x, t, y[:2])
    with pytest.raises(ValueError, match=r"^y\b"):
        model(x, t, y.float())


def test_save_and_load_give_the_same_model(tmp_path):
    model = randomized(DiT(**TINY | {"input_size": (8, 4), "learn_sigma": True}))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["input_size"] == [8, 4]
    again = DiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(model(*batch(model)), again(*batch(model)))


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    model = randomized(DiT(**TINY | {"depth": 6}))
    inputs = batch(model)

    def gradients():
        model.zero_grad()
        stored, out = saved_bytes(lambda: model(*inputs))
        out.square().mean().backward()
        return stored, [p.grad.clone() for p in model.parameters()]

    plain, expected = gradients()
    model.enable_gradient_checkpointing()
    less, same = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, same, strict=True))
    assert less < plain / 2
    model.disable_gradient_checkpointing()
    assert gradients()[0] == plain


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler itself
def test_compiled_blocks_keep_names_and_numbers():
    model = randomized(DiT(**TINY)).double()
    inputs = batch(model, dtype=torch.float64)
    names, before = list(model.state_dict()), model(*inputs)
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(model(*inputs), before)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(copy.deepcopy(model)(*inputs), before)
