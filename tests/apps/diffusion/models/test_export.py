"""torch.export of one call of a network, at any batch size."""

from typing import Any

import pytest
import torch
from torch.export import Dim, export

from apps.diffusion.models import FPDM, DiT
from tests.apps.diffusion.helpers.small_models import randomized

SIZES: dict[str, Any] = {"input_size": 4, "hidden_size": 16, "num_heads": 2, "num_classes": 5}


def batch(n):
    rng = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, 4, 4, generator=rng)
    return x, torch.randint(1000, (n,), generator=rng), torch.randint(5, (n,), generator=rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_one_call_is_exported_with_a_dynamic_batch(kind, tmp_path):
    network = randomized(FPDM(**SIZES, iterations=3) if kind == "fpdm" else DiT(depth=2, **SIZES)).eval()
    size = Dim("batch", min=1)
    shapes = {name: {0: size} for name in ("x", "t", "y")}
    with torch.no_grad():
        program = export(network, batch(3), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "network.pt2")
        again = torch.export.load(tmp_path / "network.pt2").module()
        for n in (1, 3, 7):
            torch.testing.assert_close(again(*batch(n)), network(*batch(n)), rtol=1e-5, atol=1e-6)
