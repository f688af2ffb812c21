"""The documentation site builds without a warning, and its reference holds every public name."""

import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import implicit
from implicit import diagnostics, solvers

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = sorted(path for path in (DOCS / "tutorials").glob("*.md") if path.name != "index.md")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly; tutorials are not executed."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "nb_execution_mode=off", "-b", "html"]
    built = subprocess.run([*command, str(DOCS), str(out)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


def documented(site: Path) -> set[str]:
    """The Python names in the inventory of the site."""
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return set(re.findall(r"^(\S+) py:", zlib.decompress(compressed).decode(), re.M))


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site):
    names = documented(site)
    for module in (implicit, diagnostics, solvers):
        own = {n: thing for n, thing in vars(module).items() if getattr(thing, "__module__", "").startswith("implicit")}
        public = [n for n in own if not n.startswith("_")]
        missing = {n for n in public if not names & {f"{module.__name__}.{n}", f"implicit.{n}"}}
        assert public and not missing, f"{module.__name__}: {missing}"


@pytest.mark.slow
def test_pages_need_no_network(site):
    loaded = r"<(?:script|link|img)[^>]*?(?:src|href)=\"(https?://[^\"]+)\""
    for page in site.rglob("*.html"):
        links = [u for u in re.findall(loaded, page.read_text()) if 'rel="canonical"' not in u]
        assert not links, page
    assert "anderson" in (site / "searchindex.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_the_cells_of_a_tutorial_run(page, tmp_path):
    code = "\n".join(re.findall(r"```\{code-cell\} ipython3\n(.*?)```", page.read_text(), re.DOTALL))
    assert "assert" in code and "plt.show()" in code
    env = {**os.environ, "PYTHONPATH": str(DOCS.parent), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_notebook_shows_the_figure_of_a_diagnosis():
    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("import torch, implicit"),
            nbformat.v4.new_code_cell("report = implicit.diagnose(torch.cos, torch.zeros(1, 3), repeats=1)"),
            nbformat.v4.new_code_cell("report.plot()"),
        ]
    )
    NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(DOCS.parent)}}).execute()
    shown = [out["data"] for out in book.cells[2].outputs if "data" in out]  # without warnings about missing fonts
    assert "image/png" in shown[0]
