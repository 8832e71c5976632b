"""Puzzles and answers as people read them: which cells are given, right and wrong, and what stands beside what."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.errors import printable
from hrm.tasks.base import Booleans, Rules, Solutions, Tokens, View

NO_TOKEN = -1  # in a panel, where a grid or a list has ended, or nothing is asked for
_LIST_COLUMNS = 20  # of what is no grid


class Cell(enum.IntEnum):
    """What there is to say of a cell."""

    GIVEN = 0
    RIGHT = 1
    WRONG = 2


class Panel(NamedTuple):
    """Cells in rows and columns."""

    caption: str
    tokens: NDArray[np.int64]  # [rows, columns], NO_TOKEN where there is none
    kinds: NDArray[np.int64]  # `Cell`, likewise


@dataclass(frozen=True)
class Board:
    """A puzzle and a model's answer to it, as tokens [S].

    Args:
        solution: the right answer, IGNORE_LABEL_ID where none is asked for; None where it is not known.
        broken: the cells [S] that break the rules; says what is wrong where no solution is known.
    """

    view: View
    inputs: Tokens
    answer: Tokens
    solution: Tokens | None = None
    broken: Booleans | None = None
    title: str = ""

    def wrong(self) -> Booleans:
        """Which cells [S] are wrong; of a coloured grid also those that it lacks, and that it has too many."""
        if self.solution is None:
            return np.zeros(len(self.inputs), dtype=np.bool_) if self.broken is None else self.broken
        if self.view.grid_sizes is None:
            wrong: Booleans = (self.answer != self.solution) & (self.solution != IGNORE_LABEL_ID)
            return wrong
        answered, asked = (self._in_grid(tokens) for tokens in (self.answer, self.solution))
        differs: Booleans = (answered != asked) | (answered & (self.answer != self.solution))
        return differs

    def cells(self) -> NDArray[np.int64]:
        """The `Cell` kind of every cell. A given one that the answer changed is wrong."""
        return np.where(self.wrong(), Cell.WRONG, np.where(self.view.given(self.inputs), Cell.GIVEN, Cell.RIGHT))

    def num_wrong(self) -> int:
        return int(self.wrong().sum())

    def num_asked(self) -> int:
        """Cells of the solution, or of the puzzle where it is not known."""
        if self.solution is None:
            return len(self.inputs)
        asked = self._in_grid(self.solution) if self.view.grid_sizes else self.solution != IGNORE_LABEL_ID
        return int(asked.sum())

    def _in_grid(self, tokens: Tokens) -> Booleans:
        """Which tokens [S] the coloured grid consists of that they show."""
        inside = np.zeros((len(tokens) // self.columns, self.columns), dtype=np.bool_)
        rows, columns = self._size(tokens)
        inside[:rows, :columns] = True
        return inside.reshape(-1)

    @property
    def columns(self) -> int:
        """Tokens in a row; of a list, as many as there is room for."""
        return self.view.columns or min(len(self.inputs), _LIST_COLUMNS)

    def _size(self, tokens: Tokens) -> tuple[int, int]:
        """Rows and columns of the grid that tokens [S] show."""
        if self.view.grid_sizes is None:
            return -(-len(tokens) // self.columns), self.columns
        rows, columns = self.view.grid_sizes(tokens[None])[0].tolist()
        return rows, columns

    def panels(self) -> list[Panel]:
        """What is drawn side by side: the answer over its input where that is filled in, else one beside the other."""
        kinds, plain = self.cells(), np.full(len(self.inputs), Cell.GIVEN)
        if self.view.blank is not None:
            return [self._panel("", self.answer, kinds)]
        of_input = self._panel("input", self.inputs, plain)
        if self.solution is None:
            return [of_input, self._panel("answer", self.answer, kinds)]
        kinds = np.where(self.wrong() | (self.solution != IGNORE_LABEL_ID), kinds, Cell.GIVEN)
        answer = self.answer
        if self.view.grid_sizes:
            answer = np.where(self._in_grid(answer), answer.astype(np.int64), NO_TOKEN)  # what it lacks is marked there
        of_solution = self._panel("truth", self.solution, plain)
        return [of_input, self._panel("answer", answer, kinds, least=self._size(self.solution)), of_solution]

    def _panel(self, name: str, tokens: Tokens, kinds: NDArray[np.int64], least: tuple[int, int] = (0, 0)) -> Panel:
        """Tokens [S] as a panel that shows their grid, and `least` rows and columns."""
        size = self._size(tokens)
        rows, columns = map(max, size, least)
        missing = -len(tokens) % self.columns  # at the end of a list
        square = np.pad(tokens.astype(np.int64), (0, missing), constant_values=NO_TOKEN).reshape(-1, self.columns)
        of_kind = np.pad(kinds, (0, missing), constant_values=Cell.GIVEN).reshape(-1, self.columns)
        caption = f"{name} {size[0]}x{size[1]}" if self.view.grid_sizes else name
        return Panel(caption, square[:rows, :columns], of_kind[:rows, :columns])

    def symbol(self, token: int) -> str:
        """What a token is written as; "." for one that has no symbol, " " where there is no token."""
        return (printable(self.view.symbols[token]) or ".") if token >= 0 else " "


def outcome_of(board: Board, rules: Rules | None, solutions: Solutions | None = None) -> str:
    """How good the answer is, in a sentence, and in another one what is odd about the puzzle.

    Args:
        solutions: what the search for the puzzle's right answers found, if there was one.
    """
    if wrong := board.num_wrong():
        odd = ""
        if solutions is not None and not solutions.answers:
            odd = " The puzzle has no solution." if solutions.is_complete else " No solution was found in time."
        return f"{wrong} of {board.num_asked()} cells are wrong.{odd}"
    if rules is None:
        return "Right in every cell." if board.solution is not None else "Nothing tells whether this is right."
    if solutions is not None and len(solutions.answers) < 2 and not solutions.is_complete:
        return "Solved; whether there is another solution was not found out in time."
    if rules.solve:
        return f"Solved: this is {'the only solution' if board.solution is not None else 'one of several solutions'}."
    if board.solution is None and not rules.keeps(board.inputs[None], board.answer[None]).all():
        return f"This is not {rules.result}."
    return f"Solved: this is {rules.result}."
