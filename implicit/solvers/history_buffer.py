"""Growing history of vectors per sample, for quasi-Newton solvers and Krylov bases.

Rows are stored in blocks of 8, 8, 16, 32, ... rows that are allocated when first needed and never copied, so k rows
take k to 2k states and at most `capacity`. A history of less than a mebibyte is one block from the start, or with
`first` two blocks: `first` rows and the rest. Rows are written in place, or into a copy if autograd records the rows or
a torch.func transform maps them.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from implicit.pytree import Flat
from implicit.torch_internals import depends_on_transform, transforms_active

_FIRST = 8  # rows of the first block
_SMALL = 2**20  # a history of fewer bytes is one block
Coefficients = Float[Tensor, "B 1 K"]


def put(rows: Float[Tensor, "B K M"], slot: int, value: Float[Tensor, "B M"]) -> Float[Tensor, "B K M"]:
    """`rows` with row `slot` of every sample replaced by `value`."""
    if not _in_place(rows, value):
        return torch.cat((rows[:, :slot], value.unsqueeze(1), rows[:, slot + 1 :]), dim=1)
    rows[:, slot] = value
    return rows


def put_difference(
    rows: Float[Tensor, "B K M"], slot: int, a: Float[Tensor, "B M"], b: Float[Tensor, "B M"]
) -> Float[Tensor, "B K M"]:
    """`rows` with row `slot` of every sample replaced by a - b."""
    if torch.compiler.is_compiling() or not _in_place(rows, a, b):  # dynamo does not allow a view as out=
        return put(rows, slot, a - b)
    torch.sub(a, b, out=rows[:, slot])
    return rows


def _in_place(*given: Tensor) -> bool:
    """Whether rows may be written in place: autograd records none of `given`, and no transform maps one of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return torch.compiler.is_compiling() or not (transforms_active() and any(map(depends_on_transform, given)))


def dots(rows: Float[Tensor, "B K M"], x: Float[Tensor, "B M"]) -> Float[Tensor, "B 1 K"]:
    """<row_i, x> for every row, as x^T rows^T: rows x is an order of magnitude slower on a CPU."""
    return torch.bmm(x.unsqueeze(1), rows.mT)


def put_dots(
    matrix: Float[Tensor, "B K K"], slot: int, rows: Float[Tensor, "B K M"], x: Float[Tensor, "B M"]
) -> Float[Tensor, "B K K"]:
    """`matrix` with row `slot` of every sample replaced by the products <row_i, x>."""
    if torch.compiler.is_compiling() or not _in_place(matrix, rows, x):
        return put(matrix, slot, dots(rows, x).squeeze(1))
    torch.bmm(x.unsqueeze(1), rows.mT, out=matrix[:, slot : slot + 1])
    return matrix


@dataclass(frozen=True)
class HistoryBuffer:
    """At most `capacity` rows of N numbers per sample; unused rows are zero."""

    capacity: int
    blocks: tuple[Float[Tensor, "B _ N"], ...] = ()
    first: int = 0
    """Rows of the first block, if so few usually suffice; 0: a first block as in any history."""

    @property
    def rows(self) -> int:
        """Number of rows in the blocks allocated so far."""
        return sum(block.shape[1] for block in self.blocks)

    def __getitem__(self, sample: int) -> Float[Tensor, "K N"]:
        """The rows of one sample."""
        return torch.cat([block[sample] for block in self.blocks])

    def row(self, slot: int) -> Flat:
        """Row `slot` of every sample."""
        i, slot = self._place(slot)
        return self.blocks[i][:, slot]

    def _place(self, slot: int) -> tuple[int, int]:
        """(number of the block that holds row `slot`, number of the row in this block)."""
        for i, block in enumerate(self.blocks):
            if slot < block.shape[1]:
                return i, slot
            slot -= block.shape[1]
        raise IndexError(slot)

    def _with(self, i: int, block: Float[Tensor, "B _ N"]) -> "HistoryBuffer":
        """The history with another block number i."""
        return replace(self, blocks=(*self.blocks[:i], block, *self.blocks[i + 1 :]))

    def reserve(self, slot: int, like: Flat) -> "HistoryBuffer":
        """The history with room for row number `slot`."""
        if slot < self.rows:
            return self
        if self.first and not self.blocks:
            more = self.first
        else:
            small = self.capacity * like.numel() * like.element_size() < _SMALL
            more = min(self.capacity if small else max(_FIRST, self.rows), self.capacity - self.rows)
        return replace(self, blocks=(*self.blocks, like.new_zeros(like.shape[0], more, like.shape[1])))

    def set(self, slot: int, value: Flat) -> "HistoryBuffer":
        """The history with row `slot` replaced by `value`."""
        i, slot = self._place(slot)
        return self._with(i, put(self.blocks[i], slot, value))

    def set_difference(self, slot: int, a: Flat, b: Flat) -> "HistoryBuffer":
        """The history with row `slot` replaced by a - b."""
        i, slot = self._place(slot)
        return self._with(i, put_difference(self.blocks[i], slot, a, b))

    def dot(self, x: Flat) -> Coefficients:
        """<row_i, x> for every row."""
        parts = [dots(block, x) for block in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def products(self, xs: Float[Tensor, "B P N"], count: int) -> Float[Tensor, "B P K"]:
        """<row_i, x> for the first `count` rows and each of P vectors x, reading the rows once."""
        parts = []
        for block in self.blocks:
            parts.append(torch.bmm(xs, block[:, :count].mT))
            count = count - block.shape[1]  # under torch.jit.trace `count` may be a tensor, which -= would write to
            if count <= 0:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def is_finite(self) -> Bool[Tensor, "B 1"]:
        """Whether all numbers of a sample are finite, for a history with rows."""
        parts = [block.isfinite().all(dim=2).all(dim=1, keepdim=True) for block in self.blocks]
        return torch.cat(parts, dim=1).all(dim=1, keepdim=True)

    def clear(self, mask: Bool[Tensor, "B 1"]) -> "HistoryBuffer":
        """The history with all rows of the samples in `mask` zero."""
        cleared = mask.unsqueeze(2)
        if torch.is_grad_enabled() and any(block.requires_grad for block in self.blocks):
            return replace(self, blocks=tuple(block.masked_fill(cleared, 0) for block in self.blocks))
        for block in self.blocks:  # in place, since a copy would double the memory of the history
            block.masked_fill_(cleared, 0)
        return self

    def add(self, x: Flat, c: Coefficients, sign: int = 1, first: int = 0) -> Flat:
        """x + sign sum_i c_i row_{first + i}."""
        out, start, count = x.unsqueeze(1), -first, c.shape[2]
        for block in self.blocks:
            low, high = max(0, -start), min(block.shape[1], count - start)
            if low < high:
                rows = block if (low, high) == (0, block.shape[1]) else block[:, low:high]
                part = c if high - low == count else c[:, :, start + low : start + high]
                out = torch.baddbmm(out, part, rows, alpha=sign)
            start += block.shape[1]
        return out.squeeze(1)
