"""A fixed point as a differentiable function of the tensors that its map closes over, outside of `torch.func`.

Setting: z* = phi(z*), where phi closes over tensors theta, and J = dphi/dz at z*. y = phi(z*) is evaluated once with a
graph. An autograd function returns z* itself, and its backward pass sends a vector u into the graph of y, along which
autograd reaches every theta:

    `attach`                 u = g + J^T u, the implicit function theorem; differentiable to any order
    `attach_approximately`   u = rule(v -> J^T v, g), an estimate of it

No hook is set and nothing is stored on a module.

Second derivatives: u^T dphi/dtheta depends on z* too, and the graph of y, which was built at a detached z*, does not
contain this dependence. If the gradient is to be differentiated, phi is evaluated again as an explicit function of z*
and theta (by closure conversion) at the attached z*, and the products are taken from this evaluation. u itself is the
fixed point of psi(u) = g + J^T u and is attached by the same function, which gives every order.

If phi is evaluated again, it has to be the map that was solved: f may read an attribute or a loop variable that has
changed since. The value of phi at z* and the tensors that phi reads are compared with those of the forward pass, and a
difference raises.
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from implicit.autodiff.batched import each_cotangent
from implicit.autodiff.closure_convert import (
    UNTRACED,
    ClosureTracer,
    Reads,
    closure_convert,
    graph_nodes,
    has_untraced_leaf,
    own_view,
    same_reach,
)
from implicit.autodiff.recomputation import (
    CHANGED,
    fixed_weights,
    record,
    require_same_image,
    require_same_summary,
    summary,
)
from implicit.autodiff.vjp import edge, pullback, vjp
from implicit.evaluation import FlatMap
from implicit.linear.adjoint_solve import LinearSolve
from implicit.options import Problem
from implicit.pytree import Flat, State, tensors
from implicit.torch_internals import not_compiled, saved_tensor_hooks_active, saved_tensors_at_hand

Product: TypeAlias = Callable[[Flat], Flat]
"""v -> J^T v."""
Rule: TypeAlias = Callable[[Product, Flat], Flat]
"""(v -> J^T v, g) -> u, an estimate of (I - J^T)^-1 g."""

_NEAR = 8  # largest number of graph nodes that are searched for the parameter of a learned start


@not_compiled  # dynamo does not trace the modes of closure conversion
def attach(phi: FlatMap, z: Flat, solve: LinearSolve) -> tuple[Flat, Flat]:
    """(z, phi(z)), with the fixed point z as a differentiable function of all tensors that phi closes over."""
    with torch.enable_grad():
        x = Barrier.apply(z.detach().requires_grad_())
        tracer, hooked = ClosureTracer((x,)), saved_tensor_hooks_active()
        y, probe = _evaluate(phi, x, tracer)
        image, theta, reads = y.detach(), tracer.tensors, tracer.reads()
        if not theta and not has_untraced_leaf(y, (x,)):
            return z.detach(), image
        widths = phi.layout.widths
        explicit = not_compiled(closure_convert(phi, theta))
        views = [own_view(t) for t in theta]
        edges = tuple(_edge_of(t, view) for t, view in zip(theta, views, strict=True))
        first = First(explicit, record(image, widths), reads, solve.eps, widths, probe, edges)
        return _FixedPoint.apply(y, x, z.detach(), first, solve, hooked, *views), image


def attach_approximately(phi: FlatMap, z: Flat, rule: Rule, eps: float) -> tuple[Flat, Flat]:
    """(z, phi(z)), with the fixed point z whose gradient reaches all tensors that phi closes over through `rule`."""
    hooked, first = saved_tensor_hooks_active(), None
    with torch.enable_grad():
        x = Barrier.apply(z.detach().requires_grad_())
        y, probe = _evaluate(phi, x, nullcontext())
    image, widths = y.detach(), phi.layout.widths
    if not y.requires_grad or not has_untraced_leaf(y, (x,)):
        return z.detach(), image
    if hooked:
        first = First(not_compiled(phi), record(image, widths), None, eps, widths, probe)
    return _Approximate.apply(y, x, z.detach(), first, rule), image


def _edge_of(t: Tensor, view: Tensor) -> GradientEdge | None:
    """The gradient edge of t, of which `view` is an `own_view`: PyTorch finds none of a leaf that is sparse."""
    if t.layout == torch.strided or view.grad_fn is None or t.grad_fn is not None:
        return edge(t)
    node, number = view.grad_fn.next_functions[0]
    return None if node is None else GradientEdge(node, number)


class Barrier(torch.autograd.Function):
    """Identity without a gradient, at which the engine ends a backward pass.

    The engine neither accumulates a gradient in the leaf nor goes on behind it; products v^T J are taken separately.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def _evaluate(phi: FlatMap, x: Flat, mode: AbstractContextManager[Any]) -> tuple[Flat, Tensor | None]:
    """(phi(x) under `mode`, the `_probe` of its Jacobian if hooks pack saved tensors, else None)."""
    if not saved_tensor_hooks_active():
        with mode:
            return phi(x), None
    with saved_tensors_at_hand():
        with mode:
            y = phi(x)
        return y, _probe(pullback(y, x), x)


