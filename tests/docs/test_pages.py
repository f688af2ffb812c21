"""The code in the README and in the guides runs as it stands, and links to files exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.apps.diffusion.helpers.training_runs import barely_trained

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ROOT / "docs", ROOT / "examples", ROOT / "benchmarks", ROOT / "apps"
LINKING = [*sorted(ROOT.glob("*.md")), *sorted(page for folder in FOLDERS for page in folder.rglob("*.md"))]
CODE = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
each_page_with_code = pytest.mark.parametrize("page", [p for p in PAGES if CODE[p]], ids=lambda p: p.name)


PRINTED = {"solvers.md": "converged 100.0%", "gradients.md": "| IFT", "diagnose.md": "contractive"}
"""What the programs of a page print, among other things."""


@each_page_with_code
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # uploads run against a local server in tests/apps/diffusion/test_pipeline_folder.py
    code = re.sub(r"\.push_to_hub\(.*", "", "\n".join(CODE[page]))
    for run in set(re.findall(r"\"(runs/\w+)\"", code)):
        (tmp_path / run).mkdir(parents=True)
        barely_trained(tmp_path / run, images=64, model={"patch": 4})
    if '"images"' in code:
        (tmp_path / "images" / "a").mkdir(parents=True)
        for i in range(64):
            Image.new("RGB", (40, 40), (4 * i, 0, 0)).save(tmp_path / "images" / "a" / f"{i}.png")
    if "torch.compile(" in code:  # dynamo cannot trace through the run-time type checks of the tests
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    else:
        exec(compile(code, str(page), "exec"), {"__name__": "example"})
        assert PRINTED.get(page.name, "") in capsys.readouterr().out


def test_the_library_example_is_short_and_asserts_something():
    block = CODE[ROOT / "README.md"][0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    assert "assert" in block


@pytest.mark.parametrize("page", LINKING, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links {target}"
