"""Growing history of vectors per sample, for quasi-Newton solvers and Krylov bases.

Rows are stored in blocks of 8, 8, 16, 32, ... rows that are allocated when first needed and never copied, so k rows
take k to 2k states and at most `capacity`. A history of less than a mebibyte is one block from the start, or with
`first` two blocks: `first` rows and the rest. Rows are written in place, or into a copy if autograd records the rows or
a torch.func transform maps them.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from implicit.pytree import Flat
from implicit.torch_internals import depends_on_transform, transforms_active

_FIRST = 8  # rows of the first block
_SMALL = 2**20  # a history of fewer bytes is one block
Coefficients = Float[Tensor, "B 1 K"]
Slot: TypeAlias = int | Int[Tensor, "1"]


def position(slot: int, like: Tensor) -> Int[Tensor, "1"]:
    """A slot as a tensor, so that one region of a compiled graph serves all slots (`implicit.loop.step_region`)."""
    return torch.full((1,), slot, device=like.device)


def rows_written(count: int, rows: int) -> int:
    """A number of rows written to a ring, less the whole turns after the first one, which change nothing.

    Each number has a compiled graph of its own, so it must not grow from solve to solve.
    """
    return count if count < rows else rows + count % rows


def advanced(slot: Int[Tensor, "1"] | None, rows: int) -> Int[Tensor, "1"] | None:
    """The slot after a slot in a ring of `rows` rows."""
    return None if slot is None else (slot + 1) % rows


def row(rows: Float[Tensor, "B K M"], slot: Slot) -> Float[Tensor, "B M"]:
    """Row `slot` of every sample; a view if the slot is a number."""
    return rows.index_select(1, slot).squeeze(1) if isinstance(slot, Tensor) else rows.select(1, slot)


def put(rows: Float[Tensor, "B K M"], slot: Slot, value: Float[Tensor, "B M"]) -> Float[Tensor, "B K M"]:
    """`rows` with row `slot` of every sample replaced by `value`."""
    if isinstance(slot, Tensor):
        return rows.index_copy_(1, slot, value.unsqueeze(1))
    if not in_place(rows, value):
        return torch.cat((rows[:, :slot], value.unsqueeze(1), rows[:, slot + 1 :]), dim=1)
    rows.select(1, slot).copy_(value)
    return rows


def coefficient(c: Coefficients, slot: Slot) -> Float[Tensor, "B 1"]:
    """The coefficient of row `slot`; a view if the slot is a number."""
    return row(c.transpose(1, 2), slot) if isinstance(slot, Tensor) else c.select(2, slot)


def put_coefficient(c: Coefficients, slot: Slot, value: Float[Tensor, "B 1"] | float) -> None:
    """Write the coefficient of row `slot`."""
    if not isinstance(slot, Tensor) and isinstance(value, Tensor):
        c.select(2, slot).copy_(value)
    elif not isinstance(slot, Tensor):
        c[:, :, slot] = value
    elif isinstance(value, Tensor):
        c.index_copy_(2, slot, value.unsqueeze(2))
    else:
        c.index_fill_(2, slot, value)


def in_place(*given: Tensor) -> bool:
    """Whether rows may be written in place: autograd records none of `given`, and no transform maps one of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return torch.compiler.is_compiling() or not (transforms_active() and any(map(depends_on_transform, given)))


def _may_clear(rows: Tensor, mask: Tensor) -> bool:
    """Whether entries of `rows` may be cleared in place.

    Autograd saves rows that it does not record, those of a warm start, for the derivatives of their products.
    """
    return in_place(rows, mask) and not torch.is_grad_enabled()


def dots(rows: Float[Tensor, "B K M"], x: Float[Tensor, "B M"]) -> Float[Tensor, "B 1 K"]:
    """<row_i, x> for every row, as x^T rows^T: rows x is an order of magnitude slower on a CPU."""
    return torch.bmm(x.unsqueeze(1), rows.transpose(1, 2))


def put_products(
    gram: Float[Tensor, "B K K"], first: int, rows: Float[Tensor, "B P M"], history: "HistoryBuffer"
) -> Float[Tensor, "B K K"]:
    """`gram` with the rows from `first` on replaced by the products of `rows` with those of the history."""
    end, start = first + rows.shape[1], 0
    if torch.compiler.is_compiling() or not in_place(gram, rows, *history.blocks):
        products = torch.cat([torch.bmm(rows, block.mT) for block in history.blocks], dim=2)
        return torch.cat((gram[:, :first], products, gram[:, end:]), dim=1)
    for block in history.blocks:
        stop = start + block.shape[1]
        out = gram[:, first:end, start:stop]
        if out.is_contiguous():
            torch.bmm(rows, block.mT, out=out)
        else:  # into other memory bmm multiplies sample by sample
            out.copy_(torch.bmm(rows, block.mT))
        start = stop
    return gram