def _probe(product: Product, z: Flat) -> Tensor | None:
    """The record of (I - J^T) w for a fixed w; it distinguishes maps of one value at z, such as two dampings."""
    w = fixed_weights(z).expand_as(z)
    return record(w - product(w))


@dataclass(frozen=True)
class First:
    """phi(x, *theta), and the record of its first evaluation at the solution.

    `function` must run outside of torch.compile (`not_compiled`), since every substitution of theta, a function mode,
    would cause another compilation.
    """

    function: Callable[..., Flat]
    image: Tensor | None  # `summary` of phi(z); None: not compared
    reads: Reads | None  # the tensors that phi read; None: not compared
    eps: float  # relative rounding error of phi
    widths: tuple[int, ...] = ()  # columns of the tensors of the state
    probe: Tensor | None = None  # `_probe` of the Jacobian if the backward pass evaluates phi again
    theta: tuple[GradientEdge | None, ...] = ()  # of the tensors that phi closes over

    def __call__(self, x: Flat, *theta: Tensor) -> Flat:
        """phi(x, *theta) of a second evaluation.

        Raises:
            RuntimeError: phi has changed since the forward pass.
        """
        with ClosureTracer((x, *theta)) as tracer:
            again = self.function(x, *theta)
        if self.image is not None:
            require_same_image(again, self.image, self.eps, self.widths)
        if self.reads is not None and tracer.contradicts(self.reads):
            raise RuntimeError(CHANGED)
        return again


