"""Ring buffer of K vectors per sample in one tensor, and the Gram matrix of such vectors.

A view of a small tensor costs as much time as an operator, so the views that are read and written in every step are
made once and kept. Rows are written in place, or into a copy if autograd records them or a torch.func transform maps
them (`implicit.solvers.history_buffer`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.solvers.history_buffer import Coefficients, KeepsViews, Slot, dots, in_place, put, row

# a squared norm that is smaller counts as 1, which gives its vector coefficient 0, since its products underflow
_UNDERFLOW = {torch.float64: 1e-290, torch.float32: torch.finfo(torch.float32).tiny}


@dataclass(frozen=True)
class RingBuffer(KeepsViews):
    """K vectors of N numbers per sample."""

    rows: Float[Tensor, "B K N"]

    def set_difference(self, slot: Slot, a: Flat, b: Flat) -> "RingBuffer":
        """The buffer with row `slot` replaced by a - b."""
        if isinstance(slot, Tensor) or torch.compiler.is_compiling() or not in_place(self.rows, a, b):
            rows = put(self.rows, slot, a - b)
            return self if rows is self.rows else RingBuffer(rows)
        torch.sub(a, b, out=self._each[slot])
        return self

    def dot(self, x: Flat) -> Coefficients:
        """<row_i, x> for every row."""
        if torch.compiler.is_compiling():  # dynamo takes no cached property
            return dots(self.rows, x)
        return torch.bmm(x.unsqueeze(1), self._columns)

    def dot_row(self, slot: Slot) -> Coefficients:
        """<row_i, row_slot> for every row."""
        columns = self.rows.transpose(1, 2) if torch.compiler.is_compiling() else self._columns
        return torch.bmm(self.one_row(slot), columns)

    def one_row(self, slot: Slot) -> Float[Tensor, "B 1 N"]:
        """Row `slot` of every sample."""
        if isinstance(slot, Tensor) or torch.compiler.is_compiling():
            return row(self.rows, slot).unsqueeze(1)
        return self._slices[slot]

    def add(self, x: Flat, c: Coefficients, sign: int = 1) -> Flat:
        """x + sign sum_i c_i row_i."""
        return torch.baddbmm(x.unsqueeze(1), c, self.rows, alpha=sign).squeeze(1)

    def clear(self, mask: Bool[Tensor, "B 1"]) -> "RingBuffer":
        """The buffer with all rows of the samples in `mask` zero."""
        return RingBuffer(self.rows.masked_fill(mask.unsqueeze(2), 0))

    @cached_property
    def _each(self) -> tuple[Float[Tensor, "B N"], ...]:
        return self.rows.unbind(1)

    @cached_property
    def _slices(self) -> tuple[Float[Tensor, "B 1 N"], ...]:
        return self.rows.split(1, dim=1)

    @cached_property
    def _columns(self) -> Float[Tensor, "B N K"]:
        return self.rows.transpose(1, 2)


@dataclass(frozen=True)
class GramMatrix(KeepsViews):
    """Products of K vectors per sample."""

    products: Float[Tensor, "B K K"]

    @classmethod
    def empty(cls, vectors: int, like: Flat) -> "GramMatrix":
        """The matrix of vectors of zeros."""
        return cls(torch.eye(vectors, dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1))

    def set(self, slot: Slot, products: Float[Tensor, "B 1 K"], factors: "RingBuffer") -> "GramMatrix":
        """The matrix with new products times row `slot` of some factors in its row and column `slot`."""
        matrix, least = self.products, _UNDERFLOW[products.dtype]
        if not isinstance(slot, Tensor) and not torch.compiler.is_compiling() and in_place(matrix, products):
            own = self._rows[slot]
            torch.mul(products, factors.one_row(slot), out=own)
            torch.threshold_(self._squares[slot], least, 1)
            self._columns[slot].copy_(own)
            return self
        new = (products * factors.one_row(slot)).squeeze(1)
        own = torch.threshold(row(new.unsqueeze(2), slot), least, 1)
        new = put(new.unsqueeze(2), slot, own).squeeze(2)
        if isinstance(slot, Tensor):  # a view written in place may get other strides in a compiled graph
            matrix.index_copy_(1, slot, new.unsqueeze(1)).index_copy_(2, slot, new.unsqueeze(2))
            return self
        return GramMatrix(put(put(matrix.clone(), slot, new).mT, slot, new).mT)

    def solve(self, right: Coefficients) -> Coefficients:
        """The solutions; rows are divided by the norms, since pivots are chosen by comparing rows."""
        if torch.compiler.is_compiling():
            squares = self.products.diagonal(dim1=1, dim2=2).unsqueeze(2)
        else:
            squares = self._diagonal
        rows = squares.rsqrt()
        return torch.linalg.solve_ex(self.products * rows, right.mT * rows)[0].mT

    def clear(self, mask: Bool[Tensor, "B 1"]) -> "GramMatrix":
        """The matrix in which the vectors of the samples in `mask` are zero."""
        eye = torch.eye(self.products.shape[1], dtype=self.products.dtype, device=self.products.device)
        return GramMatrix(torch.where(mask.unsqueeze(2), eye, self.products))

    @cached_property
    def _rows(self) -> tuple[Float[Tensor, "B 1 K"], ...]:
        return self.products.split(1, dim=1)

    @cached_property
    def _columns(self) -> tuple[Float[Tensor, "B 1 K"], ...]:
        return self.products.mT.split(1, dim=1)

    @cached_property
    def _diagonal(self) -> Float[Tensor, "B K 1"]:
        return self.products.diagonal(dim1=1, dim2=2).unsqueeze(2)

    @cached_property
    def _squares(self) -> tuple[Float[Tensor, " B"], ...]:
        return self.products.diagonal(dim1=1, dim2=2).unbind(1)
