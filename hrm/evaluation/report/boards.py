"""Puzzles that are filled in, as people read them: given, right and wrong cells told apart, with or without colour."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.errors import printable
from hrm.evaluation.report.picture import new_picture, save_picture
from hrm.tasks.base import Booleans, Rules, Solutions, Tokens, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Cell(enum.IntEnum):
    GIVEN = 0
    RIGHT = 1
    WRONG = 2


# What a cell is written as stands between two marks, and gets these ANSI codes on a terminal.
_MARKS = {Cell.GIVEN: (" ", " "), Cell.RIGHT: ("·", "·"), Cell.WRONG: ("[", "]")}
_ANSI = {Cell.GIVEN: "1", Cell.RIGHT: "34", Cell.WRONG: "31;7"}
LEGEND = " 5  given   ·5· filled in, right   [5] wrong"
LEGEND_OF_RULES = " 5  given   ·5· filled in   [5] against the rules"
LEGEND_WITHOUT_RULES = " 5  given   ·5· filled in"

# Blue and vermilion of Okabe and Ito's palette, told apart under every common colour vision.
_INK = {Cell.GIVEN: "black", Cell.RIGHT: "#0072B2", Cell.WRONG: "#D55E00"}


@dataclass(frozen=True)
class Board:
    """A puzzle and a model's answer to it, as tokens [S].

    Args:
        view: with `columns` and a `blank`.
        solution: the right answer, IGNORE_LABEL_ID where none is asked for; None where it is not known.
        broken: the cells [S] that break the rules; says what is wrong where no solution is known.
    """

    view: View
    inputs: Tokens
    answer: Tokens
    solution: Tokens | None = None
    broken: Booleans | None = None
    title: str = ""

    @property
    def columns(self) -> int:
        assert self.view.columns is not None
        return self.view.columns

    @property
    def box(self) -> tuple[int, int]:
        """Rows and columns between thick lines."""
        return self.view.box or (-(-len(self.inputs) // self.columns), self.columns)

    def cells(self) -> NDArray[np.int64]:
        """The `Cell` kind of every cell. A given one that the answer changed is wrong."""
        if self.solution is not None:
            wrong = (self.answer != self.solution) & (self.solution != IGNORE_LABEL_ID)
        else:
            wrong = np.zeros(len(self.inputs), dtype=np.bool_) if self.broken is None else self.broken
        return np.where(wrong, Cell.WRONG, np.where(self.view.given(self.inputs), Cell.GIVEN, Cell.RIGHT))

    def legend(self) -> str:
        """What the marks of `render_text` mean: nothing is called right where no solution is known."""
        if self.solution is not None:
            return LEGEND
        return LEGEND_WITHOUT_RULES if self.broken is None else LEGEND_OF_RULES

    def num_wrong(self) -> int:
        return int((self.cells() == Cell.WRONG).sum())

    def symbol(self, index: int) -> str:
        return printable(self.view.symbols[self.answer[index]]) or "."

    def is_left_blank(self, index: int) -> bool:
        return bool(self.answer[index] == self.view.blank)


def outcome_of(board: Board, rules: Rules | None, solutions: Solutions | None = None) -> str:
    """How good the answer is, in a sentence, and in another one what is odd about the puzzle.

    Args:
        solutions: what the search for the puzzle's right answers found, if there was one.
    """
    if wrong := board.num_wrong():
        odd = ""
        if solutions is not None and not solutions.answers:
            odd = " The puzzle has no solution." if solutions.is_complete else " No solution was found in time."
        return f"{wrong} of {len(board.inputs)} cells are wrong.{odd}"
    if rules is None:
        return "Right in every cell." if board.solution is not None else "Nothing tells whether this is right."
    if solutions is not None and len(solutions.answers) < 2 and not solutions.is_complete:
        return "Solved; whether there is another solution was not found out in time."
    if rules.solve:
        return f"Solved: this is {'the only solution' if board.solution is not None else 'one of several solutions'}."
    if board.solution is None and not rules.keeps(board.inputs[None], board.answer[None]).all():
        return f"This is not {rules.result}."
    return f"Solved: this is {rules.result}."


def render_text(board: Board, *, color: bool | None = None) -> str:
    """The board in box-drawing characters, a line per row.

    Args:
        color: whether to add ANSI codes; by default on a terminal, unless NO_COLOR is set.
    """
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    (box_rows, box_cols), columns = board.box, board.columns
    width = max(len(printable(symbol)) for symbol in board.view.symbols)
    rule = "─" * ((2 + width) * box_cols)
    stacks = -(-columns // box_cols)
    top, middle, bottom = (left + cross.join([rule] * stacks) + right for left, cross, right in ("┌┬┐", "├┼┤", "└┴┘"))
    texts = [_cell_text(board, index, Cell(kind), width, color) for index, kind in enumerate(board.cells())]
    lines = [top]
    for row, start in enumerate(range(0, len(texts), columns)):
        if row and row % box_rows == 0:
            lines.append(middle)
        cells = texts[start : start + columns]
        of_stacks = ["".join(cells[first : first + box_cols]) for first in range(0, columns, box_cols)]
        lines.append("│" + "│".join(of_stacks) + "│")
    return "\n".join([*([board.title] if board.title else []), *lines, bottom])


def _cell_text(board: Board, index: int, kind: Cell, width: int, color: bool) -> str:
    # A cell that may stay blank needs no mark for it.
    left, right = _MARKS[Cell.GIVEN if kind is Cell.RIGHT and board.is_left_blank(index) else kind]
    text = f"{left}{board.symbol(index):^{width}}{right}"
    return f"\x1b[{_ANSI[kind]}m{text}\x1b[0m" if color else text


def draw_boards(boards: Sequence[Board], file: Path) -> None:
    """Draw boards into a picture, up to four in a row. Needs matplotlib."""
    columns = min(4, len(boards))
    rows = -(-len(boards) // columns)
    figure, all_axes = new_picture(rows, columns, size=(3.2 * columns, 3.4 * rows + 0.4))
    for board, axes in zip_longest(boards, all_axes.flat):
        if board is None:
            axes.set_axis_off()
        else:
            _draw(board, axes)
    legend = "black: given      blue: filled in, right      orange, boxed: wrong"
    figure.supxlabel(legend, fontsize="small")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    save_picture(figure, file)


def _draw(board: Board, axes: Axes) -> None:
    (box_rows, box_cols), columns = board.box, board.columns
    rows = -(-len(board.inputs) // columns)
    width = max(len(printable(symbol)) for symbol in board.view.symbols)
    for index, kind in enumerate(map(Cell, board.cells())):
        row, column = divmod(index, columns)
        frame = {"boxstyle": "square,pad=0.25", "facecolor": "none", "edgecolor": _INK[kind]}
        axes.text(
            column + 0.5,
            row + 0.5,
            board.symbol(index),
            ha="center",
            va="center",
            fontsize=54 / columns / width,
            color=_INK[kind],
            weight="bold" if kind is Cell.GIVEN else "normal",
            bbox=frame if kind is Cell.WRONG else None,
        )
    for line in range(rows + 1):
        axes.axhline(line, color="black", linewidth=1.8 if line % box_rows == 0 else 0.5)
    for line in range(columns + 1):
        axes.axvline(line, color="black", linewidth=1.8 if line % box_cols == 0 else 0.5)
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[], title=board.title)
    axes.title.set_fontsize("medium")
