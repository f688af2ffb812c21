"""One Python file with a class of this application and all definitions that the class uses, for pipeline folders.

diffusers loads the one file of a network from a repository, and no further file that this file imports. Therefore all
definitions of this package that a class uses, directly or through other definitions, are copied with their comments
into one file. Imports of other packages stay imports.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "apps.diffusion"
ROOT = Path(__file__).resolve().parents[3]
HEAD = '''"""{name} of the project implicit-fixed-points and all it uses, in one file; needs the package `implicit`.

Written by `save_pretrained` from the modules of apps/diffusion; MIT License.
"""

from __future__ import annotations

'''


@dataclass(frozen=True)
class _Module:
    """The top-level statements of a module by the names that they define.

    Attributes:
        definitions: name -> text, in the order of the file; names of one statement share its text.
        uses: name -> names that its statement needs when it runs.
        types: name -> names in its annotations, which the file keeps as text.
        own: name imported from this package -> (module, name in the module); the second is None for a module.
        other: name imported from another package -> the import statement.
    """

    definitions: dict[str, str] = field(default_factory=dict)
    uses: dict[str, set[str]] = field(default_factory=dict)
    types: dict[str, set[str]] = field(default_factory=dict)
    own: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)


def single_file(module: str, name: str) -> str:
    """The text of a file that defines the class `name` of `module`.

    Raises:
        ValueError: the class uses two different definitions with the same name.
    """
    found = _Collection()
    found.add(module, name)
    body = "\n\n".join(text.strip("\n") + "\n" for text in found.texts.values())
    return HEAD.format(name=name) + _grouped(found.imports) + "\n\n\n" + re.sub(r"\n{4,}", "\n\n\n", body)


@dataclass
class _Collection:
    """Definitions in the order in which one file needs them.

    Attributes:
        texts: the definitions by name.
        imports: import statements of other packages.
        owner: name -> the module that defines it.
        modules: modules that have been read.
    """

    texts: dict[str, str] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    owner: dict[str, str] = field(default_factory=dict)
    modules: dict[str, _Module] = field(default_factory=dict)

    def add(self, module: str, name: str) -> None:
        """Add a name that `module` defines or imports, after all definitions that its own definition needs."""
        if module not in self.modules:
            self.modules[module] = _read(module)
        found = self.modules[module]
        if name in found.own:
            target, inner = found.own[name]
            if inner is not None:
                self.add(target, inner)
            elif self._claim(name, target):  # a module of this package: in the one file its names are global
                self.imports.add("import sys")
                self.texts[name] = f"{name} = sys.modules[__name__]  # its names are in this file\n"
        elif name in found.other:
            self.imports.add(found.other[name])
        elif name in found.definitions and self._claim(name, module):
            self.imports |= {found.other[used] for used in found.types[name] if used in found.other}
            for used in sorted(found.uses[name]):
                head, _, attribute = used.partition(".")
                self.add(module, head)
                target, inner = found.own.get(head, (None, None))
                if attribute and target is not None and inner is None:
                    self.add(target, attribute)
            if found.definitions[name] not in self.texts.values():
                self.texts[name] = found.definitions[name]

    def _claim(self, name: str, module: str) -> bool:
        """Whether the name is new in the file; the name is then recorded as defined by `module`.

        Raises:
            ValueError: another module defines the name too.
        """
        if name not in self.owner:
            self.owner[name] = module
            return True
        if self.owner[name] != module:
            raise ValueError(
                f"{self.owner[name]} and {module} both define {name}, and one file needs both; rename one."
            )
        return False


def _grouped(imports: set[str]) -> str:
    """The import statements as text; imports from the same module are joined in one line."""
    names: dict[str, list[str]] = {}
    for statement in sorted(imports):
        head, _, name = statement.partition(" import ")
        names.setdefault(head, []).append(name)
    return "\n".join(f"{head} import {', '.join(found)}" if found != [""] else head for head, found in names.items())


def _path(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def _read(module: str) -> _Module:
    text = _path(module).read_text()
    lines, found, end = text.splitlines(keepends=True), _Module(), 0
    body = ast.parse(text).body
    for i, node in enumerate(body):
        start, end = end, node.end_lineno or 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_imports(node, found)
            continue
        names = _names(node)
        if i + 1 < len(body) and _is_text(body[i + 1]):  # the docstring of an assignment
            end = body[i + 1].end_lineno or 0
        types = {n for part in _annotations(node) for n in ast.walk(part)}
        used = [n for n in ast.walk(node) if n not in types]
        words = {n.id for n in used if isinstance(n, ast.Name)}
        words |= {
            f"{n.value.id}.{n.attr}" for n in used if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        for name in names:
            found.definitions[name] = "".join(lines[start:end])
            found.uses[name] = words - {name}
            found.types[name] = {n.id for n in types if isinstance(n, ast.Name)}
    return found


def _add_imports(node: ast.Import | ast.ImportFrom, found: _Module) -> None:
    for alias in node.names:
        name = alias.asname or alias.name.partition(".")[0]
        if isinstance(node, ast.Import):
            found.other[name] = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        elif not (node.module or "").startswith(PACKAGE):
            renamed = f" as {alias.asname}" if alias.asname not in (None, alias.name) else ""
            found.other[name] = f"from {node.module} import {alias.name}{renamed}"
        elif _path(f"{node.module}.{alias.name}").exists():
            found.own[name] = f"{node.module}.{alias.name}", None
        elif name != alias.name:
            raise ValueError(f"{node.module}.{alias.name} is imported as {name}; one file has one name for it.")
        else:
            found.own[name] = str(node.module), alias.name


def _names(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _annotations(node: ast.stmt) -> list[ast.expr]:
    """The annotations of arguments, results and attributes in a statement."""
    found = []
    for n in ast.walk(node):
        if isinstance(n, ast.AnnAssign | ast.arg):
            found.append(n.annotation)
        elif isinstance(n, ast.FunctionDef):
            found.append(n.returns)
    return [part for part in found if part is not None]
