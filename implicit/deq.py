"""`DEQ`: a deep-equilibrium layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from implicit.argument_types import check_arguments
from implicit.fixed_point import check_types, fixed_point
from implicit.grads.base import AbstractGrad
from implicit.grads.ift import IFT
from implicit.grads.stochastic_jfb import StochasticJFB
from implicit.pytree import Map, State
from implicit.solution import Adjoint
from implicit.solvers.base import AbstractSolver
from implicit.solvers.multisecant import Multisecant
from implicit.stopping import Stop


class DEQ(nn.Module):
    """``deq(z0, *args)`` is ``fixed_point(f, z0, *args, ...)``; f may be a module, whose parameters become the layer's.

    The module keeps no other state than that of `StochasticJFB.generator`, if there is one: the `state_dict` holds it
    as ``generator``, so that a resumed run draws the same numbers as an uninterrupted one. The value has a graph in
    training and in evaluation mode alike.

    Args:
        f: the map f(z, *args).
        solver, grad, stop: as in `fixed_point`.
        eval_stop: used instead of `stop` in evaluation mode; default `stop`. In evaluation mode the solve ends by this
            tolerance and budget even if `grad` draws a budget of its own: JFB takes the place of StochasticJFB.
        return_value: return ``solution.value`` alone, as `nn.Sequential`, `torch.vmap` and
            ``checkpoint(use_reentrant=True)`` need it; with `has_aux` the tuple (value, aux).
        has_aux: f returns (f(z), aux).
    """

    def __init__(
        self,
        f: Map,
        *,
        solver: AbstractSolver[Any] = Multisecant(),
        grad: AbstractGrad = IFT(),
        stop: Stop = Stop(),
        eval_stop: Stop | None = None,
        return_value: bool = False,
        has_aux: bool = False,
    ) -> None:
        super().__init__()
        check_types(solver, grad, stop)
        given = {"f": f, "eval_stop": eval_stop, "return_value": return_value, "has_aux": has_aux}
        check_arguments(DEQ.__init__, given, "DEQ: ")
        self.f, self.solver, self.grad = f, solver, grad
        self.stop, self.eval_stop, self.return_value, self.has_aux = stop, eval_stop, return_value, has_aux

    def forward(
        self,
        z0: State | Callable[[torch.Generator | None], State],
        *args: Any,
        batch_dims: int = 1,
        starts: int = 1,
        generator: torch.Generator | None = None,
        trace: bool | Callable[[Any, State, State], Any] = False,
        state: Any = None,
        keep_state: bool = False,
        compact: bool | tuple[bool, ...] = False,
        adjoint: Adjoint | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        progress: bool = False,
    ) -> Any:
        """Solve z = f(z, *args) from z0; see `fixed_point`."""
        grad, stop = self.grad, self.stop
        if not self.training:
            grad, stop = grad.for_evaluation(), self.eval_stop or stop
        solution = fixed_point(
            self.f,
            z0,
            *args,
            solver=self.solver,
            grad=grad,
            stop=stop,
            batch_dims=batch_dims,
            has_aux=self.has_aux,
            starts=starts,
            generator=generator,
            trace=trace,
            state=state,
            keep_state=keep_state,
            compact=compact,
            adjoint=adjoint,
            callback=callback,
            progress=progress,
        )
        if not self.return_value:
            return solution
        return (solution.value, solution.aux) if self.has_aux else solution.value

    @property
    def _generator(self) -> torch.Generator | None:
        return self.grad.generator if isinstance(self.grad, StochasticJFB) else None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._generator is not None:
            destination[prefix + "generator"] = self._generator.get_state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "generator"
        if self._generator is not None and name in state_dict:
            self._generator.set_state(state_dict[name].cpu())
            state_dict = {key: value for key, value in state_dict.items() if key != name}
        elif self._generator is not None and strict:
            missing_keys.append(name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        shown = f"solver={self.solver}, grad={self.grad}, stop={self.stop}, eval_stop={self.eval_stop or self.stop}"
        shown += ", has_aux=True" if self.has_aux else ""
        return shown + (", return_value=True" if self.return_value else "")