class _FixedPoint(torch.autograd.Function):
    """z, with the gradient of the fixed point of y = phi(x, *theta) at x = z."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        z: Tensor,
        phi: First,
        solve: LinearSolve,
        hooked: bool,
        *theta: Tensor,
    ) -> Tensor:
        # z.data shares the memory of z, but has its own version counter. The graph of f may have saved z, so an
        # in-place write into the value must raise in the backward pass: it does, since the value itself is saved.
        value = z.data
        ctx.phi, ctx.solve, ctx.hooked = phi, solve, hooked
        ctx.y, ctx.x = edge(y), edge(x)  # edges do not keep the tensors y and x alive
        ctx.save_for_backward(value, *theta)
        return value

    @staticmethod
    @each_cotangent
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        value, *theta = ctx.saved_tensors
        recorded = torch.is_grad_enabled()
        # u = g + J^T u, with products out of the graph of y
        product = pullback(ctx.y, ctx.x)
        if ctx.hooked:
            # theta keeps requires_grad, since a checkpoint inside f compares how many tensors both evaluations save
            product = _evaluated_again(ctx.phi, value, *theta)
        u = ctx.solve(product, g)
        if not recorded:
            return (u, *[None] * (5 + len(theta)))

        # The gradient will be differentiated, so it is computed as a function of g, z* and theta.
        def psi(v: Flat, g: Flat, value: Flat, *theta: Tensor) -> Flat:
            point = value.view_as(value)
            return g + pullback(edge(ctx.phi.function(point, *theta)), edge(point), create_graph=True)(v)

        u = _attach_explicit(psi, u, ctx.solve.plain(), (g, value, *theta))
        # u^T dphi/dtheta at views of z* and theta: partial derivatives, even where one tensor depends on another
        point, *stands = map(own_view, (value, *theta))
        again = ctx.phi(point, *stands)
        if has_untraced_leaf(again, (point, *stands)):
            raise RuntimeError(UNTRACED)
        turned, *found = vjp(again, (point, *stands), u, create_graph=True)
        # a map of the same value may be detached from a tensor: a weight that is frozen by now, or used under no_grad
        if not same_reach(ctx.y, ctx.x, ctx.phi.theta, [t is not None for t in found]):
            raise RuntimeError(CHANGED)
        # two maps, such as two dampings, may have the same value at z*, so u - J^T u is compared too: its rounding
        # error is relative to u even if J^T u is a small difference of large numbers, as behind a normalization
        require_same_image(u if turned is None else u - turned, summary(u - product(u)), ctx.solve.eps)
        return (*[None] * 6, *found)


def _attach_explicit(phi: Callable[..., Flat], z: Flat, solve: LinearSolve, theta: tuple[Tensor, ...]) -> Flat:
    """The fixed point z of phi(z, *theta) as a differentiable function of theta; phi closes over no tensor."""
    x = Barrier.apply(z.detach().requires_grad_())
    y = phi(x, *theta)
    first = First(phi, record(y), None, solve.eps, theta=tuple(map(edge, theta)))
    return _FixedPoint.apply(y, x, z.detach(), first, solve, False, *theta)


class _Approximate(torch.autograd.Function):
    """z, with a gradient that reaches y = phi(x) through `rule`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        z: Tensor,
        phi: First | None,
        rule: Rule,
    ) -> Tensor:
        ctx.rule, ctx.y, ctx.x, ctx.phi = rule, edge(y), edge(x), phi
        if phi is not None:
            ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    @each_cotangent
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recorded = torch.is_grad_enabled()
        product = pullback(ctx.y, ctx.x, create_graph=recorded)
        phi: First | None = ctx.phi
        if phi is not None and not recorded:
            product = _evaluated_again(phi, *ctx.saved_tensors)
        return (ctx.rule(product, grads[0]), *[None] * 4)


def warn_learned_start(problem: Problem, value: State) -> None:
    """Warn if the starting state is made from a parameter to which `value` passes no gradient.

    Only the first nodes of the graph of the starting state are searched for a parameter.
    """
    learned = _parameters(tensors(problem.z0), most=_NEAR)
    if learned and not learned <= _parameters(tensors(value)):
        warnings.warn(
            "The starting state z0 is a parameter, or made from one, and this estimator gives it no gradient: the "
            "solution does not depend on where the solve begins. Pass z0.detach() if that is intended; Unrolled and "
            "Reversible differentiate the iterations, the start included.",
            RuntimeWarning,
            stacklevel=4,
        )


def _parameters(roots: Iterable[Tensor], most: int | None = None) -> set[int]:
    """The ids of the parameters in the graph of `roots`; at most `most` nodes are searched."""
    nodes = islice(graph_nodes(get_gradient_edge(t).node for t in roots if t.requires_grad), most)
    found = (getattr(node, "variable", None) for node in nodes)
    return {id(variable) for variable in found if isinstance(variable, torch.nn.Parameter)}


def _evaluated_again(phi: First, z: Flat, *theta: Tensor) -> Product:
    """v -> J^T v from a second evaluation of phi at z, made where no hook packs its saved tensors."""
    with torch.enable_grad():
        x = z.detach().requires_grad_()
        y = phi(x, *theta)
    product = pullback(y, x)
    again = _probe(product, z)
    if phi.probe is not None and again is not None:
        require_same_summary(again, phi.probe, phi.eps)
    return product
