"""Parameters, names and cost of FPDM, compared with the publication and with torch's counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apps.diffusion.models import FPDM, DiT
from apps.diffusion.models.layers import SIZES
from tests.apps.diffusion.helpers.small_models import batch, randomized
from tests.apps.diffusion.models.published_shapes import BLOCK, FRAME

TINY = {"input_size": 8, "hidden_size": 32, "num_heads": 4, "num_classes": 10}


@pytest.mark.parametrize(
    ("size", "outer", "count"),
    [
        ("XL", 1, 86_500_256),
        ("XL", 2, 134_310_560),
        ("XL", 4, 229_931_168),
        ("L", 1, 68_500_512),
        ("B", 1, 38_792_480),
        ("S", 1, 9_959_072),
    ],
)
def test_parameter_counts(size, outer, count):
    hidden, _, heads = SIZES[size]
    with torch.device("meta"):
        model = FPDM(input_size=32, learn_sigma=True, hidden_size=hidden, num_heads=heads, pre=outer, post=outer)
    assert sum(p.numel() for p in model.parameters()) == count


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model, plain = FPDM(input_size=32, learn_sigma=True, pre=2, post=2), FPDM(input_size=32)
    blocks = ["block_fixed_point"] + [f"blocks_{side}.{i}" for side in ("pre", "post") for i in range(2)]
    expected = FRAME | {f"{block}.{name}": shape for block in blocks for name, shape in BLOCK.items()}
    for name, shape in (("fc1", (2304, 2304)), ("fc2", (1152, 2304))):
        expected[f"block_fixed_point_projection_{name}.weight"] = shape
        expected[f"block_fixed_point_projection_{name}.bias"] = shape[:1]
    expected |= {"block_pre_projection.weight": (1152, 1152), "block_pre_projection.bias": (1152,)}
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == expected
    assert sum(v.numel() for v in model.state_dict().values()) == 134_605_472
    assert sum(p.numel() for p in plain.parameters()) == 86_481_808


def test_cost_at_xl_is_that_of_the_reference():
    with torch.device("meta"):
        model, dit = FPDM(input_size=32, learn_sigma=True), DiT(input_size=32, learn_sigma=True)
    block = model.block_macs()
    naive = model.macs(2, hoisted=False) - model.macs(1, hoisted=False)
    hoisted = model.macs(2) - model.macs(1)
    assert naive / 1e9 == pytest.approx(6.274, abs=5e-4) and naive / block == pytest.approx(1.481, abs=5e-4)
    assert hoisted / 1e9 == pytest.approx(5.59, abs=5e-3) and hoisted / block == pytest.approx(1.319, abs=5e-4)
    for k, ratio in ((1, 0.127), (3, 0.233), (10, 0.603), (26, 1.450)):
        assert model.macs(k, hoisted=False) / dit.macs() == pytest.approx(ratio, abs=6e-4)
    for k, ratio in ((10, 0.551), (26, 1.305)):
        assert model.macs(k) / dit.macs() == pytest.approx(ratio, abs=6e-4)
    assert model.macs(17, hoisted=False) < dit.macs() < model.macs(18, hoisted=False)
    assert model.macs(19) < dit.macs() < model.macs(20)
    assert (model.block_passes(26), model.block_passes(1), dit.block_passes()) == (28, 3, 28)


def test_cost_is_what_torch_counts():
    for model, cost in ((randomized(FPDM(**TINY, pre=2)), 5), (randomized(DiT(**TINY, depth=3)), None)):
        inputs = batch(model, n=1)
        plain_attention = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the fused one on a CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_attention:
            model(*inputs, **({"iterations": cost} if cost else {}))
        expected = model.macs(cost) if cost else model.macs()
        assert counter.get_total_flops() == 2 * expected
