"""Puzzles and answers as pictures, of what `hrm.evaluation.report.boards` says is to be seen. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrm.errors import printable
from hrm.evaluation.report.boards import Board, Cell, Panel
from hrm.evaluation.report.picture import PALETTE, new_picture, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARC_COLORS = (
    *("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00"),
    *("#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25"),
)
"""Of ARC's colours 0 to 9, as its own pages show them."""

_RIGHT, _WRONG = PALETTE[:2]
_INK = {Cell.GIVEN: "black", Cell.RIGHT: _RIGHT, Cell.WRONG: _WRONG}
_IN_A_ROW = 4  # boards, or panels of boards that have several
_LEGENDS = {
    "over": "black: given      blue: filled in, right      orange, boxed: wrong",
    "beside": "blue: right      orange, boxed: wrong",
    "colors": "×: wrong      dashed: missing",
    "path": "line: path      ×: wrong      ring: path missed",
}


def draw_boards(boards: Sequence[Board], file: Path) -> None:
    """Draw boards of one task, whose puzzles are no lists, into a picture, up to four panels in a row."""
    panels = [board.panels() for board in boards]
    of_each = max(map(len, panels))
    columns = of_each * min(max(1, _IN_A_ROW // of_each), len(boards))
    rows = -(-len(boards) * of_each // columns)
    figure, all_axes = new_picture(rows, columns, size=(3.2 * columns, 3.4 * rows + 0.4))
    for axes in all_axes.flat:
        axes.set_axis_off()
    for number, board in enumerate(boards):
        for axes, panel in zip(all_axes.flat[number * of_each :], panels[number], strict=False):
            _draw(board, panel, axes)
    view = boards[0].view
    kind = view.drawing if view.drawing != "symbols" else "over" if view.blank is not None else "beside"
    figure.supxlabel(_LEGENDS[kind], fontsize="small")
    save_picture(figure, file)


def _draw(board: Board, panel: Panel, axes: Axes) -> None:
    {"symbols": _symbols, "path": _maze, "colors": _colors}[board.view.drawing](board, panel, axes)
    rows, columns = panel.tokens.shape
    axes.set_axis_on()
    title = "\n".join(
        filter(None, [board.title if panel.caption in ("", board.panels()[0].caption) else "", panel.caption])
    )
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[], title=title)
    axes.title.set_fontsize("medium")


def _lines(axes: Axes, rows: int, columns: int, box: tuple[int, int]) -> None:
    for line in range(rows + 1):
        axes.axhline(line, color="black", linewidth=1.8 if line % box[0] == 0 else 0.5)
    for line in range(columns + 1):
        axes.axvline(line, color="black", linewidth=1.8 if line % box[1] == 0 else 0.5)


def _symbols(board: Board, panel: Panel, axes: Axes) -> None:
    rows, columns = panel.tokens.shape
    width = max(len(printable(symbol)) for symbol in board.view.symbols)
    for (row, column), token in np.ndenumerate(panel.tokens.astype(object)):
        kind = Cell(int(panel.kinds[row, column]))
        frame = {"boxstyle": "square,pad=0.25", "facecolor": "none", "edgecolor": _INK[kind]}
        axes.text(
            column + 0.5,
            row + 0.5,
            board.symbol(token),
            ha="center",
            va="center",
            fontsize=54 / columns / width,
            color=_INK[kind],
            weight="bold" if kind is Cell.GIVEN else "normal",
            bbox=frame if kind is Cell.WRONG else None,
        )
    _lines(axes, rows, columns, board.view.box or (rows, columns))


def _colors(board: Board, panel: Panel, axes: Axes) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = panel.tokens.shape
    size = 110 / max(rows, columns, 3)  # points of a cell, about
    for (row, column), token in np.ndenumerate(panel.tokens.astype(object)):
        symbol = board.symbol(token)
        if symbol.isdecimal():
            fill = ARC_COLORS[int(symbol)]
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=fill, edgecolor="#555555", linewidth=0.4))
        if panel.kinds[row, column] != Cell.WRONG:
            continue
        if symbol.isdecimal():
            for color, thick in (("black", 0.16), ("white", 0.08)):
                axes.plot(
                    column + 0.5, row + 0.5, "x", color=color, markersize=0.45 * size, markeredgewidth=thick * size
                )
        else:
            axes.add_patch(Rectangle((column + 0.1, row + 0.1), 0.8, 0.8, fill=False, edgecolor=_WRONG, linestyle="--"))


def _maze(board: Board, panel: Panel, axes: Axes) -> None:
    rows, columns = panel.tokens.shape
    wall, start, goal, path = (board.view.symbols.index(symbol) for symbol in "#SGo")
    given, answer, wrong = (cells.reshape(rows, columns) for cells in (board.inputs, board.answer, board.wrong()))
    axes.imshow(given == wall, cmap="Greys", vmin=0, vmax=1.4, extent=(0, columns, rows, 0))
    way = np.isin(answer, (start, goal, path)) & ~wrong
    size = 190 / columns  # points of a cell, about
    for ahead, line in ((way[:, :-1] & way[:, 1:], (0, 1)), (way[:-1] & way[1:], (1, 0))):
        for row, column in np.argwhere(ahead).tolist():
            ends = (row, column), (row + line[0], column + line[1])
            if any(answer[end] == path for end in ends):
                ys, xs = zip(*ends, strict=True)
                axes.plot(_middle(xs), _middle(ys), color=_RIGHT, linewidth=0.3 * size, solid_capstyle="round")
    solution = None if board.solution is None else board.solution.reshape(rows, columns)
    for row, column in np.argwhere(wrong).tolist():
        missed = solution is not None and solution[row, column] == path
        look = {"markersize": 0.55 * size, "markeredgecolor": _WRONG, "markeredgewidth": 0.18 * size}
        axes.plot(column + 0.5, row + 0.5, "o" if missed else "x", markerfacecolor="none", **look)
    for token, name in ((start, "S"), (goal, "G")):
        for row, column in np.argwhere(given == token).tolist():
            look = {"ha": "center", "va": "center", "fontsize": 0.75 * size, "weight": "bold"}
            axes.text(column + 0.5, row + 0.5, name, **look)


def _middle(cells: Sequence[int]) -> NDArray[np.float64]:
    return np.array(cells) + 0.5
