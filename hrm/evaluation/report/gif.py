"""A puzzle's trajectory as an animated GIF: a frame for every ACT step, the last one shown longer. Needs Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.config.paths import install_hint
from hrm.errors import UserError
from hrm.evaluation.report.drawings import ARC_COLORS
from hrm.evaluation.report.recorder import Trajectories, kinds
from hrm.tasks.base import View
from hrm.writing import new_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

_SIDE = 384  # pixels of the board, about; a cell is a whole number of them
_MARGIN = 16
_CAPTION = 40
_FINER = 3  # drawn so many times as large and scaled down, which smooths edges

_PAPER, _INK, _GIVEN, _LINE = "#ffffff", "#1c1c1a", "#efede6", "#c9c7bf"
_TINT, _RIGHT, _WRONG = "#dcebfa", "#0a5fb4", "#b5430b"


def require_pillow() -> None:
    """UserError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UserError(f"GIFs need Pillow: {install_hint('report')}.") from error


def write_gifs(folder: Path, shown: Trajectories, view: View) -> list[Path]:
    """One puzzle of each kind as `slow.gif`, `right.gif` and `wrong.gif`, those there are; see `write_gif`."""
    written = []
    for kind, rows in kinds(shown.scores, 1).items():
        for row in rows.tolist():
            written.append(folder / f"{kind}.gif")
            write_gif(written[-1], shown, row, view)
    return written


def write_gif(file: Path, shown: Trajectories, row: int, view: View, *, seconds: float = 0.6) -> None:
    """Draw one of the puzzles shown, `seconds` a step.

    Puzzles look as in the report: the same marks say what is given, wrong and just changed. Coloured grids are all
    drawn to the scale of the largest. Sequences that are no grid are laid out in a square.

    Raises:
        UserError: Pillow is not installed, or the file cannot be written.
    """
    require_pillow()
    import PIL.Image

    frames = [_frame(shown, row, view, step) for step in range(1, len(shown.answers) + 1)]
    # One palette for all frames, so that no colour flickers. The most different colours, not the most frequent: white
    # stays white, and a few marks keep their colour.
    sheet = PIL.Image.new("RGB", (frames[0].width, len(frames) * frames[0].height))
    for number, frame in enumerate(frames):
        sheet.paste(frame, (0, number * frame.height))
    palette = sheet.quantize(128, PIL.Image.Quantize.MAXCOVERAGE)
    indexed = [frame.quantize(palette=palette, dither=PIL.Image.Dither.NONE) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(4000 * seconds)]
    with new_file(file):
        indexed[0].save(file, save_all=True, append_images=indexed[1:], duration=durations, loop=0, disposal=1)


