"""The code in the README and in the guides runs as it stands."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}:{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def barely_train(out: Path) -> None:
    """What `make train` leaves, after four steps."""
    from apps.diffusion.checkpoint import training_state as checkpoint
    from apps.diffusion.config import training as c
    from apps.diffusion.data import digits
    from apps.diffusion.training.trainer import Trainer

    model, optimizer = c.ModelConfig(hidden=16, heads=2, patch=4), c.OptimizerConfig(images=64, batch=16)
    config = c.Config(model=model, optimizer=optimizer, out=out)
    Trainer(config, digits("train")).run(lambda state: checkpoint.save(out, state))
    (out / "config.json").write_text(config.to_json())


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "runs/digits" in block:
        (tmp_path / "runs" / "digits").mkdir(parents=True)
        barely_train(tmp_path / "runs" / "digits")
    if '"images"' in block:
        (tmp_path / "images" / "a").mkdir(parents=True)
        for i in range(64):
            Image.new("RGB", (40, 40), (4 * i, 0, 0)).save(tmp_path / "images" / "a" / f"{i}.png")
    exec(compile(block, "example", "exec"), {"__name__": "example"})


def test_the_library_example_is_short_and_asserts_something():
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    assert "assert" in block


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links {target}"
