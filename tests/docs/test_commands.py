"""Every command line of apps.diffusion in the documents and in the docstrings parses, those for several processes by
their launcher's own parser first.
"""

import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import parse_args

from apps.diffusion.cli import parse_request

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "evaluate", "encode", "convert", "diagnose", "distill")
PAGES = [
    *[ROOT / name for name in ("README.md", "CONTRIBUTING.md", "apps/diffusion/README.md", "examples/README.md")],
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "apps" / "diffusion" / "pretrained").glob("*/README.md")),
    *sorted((ROOT / "apps" / "diffusion").rglob("*.py")),
]
LINE = re.compile(
    r"(?P<launcher>python3?|torchrun[^\n`]*?|accelerate launch[^\n`]*?) "
    rf"-m apps\.diffusion\.(?P<command>{'|'.join(COMMANDS)})(?P<rest>(?:[^\n`#\\]|\\\n)*)"
)


def found():
    """(page, launcher, command, arguments) of every command line; patterns such as [PRESET] or {run} are none."""
    for page in PAGES:
        for match in LINE.finditer(page.read_text()):
            rest = match["rest"].replace("\\\n", " ").split("  ")[0]
            if re.search(r"[\[{<|]|\.\.\.|(?<!grad\.)\bN\b|--seed s\b", rest) or page.name == "report.md":
                continue
            rest = re.split(r"[\"')]|[.,;:](?:\s|$)", rest)[0] if page.suffix == ".py" else rest
            yield page, match["launcher"], match["command"], rest.strip(" .")


LINES = {" ".join(line[1:]): line for line in found()}


def test_there_are_commands_of_each_kind():
    launchers = {line[1].split()[0] for line in LINES.values()}
    assert launchers == {"python", "torchrun", "accelerate"}
    assert {line[2] for line in LINES.values()} == set(COMMANDS) and len(LINES) > 30


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_command_parses(line, tmp_path, monkeypatch):
    _page, launcher, command, rest = line
    words = shlex.split(rest)
    if launcher.startswith("torchrun"):
        given = parse_args([*shlex.split(launcher)[1:], "-m", f"apps.diffusion.{command}", *words])
        assert (given.module, given.training_script) == (True, f"apps.diffusion.{command}")
        words = given.training_script_args
    elif launcher.startswith("accelerate"):
        given = launch_command_parser().parse_args(
            [*shlex.split(launcher)[2:], "-m", f"apps.diffusion.{command}", *words]
        )
        assert (given.module, given.training_script) == (True, f"apps.diffusion.{command}")
        words = given.training_script_args
    words = [word for word in words if word != "--"]
    module = importlib.import_module(f"apps.diffusion.{command}")
    parse = module.parse if hasattr(module, "parse") else partial(parse_request, module.Request, command)
    monkeypatch.chdir(tmp_path)
    if "--help" in words:
        with pytest.raises(SystemExit) as end:
            parse(words)
        assert end.value.code == 0
        return
    if "--resume" in words:  # the run to resume is not here
        with pytest.raises(ValueError, match=r"config\.json"):
            parse(words)
        return
    if command == "distill":  # its DiT is a network of the repository, or is not here
        if words[:1] != ["mnist-dit"]:
            return
    if not words and command != "train":  # the name of the command alone
        return
    parse(words)
