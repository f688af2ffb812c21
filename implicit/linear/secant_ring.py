"""The window of a multisecant method with its position as a tensor, so that all steps have the same operators.

One region of a compiled graph then serves all steps (`implicit.loop.step_region`): the small systems have the size of
the window at the end of the solve, and the pairs that are not there yet are left out of them.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from implicit.linear.secant_window import SecantWindow
from implicit.pytree import Flat
from implicit.solvers.history_buffer import Slot, position


@dataclass(frozen=True)
class SecantRing(SecantWindow):
    """A window in one block, which is written in place, as are the tensors beside it.

    Attributes:
        added: `count` of the steps so far; `count` is that of the end.
        order: the rows f(z) and r of the last point, then dF and dR of all slots, the newest first.
    """

    added: Int[Tensor, "1"] = field(kw_only=True)
    order: Int[Tensor, " R"] = field(kw_only=True)

    @classmethod
    def of(cls, window: SecantWindow, steps: int) -> "SecantRing | None":
        """The window for so many further pairs; None if it has other blocks yet to come."""
        if len(window.rows.blocks) > 1 or window.rows.rows < window.rows.capacity:
            return None
        w, kept = window, window.kept.clamp_max(window.count)  # no pair that is yet to come
        added, order = position(w.count, w.gram), torch.arange(w.rows.rows, device=w.gram.device).roll(-2 * w._next)
        return cls(w.pairs, w.rows, w.gram, kept, w.newer, w.signs, w.count + steps, False, added=added, order=order)

    def window(self) -> SecantWindow:
        """The window after these pairs."""
        w = self
        return SecantWindow(w.pairs, w.rows, w.gram, w.kept, w.newer, w.signs, w.count, w.whole)

    @property
    def pairs_added(self) -> Slot:
        return self.added

    def append(self, fz: Flat, r: Flat, scale: Float[Tensor, "B 1"]) -> "SecantRing":
        rows, point = self.rows.blocks[0], torch.stack((fz, r), dim=1)
        pair = (point - rows.index_select(1, self.order[:2])) * scale.unsqueeze(2)
        self.added.add_(1)
        self.kept.add_(1)
        self.order.copy_(self.order.roll(2))
        rows.index_copy_(1, self.order[:4], torch.cat((point, pair), dim=1))
        products = torch.bmm(torch.cat((point[:, 1:], pair), dim=1), rows.transpose(1, 2))
        self.gram.index_copy_(1, self.order[1:4], products)
        return self

    def squares(self) -> tuple[Tensor, Tensor, Tensor]:
        r, df, dr = self.gram.diagonal(dim1=1, dim2=2).index_select(1, self.order[1:4]).split(1, dim=1)
        return r, df, dr

    def _by_age(self) -> Float[Tensor, "B P P"]:
        order = self.order[: 2 * (1 + self.used)]
        return self.gram.index_select(1, order).index_select(2, order)

    def drop(self, mask: Bool[Tensor, "B 1"]) -> "SecantRing":
        self.kept.masked_fill_(mask, 0)
        return self

    def erase_newest(self, mask: Bool[Tensor, "B 1"]) -> "SecantRing":
        pair, rows, mask = self.order[2:4], torch.arange(self.rows.rows, device=mask.device), mask.unsqueeze(2)
        mine = (rows == pair[0]) | (rows == pair[1])
        self.rows.blocks[0].masked_fill_(mine.unsqueeze(1) & mask, 0)
        self.gram.masked_fill_((mine | mine.unsqueeze(1)) & mask, 0)
        self.gram.masked_fill_(((rows == pair[1]) & (rows == pair[1]).unsqueeze(1)) & mask, 1)
        return self

    def add(self, x: Flat, c: Float[Tensor, "B K"], sign: int = 1, part: int = 0) -> Flat:
        # the slot of the last point, and those that hold no pair yet, have coefficient 0
        slots = self.pairs + 1
        age = (torch.arange(slots, device=c.device) - self.pairs - 1 + self.added) % slots
        c = torch.nn.functional.pad(c, (0, slots - c.shape[1])).index_select(1, age)
        return self.rows.add(x, c.unsqueeze(1), sign, part, 2)
