"""Pictures of what happens inside a model, of what `hrm.evaluation.latent` collects; as figures that notebooks show.

Shapes: N puzzles of S tokens, behind a puzzle prefix of P; T ACT steps; D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrm.evaluation.latent import Mixing, States, changes, last_changes, pca
from hrm.evaluation.report.picture import PALETTE, new_picture
from hrm.tasks.base import Booleans, Tokens, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RIGHT: dict[str, Any] = {"color": PALETTE[0], "linestyle": "-", "marker": "o"}
_WRONG: dict[str, Any] = {"color": PALETTE[1], "linestyle": "--", "marker": "X"}
_COLORS = "cividis"  # even to colour-blind readers, and on paper without colour
_LEAST = 1e-7  # change that a logarithmic axis shows
_MOST_TOKENS = 200  # of a map's side: more are averaged
_MOST_NUMBERS = 150  # cells of a board that have room for a number each
_BELOW: dict[str, Any] = {
    "loc": "outside lower center",
    "frameon": False,
    "fontsize": 8,
}  # a legend that covers nothing
_KINDS = {"attention": "weight of attention", "sensitivity": "sensitivity (RMS of the derivative)"}


# Paths of states.


def draw_paths(states: States, right: Booleans, names: Sequence[str]) -> Figure:
    """The paths of states on the plane in which they differ most, those of all puzzles on one.

    Args:
        states: [N, T + 1, ...] each; the start, which all have in common, is left out.
        right: [N], whether the last answer is.
        names: of the puzzles.
    """
    figure, axes = new_picture(1, len(states), size=(4.6 * len(states), 4.3))
    for axis, (name, state) in zip(axes[0], states.items(), strict=True):
        _draw_plane(axis, state[:, 1:], right, names)
        axis.set_title(f"{name} after each ACT step", fontsize=10)
    _explain(figure, right, first="after the first step")
    return figure


def draw_starts(states: Mapping[str, NDArray[np.float32]], right: Mapping[str, Booleans], name: str) -> Figure:
    """The paths of one state from several starts, a panel for each puzzle; the first start is the model's own.

    Args:
        states: by the name of the puzzle, [starts, T + 1, ...].
        right: by the name of the puzzle, [starts], whether the last answer is.
        name: of the state.
    """
    figure, axes = new_picture(1, len(states), size=(max(3.9 * len(states), 5.4), 4.1))
    for axis, (puzzle, state) in zip(axes[0], states.items(), strict=True):
        _draw_plane(axis, state[:, 1:], right[puzzle], ["own start", *[""] * (len(state) - 1)])
        axis.set_title(f"puzzle {puzzle}: {name} from {len(state)} starts", fontsize=10)
    _explain(figure, np.concatenate(list(right.values())), first="after the first step")
    return figure


def _draw_plane(axes: Axes, states: NDArray[np.float32], right: Booleans, names: Sequence[str]) -> None:
    """Paths [N, T, ...] on their plane: a ring at the first point, dots, and at the last a mark and the name."""
    points, shares = pca(states)
    for path, is_right, name in zip(points, right, names, strict=True):
        look = _RIGHT if is_right else _WRONG
        color = look["color"]
        xs, ys = path.T
        axes.plot(xs, ys, color=color, linestyle=look["linestyle"], linewidth=0.9, alpha=0.7)
        axes.scatter(xs[1:-1], ys[1:-1], s=7, color=color, alpha=0.7)
        axes.scatter(xs[0], ys[0], s=34, facecolor="white", edgecolor=color, zorder=3)
        axes.scatter(
            xs[-1], ys[-1], s=52, color=color, marker=look["marker"], edgecolor="white", linewidth=0.6, zorder=4
        )
        if name:  # towards the middle, so that it stays in the panel
            is_left = xs[-1] < points[..., 0].mean()
            place: dict[str, Any] = {
                "ha": "left" if is_left else "right",
                "xytext": (5 if is_left else -5, 6),
                "fontsize": 8,
            }
            axes.annotate(name, path[-1], textcoords="offset points", color=color, zorder=5, **place)
    axes.set_xlabel(f"principal component 1 ({shares[0]:.0%} of the variance)", fontsize=9)
    axes.set_ylabel(f"principal component 2 ({shares[1]:.0%})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(0.14)


def _explain(figure: Figure, right: Booleans, first: str | None = None) -> None:
    """A legend below all panels: what the marks mean, as far as there are such; `first` is the ring's meaning."""
    from matplotlib.lines import Line2D

    handles = {}
    if first:
        handles[first] = Line2D([], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor="#444444")
    for look, there_are, text in (
        (_RIGHT, right.any(), "right at the end"),
        (_WRONG, not right.all(), "wrong at the end"),
    ):
        if there_are:
            handles[text] = Line2D([], [], linewidth=1.2, **look)
    figure.legend(list(handles.values()), list(handles), ncols=len(handles), **_BELOW)


