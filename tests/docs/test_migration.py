"""Every migration page runs as it stands, beside the installed peer."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "migration"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.stem != "index")
PEERS = {"jaxopt": "jaxopt", "xitorch": "xitorch", "torchdeq": "torchdeq", "scipy": "scipy", "deepinv": "deepinv"}
# deepinv imports torchvision, which has no build beside the CPU build of PyTorch; none of the page's calls use it.
STAND_IN = """
import importlib.util, sys
from unittest.mock import MagicMock
if importlib.util.find_spec("torchvision") is None:
    parts = "", ".transforms", ".transforms.functional", ".transforms.v2", ".utils", ".datasets", ".datasets.folder"
    for name in (*parts, ".datasets.utils", ".transforms.v2.functional", ".models"):
        sys.modules["torchvision" + name] = MagicMock(__spec__=None, __version__="0")
"""


RUNNER = """
import json, traceback
def run(programs):
    failures = {}
    for page, program in programs.items():
        try:
            exec(compile(program, page, "exec"), {"__name__": "page"})
        except Exception:
            failures[page] = traceback.format_exc()
    return failures
"""


def blocks(page: Path) -> str:
    """The page's Python blocks as one program, each at its own line."""
    text, lines = page.read_text(), []
    for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        lines += [""] * (text[: match.start(1)].count("\n") - len(lines))
        lines += match[1].splitlines()
    return "\n".join(lines)


@pytest.fixture(scope="module")
def failures():
    """The traceback of every page whose program fails, from one process for all: imports take most of the time."""
    here = [page for page in PAGES if importlib.util.find_spec(PEERS[page.stem])]
    programs = {str(page): (STAND_IN if page.stem == "deepinv" else "") + "\n" + blocks(page) for page in here}
    program = RUNNER + f"print(json.dumps(run({programs!r})))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=FOLDER.parents[1])
    assert out.returncode == 0, out.stderr[-3000:]
    return {page: None for page in here} | {Path(k): v for k, v in json.loads(out.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_beside_its_peer(page, failures):
    if page not in failures:
        pytest.skip(f"{PEERS[page.stem]} is not installed")
    assert failures[page] is None, failures[page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_compares_and_maps_keywords(page):
    text = page.read_text()
    assert blocks(page).count("assert ") >= 3
    assert f"| {page.stem} | implicit | what changes in the result |" in text


def test_programs_keep_their_line_numbers():
    page = next(page for page in PAGES if page.stem == "scipy")
    first = page.read_text().splitlines().index("```python") + 1
    assert blocks(page).splitlines()[first] == page.read_text().splitlines()[first]
