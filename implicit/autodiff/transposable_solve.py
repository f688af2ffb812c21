"""The linear solves of a fixed point's derivatives, as an autograd function whose derivatives are such solves again.

Setting: J = dF/dz at (z, theta), and A = J or J^T. `TransposableSolve` gives u = b + A u. Its derivatives are solves
with A (forward) and A^T (backward); under vmap the mapped axis is folded into the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from implicit.autodiff.closure_convert import UNTRACED, ClosureTracer, Reads, has_untraced_leaf
from implicit.autodiff.jvp import functional_jvp, pushforward
from implicit.autodiff.recomputation import CHANGED, require_same_image, summary
from implicit.autodiff.vjp import functional_vjp, linearize
from implicit.linear.adjoint_solve import LinearSolve

Product: TypeAlias = Callable[[Tensor], Tensor]


class Record:
    """The tensors that F read in its first evaluation at the solution; None before this evaluation."""

    reads: Reads | None = None


@dataclass(frozen=True)
class Pure:
    """F(z, *theta), a function of all tensors with a derivative that it depends on."""

    function: Callable[..., Tensor]
    widths: tuple[int, ...]  # columns of the tensors of the state
    record: Record = field(default_factory=Record)

    def __call__(self, z: Tensor, *theta: Tensor) -> Tensor:
        return self.function(z, *theta)

    def first(self, z: Tensor, *theta: Tensor) -> Tensor:
        """The summary of F at the solution, with which a second evaluation is compared; without a graph.

        Raises:
            RuntimeError: F uses tensors with a derivative that it did not use at the start.
        """
        with ClosureTracer((z, *theta)) as tracer:
            image = self.function(z, *theta)
        if tracer.tensors:
            raise RuntimeError(UNTRACED)
        self.record.reads = tracer.reads()
        return summary(image, self.widths)

    def again(self, z: Tensor, *theta: Tensor) -> Tensor:
        """F at the solution, evaluated again.

        Raises:
            RuntimeError: F has changed since the first evaluation.
        """
        first = self.record.reads
        gone = [] if first is None else first.gone()  # constants that f's closure no longer holds
        with ClosureTracer((z, *theta)) as tracer:
            image = self.function(z, *theta)
        if first is not None and tracer.contradicts(first, gone):
            raise RuntimeError(CHANGED)
        if any(t.grad_fn is None or has_untraced_leaf(t, (z, *theta)) for t in tracer.tensors):
            raise RuntimeError(UNTRACED)
        return image

    def fold(self, size: int, dims: tuple[int | None, ...]) -> "Pure":
        """F over `size` problems at once, whose batches are concatenated."""

        def folded(z: Tensor, *theta: Tensor) -> Tensor:
            many = torch.func.vmap(self.function, in_dims=(0, *dims), out_dims=0, randomness="different")
            return many(z.unflatten(0, (size, -1)), *theta).flatten(0, 1)

        return replace(self, function=folded)


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

    def linearize(self, z: Tensor, theta: tuple[Tensor, ...]) -> tuple[Tensor, Product]:
        """(F(z, theta), v -> J v or v -> J^T v) from one evaluation on plain tensors.

        J v is the vjp of v -> J^T v or, if F has no second derivative, a jvp that evaluates F again.
        """
        fixed = [t.detach() for t in theta]
        if self.transposed:
            return linearize(lambda x: self.pure.again(x, *fixed), z)
        with torch.inference_mode(False), torch.enable_grad():
            x = z.detach().clone().requires_grad_()
            image = self.pure.again(x, *fixed)
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
        again, product = act.linearize(z, theta)
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
