"""Who may import whom: arrows point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ["solution", "state", "solvers", "iterate", "grads", "fixed_point", "deq"]
BESIDE = {"diagnostics", "interop", "plotting", "testing"}
APP = [
    {"config", "schedule", "models.layers"},
    {"models.dit", "models.fpdm", "objective", "guidance", "allocation", "data", "metrics", "checkpoint"},
    {"sampler"},
    {"pipeline"},
    {"train", "sample", "evaluate", "encode", "convert"},
]
COMMANDS = {"train", "sample", "evaluate", "encode", "convert"}


def imported(path: Path) -> set[str]:
    """The dotted names a file imports, wherever in the file."""
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


def room(name: str, package: str) -> str | None:
    """'implicit.solvers.anderson.Anderson' -> 'solvers'; None for other packages."""
    return name.removeprefix(package + ".").split(".")[0] if name.startswith(package + ".") else None


@pytest.mark.parametrize("path", files("implicit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_arrows_point_down(path):
    own = path.relative_to(ROOT / "implicit").parts[0].removesuffix(".py")
    for name in imported(path):
        assert not name.startswith(("apps", "benchmarks", "tests")), name
        target = room(name, "implicit")
        if target is None or own == "__init__":
            continue
        assert target not in BESIDE or own in BESIDE, f"{path} imports {name}"
        if own in CORE and target in CORE:
            assert CORE.index(target) <= CORE.index(own), f"{path} imports {name}"


@pytest.mark.parametrize("path", files("implicit", "solvers"), ids=lambda p: p.name)
def test_a_solver_imports_no_other_solver(path):
    if path.name == "__init__.py":
        return
    shared = {"base", "history"}
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] == ["implicit", "solvers"]:
            assert parts[2] in shared, f"{path} imports {name}"


@pytest.mark.parametrize("path", files("apps"), ids=lambda p: str(p.relative_to(ROOT)))
def test_app_arrows_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imported(path):
        assert not name.startswith(("benchmarks", "tests")), name
        mine, theirs = level(own), level(name)
        if mine is not None and theirs is not None:
            assert theirs <= mine, f"{path} imports {name}"
        if room(name, "apps.diffusion") in COMMANDS:
            assert path.stem == "evaluate" and "sample" in name, f"{path} imports {name}"


def level(name: str) -> int | None:
    """How high a module of the application stands; None where the house does not say."""
    for i, rooms in enumerate(APP):
        if any(f"{name}.".startswith(f"apps.diffusion.{r}.") for r in rooms):
            return i
    return None


def test_dit_and_fpdm_never_import_each_other():
    models = ROOT / "apps/diffusion/models"
    assert not any("fpdm" in name for name in imported(models / "dit.py"))
    assert not any("dit" in name.split(".") for name in imported(models / "fpdm.py"))
    assert any("layers" in name for name in imported(models / "dit.py") & imported(models / "fpdm.py"))


def test_importing_the_core_needs_torch_numpy_and_jaxtyping_alone():
    heavy = "scipy matplotlib torchdeq diffusers accelerate tyro sklearn tqdm".split()
    code = f"import sys, implicit; print(*[m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(out.stdout.split())
    plain = subprocess.run(
        [sys.executable, "-c", code.replace(", implicit", ", torch, numpy, jaxtyping")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert loaded <= set(plain.stdout.split())


def test_only_the_promised_packages_are_imported_at_the_top_of_the_core():
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
