"""The modules that a function uses, and the function with the parameters that they have now.

`torch.func.functional_call` puts other parameters into a module for one call. Where a backward pass evaluates f again
after that call has ended, the module has its own parameters back; `with_parameters_of_now` evaluates f with those of
the first evaluation.
"""

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 6  # levels of nested containers and closures that are searched


def with_parameters_of_now(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, evaluated with the parameters and buffers that the modules within f have at this moment."""
    modules = [module for module in reachable(f)[0] if not isinstance(module, torch.jit.ScriptModule)]
    owners: list[dict[str, Any]] = [owner for module in modules for owner in (module._parameters, module._buffers)]
    held = [(owner, name, t) for owner in owners for name, t in owner.items()]
    if not held:
        return f

    def evaluated(*args: Any) -> Any:
        replaced = [(owner, name, t, owner[name]) for owner, name, t in held if owner.get(name, t) is not t]
        for owner, name, t, _ in replaced:
            owner[name] = t
        try:
            return f(*args)
        finally:
            for owner, name, _, own in replaced:
                owner[name] = own

    return evaluated


def reachable(roots: Any) -> tuple[list[nn.Module], list[torch.Generator]]:
    """Modules, children included, and generators within `roots`.

    Searched are containers, and what functions, methods and callable objects hold, close over or read as global
    variables.
    """
    modules: dict[int, nn.Module] = {}
    generators: dict[int, torch.Generator] = {}
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice

    def visit(thing: Any, depth: int) -> None:
        if depth > _DEPTH or id(thing) in seen or isinstance(thing, Tensor | str | int | float | None):
            return
        seen[id(thing)] = thing
        if isinstance(thing, torch.Generator):
            generators[id(thing)] = thing
        elif isinstance(thing, nn.Module):
            for child in thing.modules():
                modules[id(child)] = child
                for value in vars(child).values():
                    visit(value, depth + 1)
        else:
            for part in _parts(thing):
                visit(part, depth + 1)

    visit(roots, 0)
    return list(modules.values()), list(generators.values())


def _parts(thing: Any) -> list[Any]:
    """The objects that a container, a function, a method, a partial or a callable object holds."""
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, tuple | list | set | frozenset):
        return list(thing)
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    parts = [getattr(thing, "__self__", None), getattr(thing, "__wrapped__", None), getattr(thing, "__func__", None)]
    code = getattr(thing, "__code__", None)
    if isinstance(code, CodeType):  # a class may hold a descriptor of this name
        for cell in getattr(thing, "__closure__", None) or ():
            try:
                parts.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
        names = getattr(thing, "__globals__", {})
        parts += [names[name] for name in code.co_names if name in names]
        parts += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    elif callable(thing) and not isinstance(thing, type) and hasattr(thing, "__dict__"):
        parts += list(vars(thing).values())
    return parts