def _frame(shown: Trajectories, row: int, view: View, step: int) -> Image:
    """The board after a step, and a line about it."""
    import PIL.Image
    import PIL.ImageDraw

    rows, cols = _shape(shown, row, view)
    cell = max(_SIDE // max(rows, cols), 4) * _FINER
    margin, caption = _MARGIN * _FINER, _CAPTION * _FINER
    # As wide as the line about it needs, however narrow the grid.
    width = max(cols * cell, 200 * _FINER) + 2 * margin
    image = PIL.Image.new("RGB", (width, rows * cell + 2 * margin + caption), _PAPER)
    pen = _Pen(PIL.ImageDraw.Draw(image), cell, (width - cols * cell) // 2, margin)
    draw = {"symbols": _draw_symbols, "path": _draw_path, "colors": _draw_colors}[view.drawing]
    wrong = draw(pen, shown, row, view, step, rows, cols)
    sigmoid = 0.5 * (1 + np.tanh(0.5 * shown.scores.q_halt[step - 1, row]))
    outcome = "all right" if not wrong else f"{wrong} wrong"
    text = f"step {step} of {len(shown.answers)}   {outcome}   q halt {sigmoid:.2f}"
    middle = (width // 2, image.height - margin // 2 - caption // 2)
    pen.write(text, middle, 14 * _FINER, _INK)
    return image.resize((image.width // _FINER, image.height // _FINER), PIL.Image.Resampling.LANCZOS)


def _shape(shown: Trajectories, row: int, view: View) -> tuple[int, int]:
    """Rows and columns to draw, the largest of all steps."""
    if view.grid_sizes:
        tokens = np.concatenate([shown.answers[:, row].astype(np.int64), shown.labels[row : row + 1]])
        rows, cols = view.grid_sizes(tokens).max(0).tolist()
        return rows, cols
    cols = view.columns or int(np.ceil(shown.inputs.shape[1] ** 0.5))
    return -(-shown.inputs.shape[1] // cols), cols


class _Pen:
    """Draws into the cells of a grid whose top left corner lies at `left`, `top`."""

    def __init__(self, draw: ImageDraw, cell: int, left: int, top: int) -> None:
        self._draw = draw
        self._cell = cell
        self._left = left
        self._top = top

    def point(self, row: float, col: float) -> tuple[float, float]:
        return self._left + col * self._cell, self._top + row * self._cell

    def box(
        self, row: float, col: float, *, inset: float = 0, fill: str | None = None, line: str | None = None
    ) -> None:
        ends = (*self.point(row + inset, col + inset), *self.point(row + 1 - inset, col + 1 - inset))
        self._draw.rectangle(ends, fill, line, width=min(round(0.07 * self._cell), 3 * _FINER) if line else 0)

    def circle(self, row: int, col: int, *, inset: float, fill: str | None = None, line: str | None = None) -> None:
        ends = (*self.point(row + inset, col + inset), *self.point(row + 1 - inset, col + 1 - inset))
        self._draw.ellipse(ends, fill, line, width=round(0.15 * self._cell) if line else 0)

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str, thick: float) -> None:
        self._draw.line((*self.point(*start), *self.point(*end)), color, width=max(round(thick * self._cell), 1))

    def cross(self, row: int, col: int, color: str, thick: float, *, reach: float = 0.2) -> None:
        near, far = 0.5 - reach, 0.5 + reach
        self.line((row + near, col + near), (row + far, col + far), color, thick)
        self.line((row + near, col + far), (row + far, col + near), color, thick)

    def corner(self, row: int, col: int, color: str) -> None:
        at = [(row, col + 0.7), (row, col + 1), (row + 0.3, col + 1)]
        self._draw.polygon([self.point(*corner) for corner in at], color)

    def text(self, row: int, col: int, text: str, color: str, *, bold: bool) -> None:
        size = self._cell * min(0.6, 1.3 / max(len(text), 1))
        self.write(text, self.point(row + 0.5, col + 0.5), size, color, 0.03 * size if bold else 0)

    def write(self, text: str, middle: tuple[float, float], size: float, color: str, stroke: float = 0) -> None:
        from PIL import ImageFont

        self._draw.text(middle, text, color, ImageFont.load_default(size), "mm", stroke_width=round(stroke))

    def grid(self, rows: int, cols: int, color: str, thick: float, *, down: int = 1, across: int = 1) -> None:
        for line in range(0, rows + 1, down):
            self.line((line, 0), (line, cols), color, thick)
        for line in range(0, cols + 1, across):
            self.line((0, line), (rows, line), color, thick)


def _cells(shown: Trajectories, row: int, step: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which labelled tokens [S] are wrong after a step, and which it changed."""
    answers, labels = shown.answers[:, row], shown.labels[row]
    labelled = labels != IGNORE_LABEL_ID
    changed = answers[step - 1] != answers[max(step - 2, 0)]
    return labelled & (answers[step - 1] != labels), labelled & changed


def _draw_symbols(pen: _Pen, shown: Trajectories, row: int, view: View, step: int, rows: int, cols: int) -> int:
    wrong, changed = _cells(shown, row, step)
    inputs, answer = shown.inputs[row], shown.answers[step - 1, row]
    given = view.given(inputs)
    positions = [divmod(index, cols) for index in range(len(answer))]
    for index, (r, c) in enumerate(positions):
        pen.box(r, c, fill=_TINT if changed[index] else _GIVEN if given[index] else _PAPER)
    pen.grid(rows, cols, _LINE, 0.02)
    down, across = view.box or (rows, cols)
    pen.grid(rows, cols, _INK, 0.05, down=down, across=across)
    for index, (r, c) in enumerate(positions):
        if changed[index]:
            pen.corner(r, c, _RIGHT)
        if wrong[index]:
            pen.box(r, c, inset=0.12, line=_WRONG)
        color = _WRONG if wrong[index] else _INK if given[index] else _RIGHT
        pen.text(r, c, view.symbols[answer[index]], color, bold=bool(given[index]))
    return int(wrong.sum())


def _draw_path(pen: _Pen, shown: Trajectories, row: int, view: View, step: int, rows: int, cols: int) -> int:
    wrong, changed = (cells.reshape(rows, cols) for cells in _cells(shown, row, step))
    wall, start, goal, path = (view.symbols.index(symbol) for symbol in "#SGo")
    maze, answer = (tokens.reshape(rows, cols) for tokens in (shown.inputs[row], shown.answers[step - 1, row]))
    label = shown.labels[row].reshape(rows, cols)
    way = np.isin(answer, (start, goal, path)) & ~wrong
    for (r, c), token in np.ndenumerate(maze):
        if token == wall:
            pen.box(r, c, fill="#454543")
        elif changed[r, c]:
            pen.box(r, c, fill=_TINT)
    pen.grid(rows, cols, _INK, 0.06, down=rows, across=cols)
    for r, c in np.argwhere(way).tolist():
        if answer[r, c] == path:
            pen.circle(r, c, inset=0.32, fill=_RIGHT)
        for below, right in ((r + 1, c), (r, c + 1)):
            if below < rows and right < cols and way[below, right] and path in (answer[r, c], answer[below, right]):
                pen.line((r + 0.5, c + 0.5), (below + 0.5, right + 0.5), _RIGHT, 0.36)
    for r, c in np.argwhere(wrong).tolist():
        if label[r, c] == path:
            pen.circle(r, c, inset=0.25, line=_WRONG)
        else:
            pen.cross(r, c, _WRONG, 0.2)
    for r, c in np.argwhere((maze == start) | (maze == goal)).tolist():
        is_goal = maze[r, c] == goal
        if is_goal:
            pen.box(r, c, inset=0.04, fill=_INK)
        else:
            pen.circle(r, c, inset=0.04, fill=_PAPER, line=_INK)
        pen.text(r, c, view.symbols[maze[r, c]], _PAPER if is_goal else _INK, bold=True)
    return int(wrong.sum())


def _draw_colors(pen: _Pen, shown: Trajectories, row: int, view: View, step: int, rows: int, cols: int) -> int:
    grid, before, truth = _grids(
        np.stack([shown.answers[step - 1, row], shown.answers[max(step - 2, 0), row], shown.labels[row]]), view
    )
    wrong = 0
    for r in range(max(len(grid), len(truth))):
        for c in range(max(grid.shape[1], truth.shape[1])):
            color, wanted = _color(grid, r, c), _color(truth, r, c)
            wrong += color != wanted
            if color is None:
                if wanted is not None:
                    pen.box(r, c, inset=0.12, line=_WRONG)
                continue
            pen.box(r, c, fill="#555555")
            pen.box(r, c, inset=0.02, fill=ARC_COLORS[color])
            if color != _color(before, r, c):
                pen.corner(r, c, "#ffffff")
            if color != wanted:
                pen.cross(r, c, "#000000", 0.24, reach=0.24)
                pen.cross(r, c, "#ffffff", 0.12)
    return wrong


def _grids(tokens: NDArray[Any], view: View) -> list[NDArray[np.int64]]:
    """The colours of the grids that tokens [N, S] show, -1 for tokens that are none."""
    assert view.columns is not None
    number = np.array([int(symbol) if symbol else -1 for symbol in view.symbols])
    squares = number[np.maximum(tokens, 0)].reshape(len(tokens), -1, view.columns)
    if view.grid_sizes is None:
        return list(squares)
    sizes = view.grid_sizes(tokens).tolist()
    return [square[:height, :width] for square, (height, width) in zip(squares, sizes, strict=True)]


def _color(grid: NDArray[np.int64], row: int, col: int) -> int | None:
    """The colour of a cell, None outside of the grid."""
    return int(grid[row, col]) if row < len(grid) and col < grid.shape[1] else None
