"""Every private call into PyTorch that the package makes, with the version that it was checked with.

Checked with torch 2.13.0. A name that a later version drops fails here and nowhere else.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

R = TypeVar("R")


def transforms_active() -> bool:
    """Whether a torch.func transform is on (`torch._C._are_functorch_transforms_active`, 2.13.0)."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_active() -> bool:
    """Whether a forward-mode level is open (`forward_ad._current_level`, 2.13.0)."""
    return forward_ad._current_level >= 0


def host_readable(t: Tensor) -> bool:
    """Whether numbers of `t` can be read without waiting for a device, and are known: no transform, no traced graph.

    `torch._C._get_tracing_state`, 2.13.0.
    """
    if torch.compiler.is_compiling() or transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    return type(t) is Tensor and t.device.type == "cpu"


def is_abstract(t: Tensor) -> bool:
    """Whether a tensor has no numbers: on the meta device, or a `FakeTensor` (`torch._subclasses`, 2.13.0)."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return t.is_meta or (fake is not None and isinstance(t, fake.FakeTensor))


def version(t: Tensor) -> int:
    """How often a tensor was written to in place (`Tensor._version`, 2.13.0)."""
    return t._version


def inside_backward() -> bool:
    """Whether an autograd engine runs in this thread (`torch._C._current_graph_task_id`, 2.13.0)."""
    return torch._C._current_graph_task_id() != -1


def register_pytree(kind: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
    """Let PyTorch's transforms take objects of a class apart (`torch.utils._pytree`, 2.13.0)."""
    _pytree.register_pytree_node(kind, flatten, unflatten, serialized_type_name=f"implicit.{kind.__name__}")


def not_compiled(function: Callable[..., R]) -> Callable[..., R]:
    """`function` outside of compiled graphs, with all that it calls.

    `torch.compiler.disable` imports torch._dynamo, which takes longer than torch itself, so it is called when
    something was compiled, and not when this package is imported.
    """

    disabled: list[Callable[..., R]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            wrapped: Any = torch.compiler.disable(function, recursive=True)
            disabled.append(wrapped)
        return disabled[0](*args, **kwargs)

    return call
