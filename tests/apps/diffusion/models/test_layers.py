"""The shared layers, each compared with its equation."""

import math

import pytest
import torch
import torch.nn.functional as F

from apps.diffusion.models import layers


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (4, 1)])
def test_position_embedding_is_the_sine_cosine_code_of_column_then_row(rows, columns):
    dim = 16
    code = layers.position_embedding(dim, rows, columns)
    assert code.shape == (1, rows * columns, dim)
    for i in range(rows):
        for j in range(columns):
            expected = []
            for position in (j, i):
                angles = [position / 1e4 ** (k / (dim / 4)) for k in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(code[0, i * columns + j], torch.tensor(expected), rtol=0, atol=1e-6)


def test_timestep_code_is_cosines_then_sines_and_tells_neighbors_apart_in_bfloat16():
    embedder = layers.TimestepEmbedder(8)
    identity = torch.nn.Linear(256, 256, bias=False)
    torch.nn.init.eye_(identity.weight)
    embedder.mlp = torch.nn.Sequential(identity)
    code = embedder(torch.tensor([0, 500]))
    expected = [f(500 * 1e4 ** (-k / 128)) for f in (math.cos, math.sin) for k in range(128)]
    torch.testing.assert_close(code[1], torch.tensor(expected), rtol=0, atol=1e-4)
    assert code[0, :128].eq(1).all() and code[0, 128:].eq(0).all()
    low = embedder.bfloat16()(torch.tensor([998, 999]))
    assert (low[0] - low[1]).abs().max() > 0.5


@pytest.mark.parametrize(("height", "width", "patch"), [(8, 8, 2), (8, 4, 4), (16, 8, 8)])
def test_unpatchify_puts_row_column_channel_patches_back(height, width, patch):
    image = torch.randn(2, 3, height, width)
    cut = F.unfold(image, patch, stride=patch)  # (B, C * p * p, T), channel first
    tokens = cut.unflatten(1, (3, patch * patch)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(layers.unpatchify(tokens, height, width, patch), image)


@pytest.mark.parametrize("patch", [2, 4])
def test_patch_embedding_is_a_linear_map_of_each_patch(patch):
    embed = layers.PatchEmbed(3, patch, 16)
    image = torch.randn(2, 3, 8, 4)
    patches = F.unfold(image, patch, stride=patch).transpose(1, 2)
    assert embed.proj.bias is not None
    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(embed(image), expected, rtol=1e-4, atol=1e-5)


def test_attention_is_softmax_attention_per_head():
    attention = layers.Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


def test_block_is_the_equation_and_modulated_is_its_second_half():
    block = layers.Block(12, 3, 2.0).double()
    x, c = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    s1, a1, g1, s2, a2, g2 = (v[:, None] for v in block.adaLN_modulation[1](F.silu(c)).split(12, dim=1))

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def gelu(h):
        return 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))

    h = x + g1 * block.attn((1 + a1) * norm(x) + s1)
    h = h + g2 * block.mlp.fc2(gelu(block.mlp.fc1((1 + a2) * norm(h) + s2)))
    torch.testing.assert_close(block(x, c), h)
    assert torch.equal(block(x, c), block.modulated(x, block.modulation(c)))


def test_initialisation_makes_blocks_the_identity_and_the_output_zero():
    block, final, embed = layers.Block(16, 4, 4.0), layers.FinalLayer(16, 2, 3), layers.PatchEmbed(4, 2, 16)
    table = layers.LabelEmbedder(2000, 16)
    layers.initialize(torch.nn.ModuleList([block, final, embed, table]))
    x, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(block(x, c), x)
    assert final(x, c).eq(0).all()
    bound = math.sqrt(6 / (16 + 64))  # Xavier, as of a linear layer from a patch of 16 values to 16 features
    assert 0.9 * math.sqrt(6 / 32) < embed.proj.weight.abs().max() <= math.sqrt(6 / 32)
    assert 0.9 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert abs(float(table.embedding_table.weight.detach().std()) - 0.02) < 5e-4
    assert all(m.state_dict()["bias"].eq(0).all() for m in (block.attn.qkv, block.mlp.fc2, embed.proj))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_is_the_same_with_and_without_a_graph_and_leaves_its_input(dtype):
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64).to(dtype)
    kept = x.clone()
    expected = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    recorded = layers.gelu(x)
    with torch.no_grad():
        free = layers.gelu(x)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(recorded, expected, rtol=tolerance, atol=30 * tolerance)
    torch.testing.assert_close(free, expected, rtol=tolerance, atol=30 * tolerance)
    assert torch.equal(x, kept) and free.dtype == dtype
