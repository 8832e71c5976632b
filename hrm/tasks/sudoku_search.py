"""The solutions of one Sudoku board, also of the odd boards that people type: with none, with many, or hardly filled.

The board is an exact cover: every cell takes one digit, and every row, column and box takes each digit once. Knuth's
Algorithm X (2000, arXiv cs/0011047) settles first what has the fewest ways left, be it the digit of a cell or the place
of a digit. The solver of many boards at once looks at cells only, which is fast for boards with one solution, but takes
hours to find that there is none where a digit has no place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hrm.tasks.base import Solutions
from hrm.tasks.sudoku import BoxShape, Grids

SECONDS = 10.0
"""How long to look for the solutions of a board; hard ones with one take hundredths of a second."""

_CHECK_EVERY = 256  # choices between two looks at the clock


class _OutOfTime(Exception):
    pass


def find_solutions(puzzle: Grids, shape: BoxShape, limit: int = 2, seconds: float = SECONDS) -> Solutions:
    """The first `limit` solutions of a board `[cells]`, or those found within `seconds`, as digits."""
    search = _Search(puzzle, shape, time.monotonic() + seconds)
    grids: list[Grids] = []
    try:
        for grid in search.solutions():
            grids.append(grid)
            if len(grids) == limit:
                return Solutions(grids, is_complete=False)
    except _OutOfTime:
        return Solutions(grids, is_complete=False)
    return Solutions(grids, is_complete=True)


class _Search:
    """Algorithm X over sets: what is still to be settled, by the placements that would settle it."""

    def __init__(self, puzzle: Grids, shape: BoxShape, deadline: float) -> None:
        self._shape = shape
        self._deadline = deadline
        self._choices = 0
        side, cells = shape.side, shape.cells
        self._settles: dict[int, tuple[int, ...]] = {}  # by placement, cell * side + digit: what it settles
        self._open: dict[int, set[int]] = {}  # by what is to be settled: the placements that are left for it
        for cell in range(cells):
            row, column = divmod(cell, side)
            box = row // shape.rows * shape.rows + column // shape.cols
            for digit in range(side):
                units = (cells * kind + unit * side + digit for kind, unit in enumerate((row, column, box), start=1))
                placement = cell * side + digit
                self._settles[placement] = (cell, *units)
                for item in self._settles[placement]:
                    self._open.setdefault(item, set()).add(placement)
        self._placed = [cell * side + int(puzzle[cell]) - 1 for cell in np.flatnonzero(puzzle).tolist()]
        # A given that another one rules out leaves the board without solution.
        self._is_possible = all(self._can_place(placement) for placement in self._placed)

    def _can_place(self, placement: int) -> bool:
        if any(item not in self._open for item in self._settles[placement]):
            return False
        self._place(placement)
        return True

    def solutions(self) -> Iterator[Grids]:
        """All of them, one after the other.

        Raises:
            _OutOfTime: the time is up.
        """
        if self._is_possible:
            yield from self._solutions()

    def _solutions(self) -> Iterator[Grids]:
        self._choices += 1
        if self._choices % _CHECK_EVERY == 0 and time.monotonic() > self._deadline:
            raise _OutOfTime
        if not self._open:
            yield self._grid()
            return
        item = min(self._open, key=lambda item: len(self._open[item]))
        for placement in sorted(self._open[item]):
            removed = self._place(placement)
            self._placed.append(placement)
            yield from self._solutions()
            self._placed.pop()
            self._take_back(placement, removed)

    def _place(self, placement: int) -> list[set[int]]:
        """Settle what a placement settles, and drop the placements that this rules out."""
        removed = []
        for item in self._settles[placement]:
            for other in self._open[item]:
                for theirs in self._settles[other]:
                    if theirs != item:
                        self._open[theirs].remove(other)
            removed.append(self._open.pop(item))
        return removed

    def _take_back(self, placement: int, removed: list[set[int]]) -> None:
        for item in reversed(self._settles[placement]):
            self._open[item] = removed.pop()
            for other in self._open[item]:
                for theirs in self._settles[other]:
                    if theirs != item:
                        self._open[theirs].add(other)

    def _grid(self) -> Grids:
        grid = np.zeros(self._shape.cells, dtype=np.uint8)
        for placement in self._placed:
            cell, digit = divmod(placement, self._shape.side)
            grid[cell] = digit + 1
        return grid
