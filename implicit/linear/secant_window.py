"""The pairs of differences of a multisecant method, and their Gram matrix.

A slot is two rows, dF_i and dR_i, which a caller divides by about ||r_i|| so that pairs of different steps are of one
size. Slots are filled from the last to the first, so slots of growing number hold pairs of growing age, and the slot
before the newest pair holds the last point, f(z) and r. The rows r, dF, dR lie side by side, so that one product with
the window gives their products with all older rows. A full window is a ring of one slot more than it has pairs.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.linear.secant_systems import Systems
from implicit.pytree import Flat
from implicit.solvers.base import on_host
from implicit.solvers.history_buffer import HistoryBuffer, add_diagonal, clear_products, put_products


@dataclass(frozen=True)
class SecantWindow:
    """At most `pairs` pairs of (B, N) differences, and r.

    Attributes:
        pairs: number of pairs kept.
        rows: the rows of all slots.
        gram: products of every row with the older ones; those with newer rows are out of date.
        kept: at least as many of the newest pairs as are in use.
        newer: [i, j] whether the slot of age j is newer than that of age i + 1.
        signs: -1 and 0, which take products with dF to products with dZ = dF - dR.
        count: number of pairs added so far.
        whole: whether all pairs are in use; False if the host does not know.
    """

    pairs: int
    rows: HistoryBuffer
    gram: Float[Tensor, "B R R"]
    kept: Int[Tensor, "B 1"]
    newer: Bool[Tensor, "B K 1 1+K"]
    signs: Float[Tensor, "B 1 2 1"]
    count: int = 0
    whole: bool = True

    @classmethod
    def empty(cls, pairs: int, like: Flat) -> "SecantWindow":
        """A window without pairs for states like this one."""
        size = like.shape[0]
        signs = like.new_zeros(size, 1, 2, 1)
        signs[:, :, 0] = -1
        kept = torch.full((size, 1), 2**31, device=like.device)
        newer = torch.ones(size, pairs, 1, pairs + 1, dtype=torch.bool, device=like.device)
        newer = newer.transpose(1, 2).tril().transpose(1, 2)
        rows = HistoryBuffer(2 * pairs + 2, backward=True)
        return cls(pairs, rows, like.new_zeros(size, 0, 0), kept, newer, signs)

    @property
    def used(self) -> int:
        """Number of pairs in the window."""
        return min(self.count, self.pairs)

    @property
    def newest(self) -> int:
        """Slot of the newest pair."""
        return self.rows.rows // 2 - 1 - (self.count - 1) % (self.pairs + 1)

    def append(self, fz: Flat, r: Flat, scale: Float[Tensor, "B 1"]) -> "SecantWindow":
        """The window with the point f(z), r and `scale` times the pair of its differences to the last point."""
        window = replace(self, kept=self.kept if self.whole else self.kept + 1, count=self.count + 1)
        window = window.at_point(fz, r)
        rows = window.rows.set_scaled_difference(2 * window.newest, 2 * window._next, 2, scale)
        return window._with(rows, window.gram)._renew(3)

    def at_point(self, fz: Flat, r: Flat) -> "SecantWindow":
        """The window with another last point, but for its products."""
        rows, gram, had = self.rows.reserve(2 * min(self.count + 1, self.pairs + 1) - 1, r), self.gram, self.rows.rows
        if more := rows.rows - had:
            gram = torch.nn.functional.pad(gram, (more, 0, more, 0))
        window = self._with(rows, gram)
        return window._with(rows.set_rows(2 * window._next, fz, r), gram)

    def _with(self, rows: HistoryBuffer, gram: Float[Tensor, "B R R"]) -> "SecantWindow":
        """The window with these rows and products; itself if they were written in place."""
        return self if rows is self.rows and gram is self.gram else replace(self, rows=rows, gram=gram)

    def last(self, part: int) -> Flat:
        """f(z) of the last point, or r with `part` 1."""
        return self.rows.row(2 * self._next + part)

    def full(self, steps: int) -> "SecantWindow":
        """A window of the pairs after `steps` further ones; those that it lacks are marked as not in use."""
        count, kept = min(self.pairs, self.count + steps), self.kept.clamp_max(self.used)
        window = self.with_pairs(count)
        rows = window.rows.one_block(window.rows.capacity, window.last(0))
        more = rows.rows - window.rows.rows
        window = window._with(rows, torch.nn.functional.pad(window.gram, (more, 0, more, 0)))
        full = replace(window, kept=kept, count=count, whole=False)
        turn = 2 * (full._next - window._next)
        rows = replace(rows, blocks=(rows.blocks[0].roll(turn, 1),))
        return full._with(rows, window.gram.roll((turn, turn), (1, 2)))

    def with_pairs(self, pairs: int) -> "SecantWindow":
        """The window with a capacity of `pairs` pairs, which must not be less than `used`."""
        return replace(self, pairs=pairs, rows=replace(self.rows, capacity=2 * pairs + 2))

    def moved_up(self) -> "SecantWindow":
        """A full window with its slots moved up by one, without the oldest pair, so that `append` fills it again."""
        rows = replace(self.rows, blocks=(self.rows.blocks[0].roll(2, 1),))
        return replace(self, rows=rows, gram=self.gram.roll((2, 2), (1, 2)), count=self.count - 1)

    def written_into(self, window: "SecantWindow") -> "SecantWindow":
        """The numbers of this full window in the tensors of another one."""
        window.rows.blocks[0].copy_(self.rows.blocks[0])
        window.gram.copy_(self.gram)
        window.kept.copy_(self.kept)
        return window

    def resumed(self, fz: Flat, r: Flat) -> "SecantWindow":
        """The window with another last point, to mix its r with the pairs of earlier ones."""
        return self.at_point(fz, r)._renew(1)

    @property
    def _next(self) -> int:
        """Slot of the last point."""
        return self.rows.rows // 2 - 1 - self.count % (self.pairs + 1)

    def _renew(self, changed: int) -> "SecantWindow":
        """The window with new products of r and of the rows behind it, `changed` rows in all."""
        first = 2 * self._next + 1
        around = first + changed - self.rows.rows
        parts = [(first, first + changed)] if around <= 0 else [(first, first + 1), (0, around)]
        gram = self.gram
        for low, high in parts:
            gram = put_products(gram, low, self.rows.part(low, high), self.rows)
        return self._with(self.rows, gram)

    def squares(self) -> tuple[Any, Any, Any]:
        """||r||^2, and ||dF||^2 and ||dR||^2 of the newest pair, (B, 1) as `on_host` gives them."""
        (diagonal,) = on_host(self.gram.detach().diagonal(dim1=1, dim2=2))
        r, df = 2 * self.newest - 1, 2 * self.newest
        return diagonal[:, r, None], diagonal[:, df, None], diagonal[:, df + 1, None]

    def systems(self) -> Systems:
        """Products of dZ_i and dR_i with r and with dR_j, newest first."""
        turn, slots, gram = 2 * self._next, 1 + self.used, self.gram
        if self.count > self.pairs and turn:
            gram, turn = gram.roll((-turn, -turn), (1, 2)), 0
        # by slot: the point, then the pairs
        gram = gram.narrow(1, turn, 2 * slots).narrow(2, turn, 2 * slots).view(-1, slots, 2, slots, 2)
        # products of dF_i and dR_i with r and dR_j, taken from the newer one of the rows
        newer, older = gram[:, :, 1, 1:].permute(0, 2, 3, 1), gram[:, 1:, :, :, 1]
        by_dr = torch.where(self.newer[:, : slots - 1, :, :slots], newer, older)
        return torch.addcmul(by_dr, by_dr[:, :, 1:], self.signs)

    def drop(self, mask: Bool[Tensor, "B 1"]) -> "SecantWindow":
        """The window without the pairs of the samples in `mask`."""
        return replace(self, kept=self.kept.masked_fill(mask, 0), whole=False)

    def left_out(self) -> Bool[Tensor, "B K"]:
        """Which pairs are not in use, newest first."""
        return torch.arange(self.used, device=self.kept.device) >= self.kept

    def erase_newest(self, mask: Bool[Tensor, "B 1"]) -> "SecantWindow":
        """The window with the newest pair of the samples in `mask` zero, which gives it coefficient 0 in both systems.

        The square of its dR counts as 1, so that the systems are not singular.
        """
        first = 2 * self.newest
        gram = add_diagonal(clear_products(self.gram, mask, first, first + 2), mask, first + 1)
        return replace(self, rows=self.rows.clear(mask, first, first + 2), gram=gram)

    def products(self, x: Flat) -> Float[Tensor, "B K"]:
        """<dF_i, x>, newest first."""
        parts = [torch.bmm(x.unsqueeze(1), block[:, ::2].mT).squeeze(1) for block in self.rows.blocks]
        return self._newest_first(torch.cat(parts, dim=1))

    def _newest_first(self, of_slots: Tensor) -> Tensor:
        slot = self.newest
        if slot and self.count > self.pairs:
            of_slots, slot = of_slots.roll(-slot, 1), 0
        return of_slots[:, slot : slot + self.used]

    def add(self, x: Flat, c: Float[Tensor, "B K"], sign: int = 1, part: int = 0) -> Flat:
        """x + sign sum_i c_i dF_i, or dR_i with `part` 1; the pairs newest first."""
        slot, slots = self.newest, self.rows.rows // 2
        first = min(self.used, slots - slot)
        out = self.rows.add(x, c[:, :first].unsqueeze(1), sign, 2 * slot + part, 2)
        return out if first == self.used else self.rows.add(out, c[:, first:].unsqueeze(1), sign, part, 2)

    def clear(self, mask: Bool[Tensor, "B 1"]) -> "SecantWindow":
        """The window with all rows of the samples in `mask` zero, as `erase_newest` leaves them."""
        odd = (torch.arange(self.rows.rows, device=mask.device) % 2).to(self.gram.dtype)
        gram = torch.where(mask.unsqueeze(2), torch.diag(odd), self.gram)
        return replace(self, rows=self.rows.clear(mask), gram=gram)
