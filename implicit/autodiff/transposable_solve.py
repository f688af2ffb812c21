"""The linear solves of a fixed point's derivatives, as an autograd function whose derivatives are such solves again.

Setting: J = dF/dz at (z, theta), and A = J or J^T. `TransposableSolve` gives u = b + A u. Its derivatives are solves
with A (forward) and A^T (backward); under vmap the mapped axis is folded into the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import UNTRACED, ClosureTracer, Reads, has_untraced_leaf
from implicit.autodiff.jvp import functional_jvp, pushforward
from implicit.autodiff.recomputation import (
    CHANGED,
    fixed_weights,
    require_same_derivatives,
    require_same_image,
    summary,
)
from implicit.autodiff.vjp import functional_vjp, linearize, vjp
from implicit.linear.adjoint_solve import LinearSolve

Product: TypeAlias = Callable[[Tensor], Tensor]


class Record:
    """The first evaluation of F at the solution.

    Attributes:
        reads: the tensors that F read; None before this evaluation.
        probe: `Pure.probe` of this evaluation; None: not compared.
    """

    reads: Reads | None = None
    probe: list[Tensor | None] | None = None


@dataclass(frozen=True)
class Pure:
    """F(z, *theta), a function of all tensors with a derivative that it depends on."""

    function: Callable[..., Tensor]
    widths: tuple[int, ...]  # columns of the tensors of the state
    differentiated: tuple[bool, ...]  # the theta that have a derivative
    record: Record = field(default_factory=Record)

    def __call__(self, z: Tensor, *theta: Tensor) -> Tensor:
        return self.function(z, *theta)

    def first(self, z: Tensor, *theta: Tensor) -> Tensor:
        """The summary of F at the solution, with which a second evaluation is compared; without a graph.

        Raises:
            RuntimeError: F uses tensors with a derivative that it did not use at the start.
        """
        with self._recorded(z, theta) as at, ClosureTracer(at) as tracer:
            image = self.function(*at)
        if untraced(tracer, at):
            raise RuntimeError(UNTRACED)
        if at[0].requires_grad:
            try:
                self.record.probe = self.probe(image, at)
            except (NotImplementedError, RuntimeError):
                pass  # an operator of F has no derivative in reverse mode
        found = summary(image, self.widths)
        del image  # with its graph, which holds tensors that F has made untraced
        self.record.reads = tracer.reads()
        return found

    def again(self, eps: float, z: Tensor, *theta: Tensor) -> Tensor:
        """F at the solution, evaluated again with a graph to z and theta; eps is its relative rounding error.

        Raises:
            RuntimeError: F has changed since the first evaluation.
        """
        first, probe = self.record.reads, self.record.probe
        gone = [] if first is None else first.gone()  # constants that f's closure no longer holds
        with ClosureTracer((z, *theta)) as tracer:
            image = self.function(z, *theta)
        if first is not None and tracer.contradicts(first, gone):
            raise RuntimeError(CHANGED)
        if untraced(tracer, (z, *theta)):
            raise RuntimeError(UNTRACED)
        if probe is not None:
            require_same_derivatives(self.probe(image, (z, *theta)), probe, eps)
        return image

    def probe(self, image: Tensor, at: tuple[Tensor, ...]) -> list[Tensor | None]:
        """w^T dF for a fixed w and every tensor of `at`, the mean over the rows of F and, for z, of z too.

        Two maps may have one value and other derivatives: one may be detached from a tensor. A batch may have been
        repeated since the first evaluation, which multiplies the number of rows.
        """
        rows = max(len(image), 1)
        in_z, *others = vjp(image, at, fixed_weights(image).expand_as(image))
        found = [None if in_z is None else in_z.sum(dim=0), *others]
        return [None if g is None else g / rows for g in found]

    @contextmanager
    def _recorded(self, z: Tensor, theta: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """(z, *theta) for an evaluation with a graph; without one if no derivative will be taken."""
        if not any(self.differentiated):
            yield z, *theta
            return
        with torch.inference_mode(False), torch.enable_grad():
            yield z.detach().clone().requires_grad_(), *self.leaves(theta)

    def leaves(self, theta: tuple[Tensor, ...]) -> list[Tensor]:
        """theta, detached; with a gradient of their own if they have a derivative, except for inference tensors."""
        known = zip(theta, self.differentiated, strict=True)
        return [t.detach().requires_grad_(on and not t.is_inference()) for t, on in known]

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "Pure":
        """F over `size` problems at once, whose batches are concatenated."""

        def folded(z: Tensor, *theta: Tensor) -> Tensor:
            many = torch.func.vmap(self.function, in_dims=(0, *dims), out_dims=0, randomness="different")
            return many(z.unflatten(0, (size, -1)), *theta).flatten(0, 1)

        return replace(self, function=folded)


def untraced(tracer: ClosureTracer, at: tuple[Tensor, ...]) -> bool:
    """Whether a function of `at` has used another tensor with a derivative; a wrapper of one of `at` is none."""
    return any(t.grad_fn is None or has_untraced_leaf(t, at) for t in tracer.tensors)


def mapped(
    size: int, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...], *, batched: int
) -> tuple[tuple[int | None, ...], list[Tensor]]:
    """(mapped dimension of each theta, 0 or None; the tensors).

    The mapped dimension of the first `batched` tensors is folded into their batch, (size B, ...); in the others, theta,
    it becomes the first dimension.
    """
    moved = []
    for i, (t, dim) in enumerate(zip(tensors, dims, strict=True)):
        if i < batched:
            full = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            moved.append(full.flatten(0, 1).clone())  # cloned, since the rows of an expanded tensor share memory
        else:
            moved.append(t if dim is None else t.movedim(dim, 0))
    return tuple(None if dim is None else 0 for dim in dims[batched:]), moved


@dataclass(frozen=True)
class Jacobian:
    """v -> J v, or v -> J^T v where `transposed`; J = dF/dz."""

    pure: Pure
    transposed: bool

    def __call__(self, v: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        def at(x: Tensor) -> Tensor:
            return self.pure(x, *theta)

        return functional_vjp(at, (z,), v, (True,))[0] if self.transposed else functional_jvp(at, (z,), (v,))

    def linearize(self, z: Tensor, theta: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Product]:
        """(F(z, theta), v -> J v or v -> J^T v) from one evaluation on plain tensors, whose rounding error is eps.

        J v is the vjp of v -> J^T v or, if F has no second derivative, a jvp that evaluates F again.
        """
        fixed = self.pure.leaves(theta)
        if self.transposed:
            return linearize(lambda x: self.pure.again(eps, x, *fixed), z)
        with torch.inference_mode(False), torch.enable_grad():
            x = z.detach().clone().requires_grad_()
            image = self.pure.again(eps, x, *fixed)
            try:
                product = pushforward(image, x)
            except (NotImplementedError, RuntimeError):
                return image.detach(), lambda v: self(v, z, *theta)
        return image.detach(), product

    def adjoint(self) -> "Jacobian":
        return replace(self, transposed=not self.transposed)

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "Jacobian":
        return replace(self, pure=self.pure.fold(size, dims))


class TransposableSolve(torch.autograd.Function):
    """u = b + A u, for A = J or J^T at (z, theta); `image` is the summary of F(z, theta) in the forward pass."""

    @staticmethod
    def forward(act: Jacobian, config: LinearSolve, b: Tensor, image: Tensor, z: Tensor, *theta: Tensor) -> Tensor:
        again, product = act.linearize(z, theta, config.eps)
        require_same_image(again, image, config.eps, act.pure.widths)
        return config(product, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.act, ctx.config, _, image, z, *theta = inputs
        ctx.set_materialize_grads(False)  # None, not zeros, is the tangent of what has no derivative
        ctx.save_for_backward(output, image, z, *theta)
        ctx.save_for_forward(output, image, z, *theta)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        u, image, *at = ctx.saved_tensors
        if grads[0] is None:
            return (None,) * (4 + len(at))
        w = TransposableSolve.apply(ctx.act.adjoint(), ctx.config, grads[0], image, *at)
        return None, None, w, None, *functional_vjp(lambda *t: ctx.act(u, *t), tuple(at), w, ctx.needs_input_grad[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        u, image, *at = ctx.saved_tensors
        b = functional_jvp(lambda *t: ctx.act(u, *t), tuple(at), tangents[4:])
        return TransposableSolve.apply(ctx.act, ctx.config, b if tangents[2] is None else b + tangents[2], image, *at)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        axes, moved = mapped(info.batch_size, args[2:], in_dims[2:], batched=3)
        u = TransposableSolve.apply(args[0].fold(info.batch_size, axes), args[1], *moved)
        return u.unflatten(0, (info.batch_size, -1)), 0
