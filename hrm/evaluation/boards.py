"""Sudoku boards as people read them: given, right and wrong cells told apart, with or without colour."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrm.tasks.sudoku import BoxShape, Grids, conflicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Cell(enum.IntEnum):
    GIVEN = 0
    RIGHT = 1
    WRONG = 2


# A cell's digit between two marks, and the ANSI codes it gets on a terminal.
_MARKS = {Cell.GIVEN: (" ", " "), Cell.RIGHT: ("·", "·"), Cell.WRONG: ("[", "]")}
_ANSI = {Cell.GIVEN: "1", Cell.RIGHT: "34", Cell.WRONG: "31;7"}
LEGEND = " 5  given   ·5· filled in, right   [5] wrong"

# Blue and vermilion of Okabe and Ito's palette, told apart under every common colour vision.
_INK = {Cell.GIVEN: "black", Cell.RIGHT: "#0072B2", Cell.WRONG: "#D55E00"}


@dataclass(frozen=True)
class Board:
    """A puzzle and a model's answer to it, each `[cells]` digits with 0 for a blank.

    `solution` is the puzzle's, or None where it is not known: then only the rules can find cells wrong.
    """

    puzzle: Grids
    answer: Grids
    solution: Grids | None
    title: str = ""

    @property
    def shape(self) -> BoxShape:
        return BoxShape.from_cells(len(self.puzzle))

    def cells(self) -> NDArray[np.int64]:
        """The `Cell` kind of every cell. A given digit that the answer changed is wrong."""
        given = self.puzzle > 0
        if self.solution is not None:
            wrong = self.answer != self.solution
        else:
            wrong = (self.answer == 0) | (given & (self.answer != self.puzzle))
            wrong |= conflicts(self.answer, self.shape) & ~given
        return np.where(wrong, Cell.WRONG, np.where(given, Cell.GIVEN, Cell.RIGHT))

    def num_wrong(self) -> int:
        return int((self.cells() == Cell.WRONG).sum())


def render_text(board: Board, *, color: bool) -> str:
    """The board in box-drawing characters, a line per row; `color` adds ANSI codes for a terminal."""
    shape = board.shape
    rule = "─" * (3 * shape.cols)
    top, middle, bottom = (
        left + cross.join([rule] * shape.rows) + right for left, cross, right in ("┌┬┐", "├┼┤", "└┴┘")
    )
    kinds = board.cells().reshape(shape.side, shape.side)
    answer = board.answer.reshape(shape.side, shape.side)
    lines = [top]
    for row in range(shape.side):
        if row and row % shape.rows == 0:
            lines.append(middle)
        cells = [_cell_text(int(answer[row, column]), Cell(kinds[row, column]), color) for column in range(shape.side)]
        stacks = ["".join(cells[start : start + shape.cols]) for start in range(0, shape.side, shape.cols)]
        lines.append("│" + "│".join(stacks) + "│")
    return "\n".join([*([board.title] if board.title else []), *lines, bottom])


def _cell_text(digit: int, kind: Cell, color: bool) -> str:
    left, right = _MARKS[kind]
    text = f"{left}{digit or '.'}{right}"
    return f"\x1b[{_ANSI[kind]}m{text}\x1b[0m" if color else text


def draw_boards(boards: Sequence[Board], file: Path) -> None:
    """Draw boards into a picture, up to four in a row. Needs matplotlib."""
    from hrm.evaluation.plots import pyplot

    columns = min(4, len(boards))
    rows = -(-len(boards) // columns)
    figure, all_axes = pyplot().subplots(
        rows, columns, figsize=(3.2 * columns, 3.4 * rows + 0.4), squeeze=False, layout="constrained"
    )
    for board, axes in zip_longest(boards, all_axes.flat):
        if board is None:
            axes.set_axis_off()
        else:
            _draw(board, axes)
    legend = "black: given      blue: filled in, right      orange, boxed: wrong"
    figure.supxlabel(legend, fontsize="small")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    figure.savefig(file, dpi=150)
    pyplot().close(figure)


def _draw(board: Board, axes: Axes) -> None:
    shape = board.shape
    for index, kind in enumerate(map(Cell, board.cells())):
        row, column = divmod(index, shape.side)
        digit = int(board.answer[index])
        box = {"boxstyle": "square,pad=0.25", "facecolor": "none", "edgecolor": _INK[kind]}
        axes.text(
            column + 0.5,
            row + 0.5,
            str(digit) if digit else ".",
            ha="center",
            va="center",
            fontsize=54 / shape.side,
            color=_INK[kind],
            weight="bold" if kind is Cell.GIVEN else "normal",
            bbox=box if kind is Cell.WRONG else None,
        )
    for line in range(shape.side + 1):
        axes.axhline(line, color="black", linewidth=1.8 if line % shape.rows == 0 else 0.5)
        axes.axvline(line, color="black", linewidth=1.8 if line % shape.cols == 0 else 0.5)
    axes.set(xlim=(0, shape.side), ylim=(shape.side, 0), aspect="equal", xticks=[], yticks=[], title=board.title)
    axes.title.set_fontsize("medium")