# How much states change.


def draw_changes(states: States, right: Booleans) -> Figure:
    """How much each ACT step changes the states: the line of one that comes to rest falls.

    Args:
        states, right: as in `draw_paths`.
    """
    figure, axes = new_picture(1, len(states), size=(4.6 * len(states), 3.4), sharey=True)
    for axis, (name, state) in zip(axes[0], states.items(), strict=True):
        moved = np.maximum(changes(state), _LEAST)
        for line, is_right in zip(moved, right, strict=True):
            look = _RIGHT if is_right else _WRONG
            axis.plot(np.arange(1, len(line) + 1), line, markersize=4, linewidth=1, alpha=0.8, **look)
        _make_log(axis)
        axis.set_title(f"Change of {name}", fontsize=10)
        axis.set_xlabel("ACT step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("RMS of the difference", fontsize=9)
    _explain(figure, right)
    return figure


def draw_update_changes(changed: Mapping[str, NDArray[np.float32]], *, most_steps: int = 8) -> Figure:
    """How much each update within the ACT steps changes its state, the median of the puzzles (HRM paper, figure 3).

    Args:
        changed: [N, T, U] each, as `hrm.evaluation.latent.update_changes` gives them.
        most_steps: ACT steps to show.
    """
    figure, ((axis,),) = new_picture(size=(9.2, 3.2))
    for (name, values), color in zip(changed.items(), PALETTE, strict=False):
        median = np.maximum(np.median(values, axis=0)[:most_steps], _LEAST)
        steps, count = median.shape
        at = np.arange(steps)[:, None] + (np.arange(count) + 1) / count
        axis.plot(
            at.ravel(),
            median.ravel(),
            marker="o" if count < 10 else ".",
            markersize=4,
            linewidth=1,
            color=color,
            label=f"{name}, {count} update{'s' if count > 1 else ''} a step",
        )
    for step in range(steps + 1):
        axis.axvline(step, color="#444444", linewidth=0.6, linestyle=":")
    _make_log(axis)
    axis.set_title("Change by each update within the ACT steps, median of the puzzles", fontsize=10)
    axis.set_xlabel("ACT steps (dotted: the end of each)", fontsize=9)
    axis.set_ylabel("RMS of the difference", fontsize=9)
    figure.legend(ncols=len(changed), **_BELOW)
    return figure


def _make_log(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


# Cells.


def draw_last_changes(
    view: View, inputs: Tokens, answers: Tokens, right: Booleans, names: Sequence[str], *, columns: int = 3
) -> Figure:
    """Which ACT step changed the answer of each cell last: the earlier, the darker.

    Args:
        inputs: [N, S].
        answers: [N, T, S], after each ACT step.
        right, names: as in `draw_paths`.
        columns: puzzles in a row.
    """
    from matplotlib.colors import BoundaryNorm

    last = last_changes(answers)
    most = int(last.max())
    columns = min(columns, len(last))
    rows = -(-len(last) // columns)
    figure, axes = new_picture(rows, columns, size=(3 * columns + 0.9, 3.3 * rows))
    norm = BoundaryNorm(np.arange(0.5, max(most, 2) + 1), 256)
    for axis, of_input, of_answers, steps, is_right, name in zip(
        axes.flat, inputs, answers, last, right, names, strict=False
    ):
        board = _as_board(view, steps, of_answers)
        drawn = axis.imshow(board, cmap=_COLORS, norm=norm)
        if board.size <= _MOST_NUMBERS:
            _write_numbers(axis, board, drawn, _as_board(view, view.given(of_input), of_answers))
        _draw_boxes(axis, view, board)
        axis.set_title(
            f"puzzle {name}, {'right' if is_right else 'wrong'}",
            fontsize=9,
            color=(_RIGHT if is_right else _WRONG)["color"],
        )
    for axis in axes.flat[len(last) :]:
        axis.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=30, ticks=np.arange(1, most + 1, -(-most // 8)))
    bar.set_label("ACT step that changed the cell last", fontsize=9)
    return figure


def _as_board(view: View, values: NDArray[Any], answers: Tokens | None = None) -> NDArray[np.float64]:
    """Values [S] in rows and columns, nan where a list ends; of coloured grids the part that answers [T, S] fill."""
    columns = view.columns or int(np.ceil(len(values) ** 0.5))
    cells = np.full(-(-len(values) // columns) * columns, np.nan)
    cells[: len(values)] = values
    board: NDArray[np.float64] = cells.reshape(-1, columns)
    if view.grid_sizes is not None and answers is not None:
        height, width = np.maximum(view.grid_sizes(answers).max(0), 1)
        board = board[:height, :width]
    return board


def _write_numbers(axes: Axes, board: NDArray[np.float64], drawn: Any, given: NDArray[np.float64]) -> None:
    """The number of each cell in it, a dot in those that are given."""
    for (row, column), value in np.ndenumerate(board):
        if np.isnan(value):
            continue
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
        text = "·" if given[row, column] else f"{value:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=72 / max(len(board), 9), color=ink)


def _draw_boxes(axes: Axes, view: View, board: NDArray[np.float64]) -> None:
    rows, columns = view.box or board.shape
    for line in range(rows, board.shape[0], rows):
        axes.axhline(line - 0.5, color="white", linewidth=1)
    for line in range(columns, board.shape[1], columns):
        axes.axvline(line - 0.5, color="white", linewidth=1)
    axes.set(xticks=[], yticks=[])


# How tokens are mixed.


def draw_mixing(mixing: Sequence[Mixing], prefix_len: int, *, columns: int = 4) -> Figure:
    """How much each token reads from each other, a map for every head of every block.

    Args:
        mixing: as `hrm.evaluation.latent.token_mixing` gives it.
        prefix_len: P, tokens before those of the input.
        columns: maps in a row.
    """
    maps, figure, axes = _panels(mixing, columns)
    for axis, (title, values) in zip(axes.flat, maps, strict=False):
        size = -(-len(values) // _MOST_TOKENS)
        side = len(values) // size
        small = values[: side * size, : side * size].reshape(side, size, side, size).mean((1, 3))
        low, high = -prefix_len - 0.5, side * size - prefix_len - 0.5
        drawn = axis.imshow(small, cmap=_COLORS, vmin=0, vmax=_brightest(small), extent=(low, high, high, low))
        axis.set_title(title, fontsize=9)
        _add_bar(figure, axis, drawn)
    prefix = " (below 0: the puzzle prefix)" if prefix_len else ""
    figure.supxlabel(f"token that is read{prefix}", fontsize=9)
    figure.supylabel("token that reads", fontsize=9)
    return figure


def draw_reading(mixing: Sequence[Mixing], prefix_len: int, view: View, cell: int, *, columns: int = 4) -> Figure:
    """How much one cell, boxed, reads from each cell of its puzzle, a board for every head of every block.

    Args:
        mixing, prefix_len, columns: as in `draw_mixing`.
        cell: its index, from 0.
    """
    from matplotlib.patches import Rectangle

    maps, figure, axes = _panels(mixing, columns)
    for axis, (title, values) in zip(axes.flat, maps, strict=False):
        weights = values[prefix_len + cell, prefix_len:]
        board = _as_board(view, weights)
        others = np.delete(weights, cell)
        drawn = axis.imshow(board, cmap=_COLORS, vmin=0, vmax=others.max())
        _draw_boxes(axis, view, board)
        row, column = divmod(cell, board.shape[1])
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=PALETTE[1], linewidth=2))
        axis.set_title(title, fontsize=9)
        _add_bar(figure, axis, drawn)
    row, column = divmod(cell, view.columns) if view.columns else (0, cell)
    where = f"row {row + 1}, column {column + 1}" if view.columns else f"token {cell + 1}"
    figure.supxlabel(f"what is read by the boxed cell, {where}", fontsize=9)
    return figure


def _panels(
    mixing: Sequence[Mixing], columns: int
) -> tuple[list[tuple[str, NDArray[np.float32]]], Figure, NDArray[Any]]:
    """The maps with a title each, and a figure with an axis for each, `columns` in a row."""
    maps = []
    for part in mixing:
        for head, values in enumerate(part.maps):
            of_head = f", head {head + 1}" if part.kind == "attention" else ""
            maps.append((f"{part.module}, block {part.block + 1}{of_head}", values))
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = new_picture(rows, columns, size=(2.7 * columns + 0.6, 2.5 * rows + 0.7))
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    title = " and ".join(dict.fromkeys(_KINDS[part.kind] for part in mixing))
    figure.suptitle(title[:1].upper() + title[1:], fontsize=10)
    return maps, figure, axes


def _brightest(values: NDArray[np.float32]) -> float:
    """Where a map's colours end: what a token reads from itself may be far more than from any other."""
    others = values[~np.eye(len(values), dtype=np.bool_)]
    return float(np.quantile(others, 0.998)) if others.size else float(values.max())


def _add_bar(figure: Figure, axes: Axes, drawn: Any) -> None:
    axes.tick_params(labelsize=7)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, aspect=18, extend="max")
    bar.ax.tick_params(labelsize=6)
