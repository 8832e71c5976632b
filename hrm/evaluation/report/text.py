"""Puzzles and answers on the terminal, in characters that say all, and in colour where there is any."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest

from hrm.errors import printable
from hrm.evaluation.report.boards import Board, Cell, Panel

# What a cell is written as stands between two marks, and gets these ANSI codes on a terminal.
_MARKS = {Cell.GIVEN: (" ", " "), Cell.RIGHT: ("·", "·"), Cell.WRONG: ("[", "]")}
_ANSI = {Cell.GIVEN: "1", Cell.RIGHT: "34", Cell.WRONG: "31;7"}
LEGEND = " 5  given   ·5· filled in, right   [5] wrong"
LEGEND_OF_RULES = " 5  given   ·5· filled in   [5] against the rules"
LEGEND_WITHOUT_RULES = " 5  given   ·5· filled in"
LEGEND_BESIDE = "·5· right   [5] wrong"
LEGEND_BESIDE_UNKNOWN = "·5· of the answer"

# Coloured grids: two characters a cell, on the nearest to ARC's colours among the 256 that terminals have.
_BACKGROUNDS = (16, 32, 203, 41, 220, 248, 200, 208, 117, 88)
_DARK = frozenset({0, 1, 6, 9})  # colours that white is read on
LEGEND_OF_COLORS = " 5 right   ×5 wrong   ×· missing"
LEGEND_OF_COLORS_UNKNOWN = "0 to 9: colours"

# Mazes: two characters a cell.
_WALL, _WAY, _WRONG_WAY, _MISSED, _CHANGED = "██", "••", "××", "○○", "??"
_MAZE_ANSI = {_WAY: "34", _WRONG_WAY: "31;7", _MISSED: "31", _CHANGED: "31;7", _WALL: "90"}
LEGEND_OF_MAZES = f"{_WALL} wall   {_WAY} path   {_WRONG_WAY} path, wrong   {_MISSED} path missed   {_CHANGED} changed"
LEGEND_OF_MAZES_UNKNOWN = f"{_WALL} wall   {_WAY} path   {_WRONG_WAY} path through a wall   {_CHANGED} changed"


def legend_of(board: Board) -> str:
    """What the marks of `render_text` mean: nothing is called right where no solution is known."""
    known = board.solution is not None
    if board.view.drawing == "path":
        return LEGEND_OF_MAZES if known else LEGEND_OF_MAZES_UNKNOWN
    if board.view.drawing == "colors":
        return LEGEND_OF_COLORS if known else LEGEND_OF_COLORS_UNKNOWN
    if board.view.blank is None:
        return LEGEND_BESIDE if known else LEGEND_BESIDE_UNKNOWN
    if known:
        return LEGEND
    return LEGEND_WITHOUT_RULES if board.broken is None else LEGEND_OF_RULES


def render_text(board: Board, *, color: bool | None = None, width: int | None = None) -> str:
    """A puzzle and its answer in box-drawing characters, a line per row.

    Args:
        color: whether to add ANSI codes; by default on a terminal, unless NO_COLOR is set.
        width: characters in a line; grids that do not fit into it side by side stand one below the other. By default
            those of the terminal, 80 where there is none.
    """
    if color is None:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if width is None:
        width = shutil.get_terminal_size().columns
    draw = {"symbols": _symbols, "path": _maze, "colors": _colors}[board.view.drawing]
    blocks = []
    for panel in board.panels():
        lines, across = draw(board, panel, color)
        widest = max(across, len(panel.caption))
        padded = [line + " " * (widest - across) for line in lines]
        blocks.append(([panel.caption.ljust(widest), *padded] if panel.caption else padded, widest))
    return "\n".join([*([board.title] if board.title else []), *_beside(blocks, width)])


def _beside(blocks: Sequence[tuple[list[str], int]], width: int) -> list[str]:
    """Blocks of lines, of so many characters each, side by side where they fit."""
    gap = "   "
    if sum(across + len(gap) for _, across in blocks) - len(gap) > width:
        return [line.rstrip() for lines, _ in blocks for line in lines]
    rows = zip_longest(*(lines for lines, _ in blocks))
    return [
        gap.join(" " * across if line is None else line for line, (_, across) in zip(row, blocks, strict=True)).rstrip()
        for row in rows
    ]


def _colored(text: str, codes: str, color: bool) -> str:
    return f"\x1b[{codes}m{text}\x1b[0m" if color else text


def _symbols(board: Board, panel: Panel, color: bool) -> tuple[list[str], int]:
    """The lines of a panel of symbols, and how many characters each takes."""
    rows, columns = panel.tokens.shape
    box_rows, box_columns = board.view.box or (rows, columns)
    size = max(len(printable(symbol)) for symbol in board.view.symbols)
    rule = "─" * ((2 + size) * box_columns)
    stacks = -(-columns // box_columns)
    top, middle, bottom = (left + cross.join([rule] * stacks) + right for left, cross, right in ("┌┬┐", "├┼┤", "└┴┘"))
    lines = [top]
    for row, (tokens, kinds) in enumerate(zip(panel.tokens.tolist(), panel.kinds.tolist(), strict=True)):
        if row and row % box_rows == 0:
            lines.append(middle)
        cells = [_cell(board, token, Cell(kind), size, color) for token, kind in zip(tokens, kinds, strict=True)]
        of_stacks = ["".join(cells[first : first + box_columns]) for first in range(0, columns, box_columns)]
        lines.append("│" + "│".join(of_stacks) + "│")
    return [*lines, bottom], len(top)


def _cell(board: Board, token: int, kind: Cell, size: int, color: bool) -> str:
    # A cell that may stay blank needs no mark for it.
    left, right = _MARKS[Cell.GIVEN if kind is Cell.RIGHT and token == board.view.blank else kind]
    return _colored(f"{left}{board.symbol(token):^{size}}{right}", _ANSI[kind], color)


def _colors(board: Board, panel: Panel, color: bool) -> tuple[list[str], int]:
    """The same of a coloured grid."""
    lines = []
    for tokens, kinds in zip(panel.tokens.tolist(), panel.kinds.tolist(), strict=True):
        cells = []
        for token, kind in zip(tokens, kinds, strict=True):
            mark = "×" if kind == Cell.WRONG else " "
            symbol = board.symbol(token)
            if not symbol.isdecimal():
                cells.append(_colored("×·" if kind == Cell.WRONG else "  ", "31", color and kind == Cell.WRONG))
                continue
            ink = 97 if int(symbol) in _DARK else 30
            cells.append(_colored(f"{mark}{symbol}", f"48;5;{_BACKGROUNDS[int(symbol)]};{ink}", color))
        lines.append("".join(cells))
    return lines, 2 * panel.tokens.shape[1]


def _maze(board: Board, panel: Panel, color: bool) -> tuple[list[str], int]:
    """The same of a maze and the path that is the answer."""
    columns = panel.tokens.shape[1]
    given, answered = ([board.symbol(token) for token in tokens] for tokens in (board.inputs, board.answer))
    wanted = [""] * len(given) if board.solution is None else [board.symbol(token) for token in board.solution]
    wrong = board.wrong()
    texts = [_maze_cell(*of_cell) for of_cell in zip(given, answered, wanted, wrong, strict=True)]
    cells = [_colored(text, _MAZE_ANSI.get(text, "1"), color and text.strip() != "") for text in texts]
    lines = ["│" + "".join(cells[start : start + columns]) + "│" for start in range(0, len(cells), columns)]
    rule = "─" * (2 * columns)
    return [f"┌{rule}┐", *lines, f"└{rule}┘"], 2 * columns + 2


def _maze_cell(given: str, answered: str, wanted: str, wrong: bool) -> str:
    if wanted == "o" and wrong:
        return _MISSED
    if answered == "o":
        return _WRONG_WAY if wrong or given != " " else _WAY
    if answered != given:
        return _CHANGED
    return _WALL if given == "#" else f"{given} "
