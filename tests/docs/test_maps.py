"""The tables "to change X, open Y" name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPS = ("CONTRIBUTING.md", "apps/diffusion/README.md", "benchmarks/README.md")
ROOTS = (ROOT, ROOT / "implicit", ROOT / "apps/diffusion", ROOT / "benchmarks")


@pytest.mark.parametrize("name", MAPS)
def test_every_path_of_a_map_exists(name):
    paths = set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py|(?:[\w.-]+/)+)`", (ROOT / name).read_text()))
    roots = (*ROOTS, *(p for p in (ROOT / "implicit").iterdir() if p.is_dir()))
    missing = [path for path in paths if not any((root / path).exists() for root in roots)]
    assert paths and not missing
