"""Configuration of the documentation site: `make docs` builds it from docs/ and the docstrings, without a network.

`sphinx-build -D nb_execution_mode=off` leaves the tutorials unexecuted.
"""

import ast
import inspect
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the modules that the reference documents
# the tutorials' kernels: the same modules, one thread, no message of the debugger or of tqdm
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

import implicit  # noqa: E402
import implicit.diagnostics  # noqa: E402
import implicit.solvers  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "implicit"
author = "The implicit maintainers"
project_copyright = "the implicit maintainers, MIT license"
version = release = implicit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "images"]
suppress_warnings = ["config.cache", "toc.empty_glob"]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# docstrings: Google style; single backticks name an object of the project, or are code
default_role = "py:obj"
COLON = "\x1f"  # stands for a colon while napoleon reads a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature of a dataclass has the types
add_module_names = False
toc_object_entries_show_parents = "hide"

# tutorials are executed when the site is built, and again only when their code changes
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "tutorials")
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_image_options = {"width": "100%"}

html_theme = "furo"
html_title = f"implicit {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"


def plain_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: equations keep their lines, bars are norms and `*args` is an argument.

    Indented paragraphs become literal blocks. Elsewhere `|` and the star of an argument outside of backticks are
    escaped, which reStructuredText would take for markup.
    """
    found, literal = list(lines), False
    lines.clear()
    for i, line in enumerate(found):
        starts = line.startswith("    ") and i and not found[i - 1].strip()
        if starts and not literal:
            literal = True
            lines += [] if follows_colons(found, i) else [f".. code-block:: {code_language(found[i:])}", ""]
        if line.strip():
            literal = literal and line.startswith("    ")
        as_it_is = literal or line.lstrip().startswith(">>>")
        lines += [line] if as_it_is else [escaped(each) for each in one_field_each(line.replace(COLON, ":"))]


def sentence(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """A property's first line is a sentence: what stands before a colon in it is not a type for napoleon."""
    if what == "property":
        lines[0] = lines[0].replace(":", COLON)


def one_field_each(line: str) -> list[str]:
    """`:ivar a, b: text` as a field for a and one for b, as napoleon does for parameters."""
    names = re.match(r":ivar (\w+(?:, \w+)+):(.*)", line)
    return [f":ivar {name}:{names[2]}" for name in names[1].split(", ")] if names else [line]


def code_language(lines: list[str]) -> str:
    """python where the indented block that begins here is a program, none for equations and tables."""
    block = []
    for line in lines:
        if line.strip() and not line.startswith("    "):
            break
        block.append(line)
    try:
        ast.parse(textwrap.dedent("\n".join(block)))
    except SyntaxError:
        return "none"
    return "python"


def follows_colons(lines: list[str], i: int) -> bool:
    """True where the text before line i announces a literal block."""
    return next((line for line in reversed(lines[:i]) if line.strip()), "").rstrip().endswith("::")


def escaped(line: str) -> str:
    """The line with bars and the stars of arguments escaped, but for what stands in backticks."""
    parts = re.split(r"(``.*?``|`[^`]*`)", line)
    parts[::2] = [re.sub(r"\|(?!_)|(?<![\w*\\])\*(?=\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def mark_short_cells(app: object, doctree: nodes.document) -> None:
    """Table cells of a number and its unit stay on one line."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) <= 14:
            cell["classes"].append("short")


def further_names(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Public names that no page of the reference holds yet are added to its first page."""
    if docname != "api/index":
        return
    pages = "".join(page.read_text() for page in Path(app.srcdir, "api").glob("*.md"))
    known = {name.rpartition(".")[2] for name in re.findall(r"auto(?:class|function|exception):: (\S+)", pages)}
    entries = []
    for module in (implicit, implicit.diagnostics, implicit.solvers):
        for name, thing in vars(module).items():
            own = getattr(thing, "__module__", "").startswith("implicit")
            if own and not name.startswith("_") and name not in known:
                known.add(name)
                kind = "autoclass" if inspect.isclass(thing) else "autofunction"
                entries.append(f".. {kind}:: {module.__name__}.{name}\n")
    if entries:
        source[0] += "\n## Further names\n\n```{eval-rst}\n" + "\n".join(entries) + "```\n"


def setup(app: "Sphinx") -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", sentence, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("doctree-read", mark_short_cells)
    app.connect("source-read", further_names)
