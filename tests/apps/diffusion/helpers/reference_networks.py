"""State dicts in the published layouts with random weights, and the outputs of networks with these tensors, computed
from the equations without code of the package.
"""

import math

import torch
import torch.nn.functional as F

D, HEADS, PATCH, CHANNELS, SIDE, CLASSES = 48, 4, 2, 4, 8, 7


def block_shapes(stem, d=D):
    return {
        f"{stem}.attn.qkv.weight": (3 * d, d),
        f"{stem}.attn.qkv.bias": (3 * d,),
        f"{stem}.attn.proj.weight": (d, d),
        f"{stem}.attn.proj.bias": (d,),
        f"{stem}.mlp.fc1.weight": (4 * d, d),
        f"{stem}.mlp.fc1.bias": (4 * d,),
        f"{stem}.mlp.fc2.weight": (d, 4 * d),
        f"{stem}.mlp.fc2.bias": (d,),
        f"{stem}.adaLN_modulation.1.weight": (6 * d, d),
        f"{stem}.adaLN_modulation.1.bias": (6 * d,),
    }


def frame_shapes(learn_sigma, d=D):
    out = PATCH * PATCH * CHANNELS * (2 if learn_sigma else 1)
    return {
        "pos_embed": (1, (SIDE // PATCH) ** 2, d),
        "x_embedder.proj.weight": (d, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, d),
        "final_layer.linear.weight": (out, d),
        "final_layer.linear.bias": (out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }


def dit_shapes(depth=3, learn_sigma=True, d=D):
    blocks = [block_shapes(f"blocks.{i}", d) for i in range(depth)]
    return frame_shapes(learn_sigma, d) | {name: shape for block in blocks for name, shape in block.items()}


def fpdm_shapes(pre=2, post=1, learn_sigma=True, d=D):
    stems = [f"blocks_pre.{i}" for i in range(pre)] + [f"blocks_post.{i}" for i in range(post)] + ["block_fixed_point"]
    blocks = {name: shape for stem in stems for name, shape in block_shapes(stem, d).items()}
    return (
        frame_shapes(learn_sigma, d)
        | blocks
        | {
            "block_pre_projection.weight": (d, d),
            "block_pre_projection.bias": (d,),
            "block_fixed_point_projection_fc1.weight": (2 * d, 2 * d),
            "block_fixed_point_projection_fc1.bias": (2 * d,),
            "block_fixed_point_projection_fc2.weight": (d, 2 * d),
            "block_fixed_point_projection_fc2.bias": (d,),
        }
    )


def drawn(shapes, seed=0):
    """Random tensors; the position code is the sine-cosine one, as in every published checkpoint."""
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = fan_in**-0.5 if len(shape) > 1 else 0.3
        tensors[name] = torch.randn(shape, generator=source) * scale
    tensors["pos_embed"] = positions(shapes["pos_embed"][2])
    return tensors


def positions(d):
    rows = []
    for i in range(SIDE // PATCH):
        for j in range(SIDE // PATCH):
            waves = [10000 ** (-k / (d / 4)) for k in range(d // 4)]
            rows.append(
                [math.sin(j * w) for w in waves]
                + [math.cos(j * w) for w in waves]
                + [math.sin(i * w) for w in waves]
                + [math.cos(i * w) for w in waves]
            )
    return torch.tensor(rows)[None]


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def block(p, stem, x, c):
    s1, a1, g1, s2, a2, g2 = (
        v[:, None] for v in linear(p, f"{stem}.adaLN_modulation.1", c * torch.sigmoid(c)).chunk(6, dim=1)
    )
    b, n, d = x.shape
    q, k, v = (
        part.reshape(b, n, HEADS, d // HEADS).transpose(1, 2)
        for part in linear(p, f"{stem}.attn.qkv", normed(x) * (1 + a1) + s1).chunk(3, dim=2)
    )
    mixed = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(d // HEADS), dim=3) @ v
    x = x + g1 * linear(p, f"{stem}.attn.proj", mixed.transpose(1, 2).reshape(b, n, d))
    return x + g2 * linear(p, f"{stem}.mlp.fc2", gelu(linear(p, f"{stem}.mlp.fc1", normed(x) * (1 + a2) + s2)))


def embedded(p, x, t, y):
    patches = F.conv2d(x, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=PATCH)
    angles = t[:, None].float() * torch.tensor([math.exp(-math.log(10000) * k / 128) for k in range(128)])
    code = linear(p, "t_embedder.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))
    time = linear(p, "t_embedder.mlp.2", code * torch.sigmoid(code))
    return (
        patches.flatten(2).transpose(1, 2) + p["pos_embed"],
        time,
        p["y_embedder.embedding_table.weight"][y],
    )


def output(p, x, c):
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", c * torch.sigmoid(c)).chunk(2, dim=1)
    tokens = linear(p, "final_layer.linear", normed(x) * (1 + scale[:, None]) + shift[:, None])
    n = SIDE // PATCH
    patches = tokens.reshape(len(x), n, n, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(len(x), -1, SIDE, SIDE)


def dit(p, x, t, y):
    h, time, label = embedded(p, x, t, y)
    for i in range(sum(name.endswith("attn.qkv.bias") for name in p)):
        h = block(p, f"blocks.{i}", h, time + label)
    return output(p, h, time + label)


def fpdm(p, x, t, y, iterations, condition_on_time=False):
    """Nothing hoisted: the injection and the modulation are made anew in every iteration."""
    h, time, label = embedded(p, x, t, y)
    outer = time + label if condition_on_time else label
    for i in range(sum(n.startswith("blocks_pre.") and n.endswith("attn.qkv.bias") for n in p)):
        h = block(p, f"blocks_pre.{i}", h, outer)
    z = h
    for _ in range(iterations):
        both = torch.cat([z, linear(p, "block_pre_projection", h)], dim=2)
        inner = gelu(linear(p, "block_fixed_point_projection_fc1", both))
        z = block(p, "block_fixed_point", linear(p, "block_fixed_point_projection_fc2", inner), time + label)
    for i in range(sum(n.startswith("blocks_post.") and n.endswith("attn.qkv.bias") for n in p)):
        z = block(p, f"blocks_post.{i}", z, outer)
    return output(p, z, outer)


def inputs(seed=5, n=3):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(n, CHANNELS, SIDE, SIDE, generator=source)
    return x, torch.tensor([0, 417, 999][:n]), torch.tensor([2, CLASSES, 0][:n])