def clear_products(
    gram: Float[Tensor, "B K K"], mask: Bool[Tensor, "B 1"], first: int, end: int
) -> Float[Tensor, "B K K"]:
    """`gram` with the rows and columns from `first` to `end` - 1 of the samples in `mask` zero."""
    mask = mask.unsqueeze(2)
    if _may_clear(gram, mask):
        gram[:, first:end].masked_fill_(mask, 0)
        gram[:, :, first:end].masked_fill_(mask, 0)
        return gram
    gram = torch.cat((gram[:, :first], gram[:, first:end].masked_fill(mask, 0), gram[:, end:]), dim=1)
    return torch.cat((gram[:, :, :first], gram[:, :, first:end].masked_fill(mask, 0), gram[:, :, end:]), dim=2)


def add_diagonal(gram: Float[Tensor, "B K K"], mask: Bool[Tensor, "B 1"], slot: int) -> Float[Tensor, "B K K"]:
    """`gram` with 1 added to entry `slot` of the diagonal, for the samples in `mask`."""
    if _may_clear(gram, mask):
        gram[:, slot, slot].add_(mask[:, 0])
        return gram
    one = torch.zeros(gram.shape[1], dtype=gram.dtype, device=gram.device)
    one[slot] = 1
    return gram + torch.diag(one) * mask.unsqueeze(2)


