"""The flags in the guide exist, and its table has the numbers of the presets."""

import re
from pathlib import Path

import torch

from apps.diffusion.config.presets import PRESETS
from apps.diffusion.models import build

GUIDE = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()


def test_flags_exist():
    flags = set(re.findall(r"`(--[a-z-]+\.[a-z.-]+|--[a-z-]+)[ `]", GUIDE)) - {"--rank", "--world", "--resume"}
    known = {f"--{path.replace('_', '-')}" for path in paths(PRESETS["digits"]())}
    assert flags and flags <= known, flags - known


def paths(tree, before=""):
    for name in tree.__dataclass_fields__:
        value = getattr(tree, name)
        yield before + name
        if hasattr(value, "__dataclass_fields__"):
            yield from paths(value, f"{before}{name}.")


def test_the_table_has_the_presets_numbers():
    rows = re.findall(r"\| `([a-z-]+)`, `([a-z-]+)` \| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", GUIDE)
    assert len(rows) == 4
    for ours, baseline, classes, steps, *counts in rows:
        for name, count in zip((ours, baseline), counts, strict=True):
            config = PRESETS[name]()
            assert config.optimizer.images == int(steps.replace(",", "")) * 512
            assert (classes == "none") == config.data.unconditional
            with torch.device("meta"):
                number = 0 if classes == "none" else int(classes)
                network = build.network(config.model, (4, 32, 32), number, iterations=1, seed=0)
            assert sum(p.numel() for p in network.parameters()) == int(count.replace(",", ""))
