"""Sudoku puzzles with unique solutions, 4 x 4 (boxes 2 x 2) and 6 x 6 (boxes 2 x 3), split for training and testing.

A grid holds the digits 1..n once in each row, column and box. A puzzle is a grid and a set of clues (visible cells)
with which no other grid agrees. A puzzle is minimal if it is no puzzle without any one of its clues. Relabeling the
digits preserves these properties, so grids and puzzles are counted up to relabeling; the representative has 1, 2, ...,
n in its first row. There are 288 = 12 x 4! grids of 4 x 4 and 28,200,960 = 39,168 x 6! of 6 x 6 (OEIS A107739).
"""

from dataclasses import dataclass

import numpy as np

BOXES = {4: (2, 2), 6: (2, 3)}  # rows and columns of a box


@dataclass(frozen=True)
class Puzzles:
    """Clues (P, n * n), 0 in empty cells, and solutions (P, n * n), of representatives."""

    clues: np.ndarray
    solutions: np.ndarray


def units(size: int) -> np.ndarray:
    """(3, n, n * n) booleans: whether a cell lies in a unit; the units are n rows, n columns and n boxes."""
    high, wide = BOXES[size]
    row, column = np.divmod(np.arange(size * size), size)
    box = row // high * (size // wide) + column // wide
    return np.stack([line == np.arange(size)[:, None] for line in (row, column, box)])


def solutions(clues: np.ndarray, limit: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Up to `limit` grids that agree with the clues, by backtracking on the cell with the fewest candidates.

    With a generator, candidates are tried in random order.
    """
    size = int(np.sqrt(len(clues)))
    member = units(size).reshape(3 * size, -1)
    around = [[int(u) for u in np.flatnonzero(member[:, cell])] for cell in range(size * size)]
    used = [0] * (3 * size)  # bit d of used[u]: digit d is taken in unit u
    grid, found = clues.astype(int).tolist(), []
    for cell, digit in enumerate(grid):
        for u in around[cell] if digit else ():
            used[u] |= 1 << digit

    def search() -> None:
        best, free = None, ()
        for cell, digit in enumerate(grid):
            if not digit:
                a, b, c = around[cell]
                taken = used[a] | used[b] | used[c]
                left = [d for d in range(1, size + 1) if not taken >> d & 1]
                if best is None or len(left) < len(free):
                    best, free = cell, left
        if best is None:
            found.append(np.array(grid))
            return
        for digit in rng.permutation(free).tolist() if rng else free:
            grid[best] = digit
            for u in around[best]:
                used[u] ^= 1 << digit
            search()
            for u in around[best]:
                used[u] ^= 1 << digit
            grid[best] = 0
            if len(found) >= limit:
                return

    search()
    return found


def minimal_clues(grids: np.ndarray) -> list[np.ndarray]:
    """All minimal clue sets of every 4 x 4 grid, (P, 16) booleans for each grid, found among all 2^16 sets of cells.

    A clue set determines a grid if it is no subset of the cells on which another grid agrees with this grid.
    """
    every = np.array(solutions(np.zeros(16, int), limit=288))
    bit = 1 << np.arange(16)
    subsets = np.arange(1 << 16)
    found = []
    for grid in grids:
        agree = ((every == grid) * bit).sum(1)
        unique = np.ones(1 << 16, bool)
        for cells in np.unique(agree[agree != (1 << 16) - 1]):
            unique &= (subsets & ~cells) != 0
        needed = [(subsets & b == 0) | ~unique[subsets & ~b] for b in bit]
        minimal = subsets[unique & np.all(needed, axis=0)]
        found.append((minimal[:, None] & bit) != 0)
    return found


def thinned(grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A minimal clue set (n * n,) of a grid: clues are removed in random order while the solution stays unique."""
    shown = np.ones(len(grid), bool)
    for cell in rng.permutation(len(grid)):
        shown[cell] = False
        if len(solutions(grid * shown, limit=2)) > 1:
            shown[cell] = True
    return shown


def splits(size: int, count: int, rng: np.random.Generator) -> dict[str, Puzzles]:
    """Minimal puzzles in three sets that share no puzzle up to relabeling.

    The sets are ``train``; ``unseen``, other clue sets of the training grids; and ``new``, puzzles whose solution, even
    relabeled, is that of no training puzzle. 4 x 4: all puzzles; `rng` draws a sixth of the grids for ``new``, and a
    sixth of the clue sets of the other grids for ``unseen``. 6 x 6: six clue sets for each of `count` random grids.
    """
    first = np.r_[1 : size + 1, np.zeros(size * (size - 1), int)]
    if size == 4:
        grids = np.array(solutions(first, limit=12))
        shown = minimal_clues(grids)
    else:
        grids = np.unique([solutions(first, 1, rng)[0] for _ in range(count)], axis=0)
        shown = [np.unique([thinned(grid, rng) for _ in range(6)], axis=0) for grid in grids]
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "unseen": [], "new": []}
    for i, g in enumerate(rng.permutation(len(grids))):
        sets = rng.permutation(shown[g])
        cut = len(sets) // 6
        for name, part in (("new", sets),) if i < len(grids) // 6 else (("unseen", sets[:cut]), ("train", sets[cut:])):
            found[name].append((part * grids[g], np.broadcast_to(grids[g], part.shape)))
    return {name: Puzzles(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in found.items()}


def relabeled(puzzles: Puzzles, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Clues and solutions of `count` random puzzles, each under a random permutation of its digits."""
    size, rows = int(puzzles.solutions.max()), rng.integers(len(puzzles.clues), size=count)
    names = rng.permuted(np.tile(np.arange(1, size + 1), (count, 1)), axis=1)
    names = np.concatenate([np.zeros((count, 1), int), names], axis=1)
    return np.take_along_axis(names, puzzles.clues[rows], 1), np.take_along_axis(names, puzzles.solutions[rows], 1)