@dataclass(frozen=True)
class KeepsViews:
    """A dataclass that keeps views of its tensors as cached properties. A pickle or a copy has none of them."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class HistoryBuffer(KeepsViews):
    """At most `capacity` rows per sample, each of `vectors` vectors of N numbers; unused rows are zero."""

    capacity: int
    blocks: tuple[Float[Tensor, "B _ N"], ...] = ()
    first: int = 0
    """Rows of the first block, if so few usually suffice; 0: a first block as in any history."""
    vectors: int = 1
    """Vectors of a row, side by side."""
    backward: bool = False
    """Whether new blocks take their place before the others, for a history that is filled from its last row."""

    @property
    def rows(self) -> int:
        """Number of rows in the blocks allocated so far."""
        return sum(block.shape[1] for block in self.blocks)

    def __getitem__(self, sample: int) -> Float[Tensor, "K N"]:
        """The rows of one sample."""
        return torch.cat([block[sample] for block in self.blocks])

    def row(self, slot: Slot) -> Flat:
        """Row `slot` of every sample."""
        if isinstance(slot, Tensor):
            return row(self.blocks[0], slot)
        i, slot = self._place(slot)
        return self._rows[i][slot] if self._keeps_views else self.blocks[i][:, slot]

    def _place(self, slot: int) -> tuple[int, int]:
        """(number of the block that holds row `slot`, number of the row in this block)."""
        for i, block in enumerate(self.blocks):
            if slot < block.shape[1]:
                return i, slot
            slot -= block.shape[1]
        raise IndexError(slot)

    def _with(self, i: int, block: Float[Tensor, "B _ N"]) -> "HistoryBuffer":
        """The history with another block number i; itself if the block was written in place."""
        if block is self.blocks[i]:
            return self
        return replace(self, blocks=(*self.blocks[:i], block, *self.blocks[i + 1 :]))

    def reserve(self, slot: int, like: Flat) -> "HistoryBuffer":
        """The history with room for row number `slot`."""
        if slot < self.rows:
            return self
        if self.first and not self.blocks:
            more = self.first
        else:
            small = self.capacity * self.vectors * like.numel() * like.element_size() < _SMALL
            more = min(self.capacity if small else max(_FIRST, self.rows), self.capacity - self.rows)
        new = like.new_zeros(like.shape[0], more, self.vectors * like.shape[1])
        return replace(self, blocks=(new, *self.blocks) if self.backward else (*self.blocks, new))

    def one_block(self, rows: int, like: Flat) -> "HistoryBuffer":
        """The history as one block of `rows` rows, for a region of a compiled graph; rows cut off are not in use."""
        block = torch.cat((like.new_zeros(like.shape[0], 0, self.vectors * like.shape[1]), *self.blocks), dim=1)
        more = rows - block.shape[1]  # a negative number cuts rows off
        return replace(self, blocks=(pad(block, (0, 0, more, 0) if self.backward else (0, 0, 0, more)),))

    def part(self, first: int, end: int) -> Float[Tensor, "B P N"]:
        """Rows `first` to `end` - 1; a view if they lie in one block."""
        parts, start = [], 0
        for block in self.blocks:
            low, high = max(first - start, 0), min(end - start, block.shape[1])
            if low < high:
                parts.append(block[:, low:high])
            start += block.shape[1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def apart(self) -> "tuple[HistoryBuffer, ...]":
        """For each of the vectors of a row, the history of this vector, a view."""
        return self._views() if torch.compiler.is_compiling() else self._kept_views  # dynamo takes no cached property

    def _views(self) -> "tuple[HistoryBuffer, ...]":
        blocks = [block.chunk(self.vectors, dim=2) for block in self.blocks]
        return tuple([replace(self, vectors=1, blocks=views) for views in zip(*blocks, strict=True)])

    @cached_property
    def _kept_views(self) -> "tuple[HistoryBuffer, ...]":
        return self._views()

    @property
    def _keeps_views(self) -> bool:
        """Whether views are kept from step to step: rows are written in place. A view costs as much as an operator."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transforms_active())

    @cached_property
    def _rows(self) -> tuple[tuple[Flat, ...], ...]:
        return tuple([block.unbind(1) for block in self.blocks])

    @cached_property
    def _columns(self) -> tuple[Float[Tensor, "B N _"], ...]:
        return tuple([block.transpose(1, 2) for block in self.blocks])

    def set_differences(self, slot: Slot, *pairs: tuple[Flat, Flat]) -> "HistoryBuffer":
        """The history with the vectors of row `slot` replaced by the differences a - b of the pairs (a, b)."""
        i, place = (0, slot) if isinstance(slot, Tensor) else self._place(slot)
        if isinstance(place, Tensor) or torch.compiler.is_compiling() or not in_place(self.blocks[i], *chain(*pairs)):
            return self._with(i, put(self.blocks[i], place, torch.cat([a - b for a, b in pairs], dim=1)))
        for vector, (a, b) in zip(self.apart, pairs, strict=True):
            torch.sub(a, b, out=vector._rows[i][place] if self._keeps_views else vector.blocks[i][:, place])
        return self

    def set(self, slot: Slot, value: Flat) -> "HistoryBuffer":
        """The history with row `slot` replaced by `value`."""
        i, slot = (0, slot) if isinstance(slot, Tensor) else self._place(slot)
        if self._keeps_views and not isinstance(slot, Tensor):
            self._rows[i][slot].copy_(value)
            return self
        return self._with(i, put(self.blocks[i], slot, value))

    def set_rows(self, first: int, *values: Flat) -> "HistoryBuffer":
        """The history with the rows from `first` on, which lie in one block, replaced by some values."""
        i, first = self._place(first)
        block, end = self.blocks[i], first + len(values)
        if torch.compiler.is_compiling() or not in_place(block, *values):
            return self._with(i, torch.cat((block[:, :first], torch.stack(values, dim=1), block[:, end:]), dim=1))
        torch.stack(values, dim=1, out=block[:, first:end])
        return self

    def set_scaled_difference(self, row: int, other: int, count: int, scale: Float[Tensor, "B 1"]) -> "HistoryBuffer":
        """The history with the rows from `row` on replaced by `scale` times the rows from `other` on minus these.

        Both are `count` rows of one block.
        """
        new = self.part(other, other + count)
        i, row = self._place(row)
        block, end = self.blocks[i], row + count
        if torch.compiler.is_compiling() or not in_place(block, new, scale):
            value = (new - block[:, row:end]) * scale.unsqueeze(2)
            return self._with(i, torch.cat((block[:, :row], value, block[:, end:]), dim=1))
        torch.sub(new, block[:, row:end], out=block[:, row:end]).mul_(scale.unsqueeze(2))
        return self

    def dot(self, x: Flat) -> Coefficients:
        """<row_i, x> for every row."""
        if self._keeps_views:
            parts = [torch.bmm(x.unsqueeze(1), columns) for columns in self._columns]
        else:
            parts = [dots(block, x) for block in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def is_finite(self) -> Bool[Tensor, "B 1"]:
        """Whether all numbers of a sample are finite, for a history with rows."""
        parts = [block.isfinite().all(dim=2).all(dim=1, keepdim=True) for block in self.blocks]
        return torch.cat(parts, dim=1).all(dim=1, keepdim=True)

    def clear(self, mask: Bool[Tensor, "B 1"], first: int = 0, end: int | None = None) -> "HistoryBuffer":
        """The history with the rows from `first` to `end` - 1 of the samples in `mask` zero; by default all rows."""
        cleared, blocks = mask.unsqueeze(2), []
        for block in self.blocks:
            low, high = max(first, 0), block.shape[1] if end is None else min(end, block.shape[1])
            if low < high:
                if _may_clear(block, mask):  # a copy would double the memory of the history
                    block[:, low:high].masked_fill_(cleared, 0)
                else:
                    part = block[:, low:high].masked_fill(cleared, 0)
                    block = torch.cat((block[:, :low], part, block[:, high:]), dim=1)
            blocks.append(block)
            first, end = first - block.shape[1], None if end is None else end - block.shape[1]
        unchanged = all([new is old for new, old in zip(blocks, self.blocks, strict=True)])
        return self if unchanged else replace(self, blocks=tuple(blocks))

    def add(self, x: Flat, c: Coefficients, sign: int = 1, first: int = 0, stride: int = 1) -> Flat:
        """x + sign sum_i c_i row_{first + stride i}."""
        out, taken, start = x.unsqueeze(1), 0, first
        for block in self.blocks:
            count = min(-((start - block.shape[1]) // stride), c.shape[2] - taken)
            if count > 0:
                rows = block.narrow(1, start, count) if stride == 1 else block[:, start::stride][:, :count]
                part = c if count == c.shape[2] else c.narrow(2, taken, count)
                out = torch.baddbmm(out, part, rows, alpha=sign)
                taken += count
            start = (start - block.shape[1]) % stride if start < block.shape[1] else start - block.shape[1]
        return out.squeeze(1)
