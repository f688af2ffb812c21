"""Import rules: every module has a level, and imports point to the same level or below it; one file has torch's private
names.
"""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One tuple a level, lowest first. A name is a module or a package below the root package.
CORE = (
    ("argument_types", "solution", "stopping", "options", "pytree", "torch_internals", "loop"),
    ("solvers", "linear.arnoldi", "linear.hessenberg", "linear.secant_systems", "linear.secant_window"),
    ("autodiff.vjp", "autodiff.jvp"),
    (
        "evaluation",
        "autodiff.failed_samples",
        "autodiff.recomputation",
        "staged_safeguard",
        "loop.observation",
        "loop.best_iterates",
        "loop.quick_reading",
        "loop.repeated_points",
        "loop.step_masks",
        "convergence",
        "loop.verification",
    ),
    ("loop.progress", "loop.step_region", "loop.fixed_count", "iterate"),
    ("linear",),
    ("autodiff",),
    ("grads",),
    ("problem_forms",),
    ("fixed_point",),
    ("deq",),
    ("diagnostics", "interop", "plotting", "testing"),
    ("__init__",),
)
APP = (
    ("__init__", "files", "rng", "config"),
    ("schedulers", "models"),
    ("data",),
    ("checkpoint", "sampling", "evaluation"),
    ("training",),
    ("pipeline",),
    ("cli",),
    ("train", "sample", "evaluate", "encode", "convert", "diagnose", "distill"),
)
COMMANDS = APP[-1]
# modules with a level of their own, below or above the rest of their package
OWN_LEVEL = {name for names in CORE for name in names if "." in name}
USE_IMPLICIT = {"config", "models", "sampling", "training", "pipeline"}


@functools.cache
def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*here, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def files(*parts: str) -> list[Path]:
    return sorted((ROOT / Path(*parts)).rglob("*.py"))


def below(name: str, package: str) -> str | None:
    """'implicit.solvers.anderson.Anderson' -> 'solvers'; None for other packages."""
    if not name.startswith(package + "."):
        return None
    parts = name.removeprefix(package + ".").split(".")
    return own if (own := ".".join(parts[:2])) in OWN_LEVEL else parts[0]


def level(name: str, levels: tuple[tuple[str, ...], ...]) -> int | None:
    return next((i for i, names in enumerate(levels) if name in names), None)


def own_name(path: Path, package: str) -> str:
    parts = path.relative_to(ROOT / package.replace(".", "/")).with_suffix("").parts
    return own if (own := ".".join(parts[:2])) in OWN_LEVEL else parts[0]


@pytest.mark.parametrize("path", files("implicit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of_the_core_point_down(path):
    own = level(own_name(path, "implicit"), CORE)
    assert own is not None, f"{path} has no level"
    for name in imported(path):
        assert not name.startswith(("apps", "benchmarks", "tests", "examples")), name
        target = below(name, "implicit")
        theirs = None if target is None else level(target, CORE)
        assert theirs is None or theirs <= own, f"{path} imports {name}"


@pytest.mark.parametrize("path", files("implicit", "solvers"), ids=lambda p: p.name)
def test_a_solver_imports_no_other_solver(path):
    if path.name == "__init__.py":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] == ["implicit", "solvers"]:
            assert parts[2] in {"base", "history_buffer", "ring_buffer"}, f"{path} imports {name}"


@pytest.mark.parametrize("path", files("implicit", "grads"), ids=lambda p: p.name)
def test_an_estimator_imports_no_concrete_solver(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] == ["implicit", "solvers"]:
            assert parts[2] == "base", f"{path} imports {name}"


@pytest.mark.parametrize("path", files("apps", "diffusion"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_of_the_application_point_down(path):
    mine = own_name(path, "apps.diffusion")
    own = level(mine, APP)
    assert own is not None, f"{path} has no level"
    for name in imported(path):
        assert not name.startswith(("benchmarks", "tests", "examples")), name
        target = below(name, "apps.diffusion")
        if target is None:
            assert mine in USE_IMPLICIT or not name.startswith("implicit"), f"{path} imports {name}"
            continue
        theirs = level(target, APP)
        assert theirs is None or theirs <= own, f"{path} imports {name}"
        assert target not in COMMANDS, f"{path} imports the command {name}"


def test_no_import_cycle_in_the_application():
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files("apps", "diffusion")}
    graph = {
        n: {m for m in names if m != n and any(f"{i}.".startswith(f"{m}.") for i in imported(p))}
        for n, p in names.items()
    }
    done: set[str] = set()
    while ready := {n for n, targets in graph.items() if n not in done and targets <= done}:
        done |= ready
    assert done == set(graph), f"import cycle among {sorted(set(graph) - done)}"


def test_dit_and_fpdm_never_import_each_other():
    models = ROOT / "apps/diffusion/models"
    assert not any("fpdm" in name for name in imported(models / "dit.py"))
    assert not any("dit" in name.split(".") for name in imported(models / "fpdm.py"))
    assert any("layers" in name for name in imported(models / "dit.py") & imported(models / "fpdm.py"))


def test_the_top_of_the_core_imports_declared_packages_only():
    allowed = {"torch", "numpy", "jaxtyping", "implicit", *sys.stdlib_module_names}
    for path in files("implicit"):
        if path.relative_to(ROOT / "implicit").parts[0] == "interop":
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path} imports {name} at its top"


def test_private_names_of_torch_are_in_one_file():
    private = re.compile(
        r"\btorch(\.\w+)*\._[a-z]\w*|forward_ad\._|parametrize\._|\._cdata\b|\._version\b|_functorch\b"
    )
    found = [
        f"{path.name}:{number}"
        for path in files("implicit")
        if path.name != "torch_internals.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line.split("#")[0].split("``")[0])
    ]
    assert not found
