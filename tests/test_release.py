"""The distribution: what the wheel holds, that it works with the declared dependencies alone, and its version."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import implicit

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# a program that cannot import what is installed here beyond the declared dependencies
RUN = """
import importlib.machinery, importlib.metadata, runpy, sys
allowed, program = set(sys.argv[1].split(",")), sys.argv[2]
names = importlib.metadata.packages_distributions()
hidden = {name for name, dists in names.items() if not {d.lower().replace("_", "-") for d in dists} & allowed}
hidden = (hidden - {"implicit"}) | {"apps", "benchmarks", "tests"}

class Declared(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Declared
runpy.run_path(program, run_name="__main__")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return Path(path)


def closure(requirements: list[str]) -> set[str]:
    """The distributions that these requirements install, by lower-case names."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = wanted.name.lower().replace("_", "-")
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += map(Requirement, requires(wanted.name) or [])
        except PackageNotFoundError:  # of another platform
            continue
        found.add(name)
    return found


def test_the_wheel_holds_the_library_and_works_with_the_declared_dependencies(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        (folder,) = {name.split("/")[0] for name in archive.namelist()} - {"implicit"}
        metadata = message_from_string(archive.read(f"{folder}/METADATA").decode())
    assert folder == f"implicit_fixed_points-{PROJECT['version']}.dist-info"
    assert (tmp_path / "implicit" / "py.typed").exists()
    assert (tmp_path / folder / "licenses" / "LICENSE").exists()
    declared = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert {Requirement(text).name for text in declared} == {"torch", "numpy", "jaxtyping"}
    allowed = ",".join(sorted(closure(declared)))
    command = [sys.executable, "-P", "-c", RUN, allowed, str(ROOT / ".ci" / "smoke.py")]
    out = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert f"implicit {PROJECT['version']} " in out.stdout


def test_one_version_everywhere():
    cited = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert {PROJECT["version"], *cited, implicit.__version__} == {implicit.__version__}
    assert implicit.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_what_is_pinned_fits_what_is_declared():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {name.lower().replace("_", "-"): pin for name, pin in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["diffusion"], *extras["bench"], *extras["dev"], *extras["docs"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text


def test_workflows_call_what_is_in_the_repository():
    folder = ROOT / ".github" / "workflows"
    text = {path.name: path.read_text() for path in folder.glob("*.yml")}
    assert "run: .ci/run" in text["ci.yml"] and "run: make docs" in text["docs.yml"]
    oldest = re.search(r'"torch>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and "torch==$oldest.*" in text["ci.yml"]
    assert "gh-action-pypi-publish" in text["release.yml"] and ".ci/smoke.py" in text["release.yml"]
