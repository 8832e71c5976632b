"""ARC: tasks of small coloured grids, their augmentations, and grids as the model's tokens; what evaluation asks.

A grid is uint8 `[rows, cols]`, 1 to 30 of each, of colours 0..9. As tokens it stands in a square of 30x30, read row by
row: colour `c` is `c + 2`, a border of `<eos>` = 1 closes it to the right and below as far as the square reaches, and
the rest is padding, 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from hrm.data.pack import Pack
from hrm.errors import UserError, shortened
from hrm.reading import parse_json
from hrm.tasks.base import Booleans, Evaluator, PuzzleSize, Task, Undo, View
from hrm.tasks.dihedral import INVERSE, dihedral
from hrm.tasks.form import Puzzle, PuzzleForm

Grid = NDArray[np.uint8]
Tokens = NDArray[np.integer[Any]]

GRID_SIDE = 30
SEQ_LEN = GRID_SIDE**2
NUM_COLORS = 10

PAD_TOKEN = 0
EOS_TOKEN = 1
COLOR_TOKEN = 2  # of colour 0
VOCAB_SIZE = COLOR_TOKEN + NUM_COLORS


class Pair(NamedTuple):
    """A grid and what it is to be turned into: 0x0 where that is hidden, as in the competition's test inputs."""

    input: Grid
    output: Grid

    @property
    def is_solved(self) -> bool:
        """Whether the output is known."""
        return self.output.size > 0


HIDDEN: Grid = np.empty((0, 0), dtype=np.uint8)
"""Stands for an output that is not known. Its tokens are all padding, which is not learned and not scored."""


@dataclass(frozen=True)
class ArcTask:
    """Demonstrations and test pairs of one rule; the test pairs of tasks to be `evaluated` may not be trained on."""

    name: str
    train: list[Pair]
    test: list[Pair]
    evaluated: bool

    @classmethod
    def parse(cls, name: str, value: object, evaluated: bool) -> Self:
        """The task that JSON holds in the official form: `{"train": [{"input": grid, "output": grid}], "test": ...}`.

        Test pairs may lack their output, or have null there.

        Raises:
            UserError: if it is not of this form; says which pair is wrong, but not in which file.
        """
        if not isinstance(value, Mapping):
            raise UserError("a task must be an object with train and test pairs.")
        return cls(name, _parse_pairs(value, "train"), _parse_pairs(value, "test"), evaluated)

    @property
    def trained(self) -> list[Pair]:
        """The pairs to be trained on: where the task is not evaluated, also the test pairs, as far as solved."""
        return [*self.train, *(pair for pair in self.test if pair.is_solved and not self.evaluated)]

    @property
    def hidden(self) -> int:
        """How many test inputs have no known output."""
        return sum(not pair.is_solved for pair in self.test)

    def to_json(self) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The official form that `parse` reads."""
        return {
            kind: [
                {side: grid.tolist() for side, grid in pair._asdict().items() if side == "input" or pair.is_solved}
                for pair in pairs
            ]
            for kind, pairs in (("train", self.train), ("test", self.test))
        }


def _parse_pairs(task: Mapping[str, object], kind: str) -> list[Pair]:
    pairs = task.get(kind)
    if not isinstance(pairs, list) or not pairs:
        raise UserError(f"it needs a list of {kind} pairs.")
    parsed = []
    for number, pair in enumerate(pairs, start=1):
        grids = []
        for side in Pair._fields:
            try:
                is_hidden = (kind, side) == ("test", "output") and pair.get("output") is None
                grids.append(HIDDEN if is_hidden else parse_grid(pair[side]))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{kind} pair {number} has no {side}.") from error
            except UserError as error:
                raise UserError(f"{kind} pair {number}, {side}: {error}") from error
        parsed.append(Pair(*grids))
    return parsed


def parse_grid(value: object) -> Grid:
    """A grid from nested lists; UserError if it is none."""
    try:
        grid = np.array(value)
    except ValueError:  # rows of different lengths
        grid = np.empty(0)
    if (
        grid.ndim != 2
        or grid.dtype.kind not in "iu"
        or not (min(grid.shape) > 0 and max(grid.shape) <= GRID_SIDE)
        or not (grid.min() >= 0 and grid.max() < NUM_COLORS)
    ):
        raise UserError(f"a grid is 1 to {GRID_SIDE} equally long rows of 1 to {GRID_SIDE} colours 0 to 9.")
    return grid.astype(np.uint8)


# Augmentations.

# Ours and the published HRM's, and TRM's. What only looks like one of them would be scored as a task of its own.
_AUGMENTED_NAMES = (re.compile(r"(.+)_t([0-7])_([0-9]{10})"), re.compile(r"(.+)\|\|\|t([0-7])\|\|\|([0-9]{10})"))
TRM_SEPARATOR = "|||"
_LIKE_AUGMENTED = re.compile(r".+_t[0-9]+_[0-9]{6,}|.*\|\|\|.*")


@dataclass(frozen=True)
class Augmentation:
    """A symmetry of the square and a permutation of the colours: `colors[c]` replaces colour `c`."""

    dihedral: int = 0
    colors: tuple[int, ...] = tuple(range(NUM_COLORS))

    def apply(self, grid: Grid) -> Grid:
        return np.array(self.colors, dtype=np.uint8)[dihedral(grid, self.dihedral)]

    def undo(self, grid: Grid) -> Grid:
        """Inverse of `apply`."""
        return np.argsort(self.colors).astype(np.uint8)[dihedral(grid, INVERSE[self.dihedral])]

    def name(self, task: str, separator: str = "_") -> str:
        """The identifier of the task under this augmentation: `<task>_t<dihedral>_<10 colour digits>`.

        TRM's has the `TRM_SEPARATOR`.
        """
        return separator.join((task, f"t{self.dihedral}", "".join(map(str, self.colors))))


def split_name(identifier: str) -> tuple[str, Augmentation]:
    """The task that an identifier names, and its augmentation: the identity if it names the task itself.

    Both spellings are read: `<task>_t<dihedral>_<10 colour digits>`, and TRM's `<task>|||t<dihedral>|||<digits>`.

    Raises:
        UserError: the name looks like that of an augmentation, but is none.
    """
    match = next(filter(None, (pattern.fullmatch(identifier) for pattern in _AUGMENTED_NAMES)), None)
    if match is not None and len(set(match[3])) == NUM_COLORS:
        return match[1], Augmentation(int(match[2]), tuple(map(int, match[3])))
    if _LIKE_AUGMENTED.fullmatch(identifier):
        raise UserError(
            f"{shortened(identifier)!r} looks like the name of an augmentation, but is none: write "
            f"<task>_t<0 to 7>_<the {NUM_COLORS} digits in any order>, or name the task otherwise."
        )
    return identifier, Augmentation()


def is_augmented(identifier: str) -> bool:
    """Whether an identifier names an augmentation of a task, or looks as if it did."""
    return bool(_LIKE_AUGMENTED.fullmatch(identifier))


# Tokens.


def encode(grids: NDArray[np.uint8], origins: NDArray[np.integer[Any]]) -> Tokens:
    """Tokens `[N, 900]` of grids `[N, rows, cols]` whose top left cells are at `origins`, `[N, 2]` rows and columns."""
    count, rows, cols = grids.shape
    framed = np.full((count, rows + 1, cols + 1), EOS_TOKEN, dtype=np.uint8)
    framed[:, :rows, :cols] = grids + np.uint8(COLOR_TOKEN)
    framed[:, rows, cols] = PAD_TOKEN
    # One row and column more than the square has, for a border that falls off its edge.
    canvas = np.full((count, GRID_SIDE + 1, GRID_SIDE + 1), PAD_TOKEN, dtype=np.uint8)
    windows = sliding_window_view(canvas, framed.shape[1:], axis=(1, 2), writeable=True)
    windows[np.arange(count), origins[:, 0], origins[:, 1]] = framed
    return canvas[:, :-1, :-1].reshape(count, SEQ_LEN)


def decode(tokens: NDArray[np.integer[Any]]) -> list[Grid]:
    """The grids that tokens `[N, 900]` show from the top left: the largest rectangles of nothing but colours.

    Of equally large ones the one of fewest rows, as in the published scoring; 0x0 where the first token is no colour.
    """
    square = tokens.reshape(-1, GRID_SIDE, GRID_SIDE)
    run = np.logical_and.accumulate(square >= COLOR_TOKEN, axis=2).sum(2)  # colours that a row begins with
    widths = np.minimum.accumulate(run, axis=1)  # of the widest rectangle down to each row
    rows = np.argmax(widths * np.arange(1, GRID_SIDE + 1), axis=1) + 1
    cols = widths[np.arange(len(square)), rows - 1]
    rows[cols == 0] = 0
    colors = (square - COLOR_TOKEN).astype(np.uint8)
    return [grid[:height, :width] for grid, height, width in zip(colors, rows.tolist(), cols.tolist(), strict=True)]


# The task.


class Arc(Task):
    """ARC's tasks; packs hold augmentations of each, which vote."""

    name = "arc"
    votes_over_pack = True
    names_puzzles = True

    def fits(self, size: PuzzleSize) -> bool:
        return size == (SEQ_LEN, VOCAB_SIZE)

    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        symbols = ("", "", *map(str, range(NUM_COLORS)))
        return View(symbols, GRID_SIDE, drawing="colors", grid_sizes=grid_sizes)

    def evaluators(self, pack: Pack) -> list[Evaluator]:
        from hrm.tasks.arc_votes import ArcEvaluator

        return [ArcEvaluator(pack)]

    def shown_identifiers(self, names: Sequence[str]) -> Booleans:
        """Those that are not augmented."""
        return np.array([not is_augmented(name) for name in names])

    # ---- from what a user gives to tokens, and from answers to what a user reads

    def puzzles_of(self, value: object, form: PuzzleForm) -> list[Puzzle]:
        """The test inputs of a task in the official form, which names itself in `puzzle`; or as in `Task`.

        What a model knows of a task is in its puzzle table: the demonstrations are not read.
        """
        if isinstance(value, Mapping) and "test" in value and "input" not in value:
            pairs = value["test"]
            if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) and "input" in pair for pair in pairs):
                raise UserError("test is no list of pairs with an input each.")
            names = value.get("puzzle", value.get("name"))
            value = [{"input": pair["input"], "puzzle": names} for pair in pairs]
            return [puzzle for pair in value for puzzle in self.puzzles_of(pair, form)]
        (puzzle,) = super().puzzles_of(value, form)
        if puzzle.identifier == 0 and form.num_puzzle_identifiers > 1:
            raise UserError(
                "it does not name its task, by which the model knows the rule: give {'input': grid, 'puzzle': name}."
            )
        return [puzzle]

    def read_input(self, value: object, form: PuzzleForm) -> Tokens:
        """A grid as nested lists, or as a text: rows of digits, or JSON."""
        if isinstance(value, str):
            value = _grid_of_text(value)
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        return _top_left(parse_grid(value))

    def example(self, form: PuzzleForm) -> dict[str, Any]:
        """A grid that is made up, of the first task that the model knows."""
        grid = [[0, 0, 0, 0, 0], [0, 3, 3, 0, 0], [0, 3, 0, 0, 2], [0, 0, 0, 0, 2], [0, 0, 0, 2, 2]]
        if form.num_puzzle_identifiers == 1:
            return {"input": grid}
        names = form.identifiers[1:]
        return {"input": grid, "puzzle": next((name for name in names if not is_augmented(name)), 1)}

    def is_cell(self, value: object, form: PuzzleForm) -> bool:
        return False

    def answer_value(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> list[list[int]]:
        """The grid, as nested lists of colours."""
        (grid,) = decode(answer[None])
        rows: list[list[int]] = grid.tolist()
        return rows

    def answer_text(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> str:
        """The rows of digits, "/" between them."""
        return "/".join("".join(map(str, row)) for row in self.answer_value(answer, puzzle, form))

    def augmented(self, puzzle: Puzzle, count: int, form: PuzzleForm) -> list[tuple[Puzzle, Undo]]:
        """The puzzle, and as many of its augmentations that the model was trained on as there are, `count` at most."""
        names = form.identifiers
        if count > 1 and not names:
            raise UserError(f"augmentations={count} needs the names of puzzles, which are not known: give data_path.")
        name, own = split_name(names[puzzle.identifier]) if names else ("", Augmentation())
        chosen: list[tuple[Puzzle, Undo]] = [(puzzle, lambda answer: answer)]
        (grid,) = decode(puzzle.tokens[None])
        for row in _rows_of(names).get(name, ()) if count > 1 else ():
            if row != puzzle.identifier and len(chosen) < count:
                _, other = split_name(names[row])
                shown = _top_left(other.apply(own.undo(grid)))
                chosen.append((Puzzle(shown, row), partial(_mapped_back, other, own)))
        return chosen


def _grid_of_text(text: str) -> object:
    """A grid written as rows of digits, between white space or "/", or as JSON; else the text, which is none."""
    if text.lstrip().startswith("["):
        try:
            return parse_json(text)
        except ValueError:
            return text
    rows = text.replace("/", " ").split()
    return [list(map(int, row)) for row in rows] if all(row.isdecimal() and row.isascii() for row in rows) else text


def _top_left(grid: Grid) -> NDArray[np.int64]:
    """The tokens [900] of a grid in the corner of its square."""
    tokens: NDArray[np.int64] = encode(grid[None], np.zeros((1, 2), dtype=np.int64))[0].astype(np.int64)
    return tokens


def _mapped_back(shown: Augmentation, own: Augmentation, answer: Tokens) -> Tokens:
    """An answer to a puzzle `shown` in one augmentation, as one to the puzzle itself, which may be another."""
    (grid,) = decode(answer[None])
    return _top_left(own.apply(shown.undo(grid))) if grid.size else answer


@lru_cache(maxsize=2)
def _rows_of(names: tuple[str, ...]) -> dict[str, list[int]]:
    """The rows of the puzzle table of each task and its augmentations, in order."""
    rows: dict[str, list[int]] = {}
    for row, identifier in enumerate(names[1:], start=1):
        rows.setdefault(split_name(identifier)[0], []).append(row)
    return rows


def grid_sizes(tokens: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Rows and columns [N, 2] of the grids that tokens [N, 900] show, as `decode` cuts them."""
    return np.array([grid.shape for grid in decode(tokens)], dtype=np.int64).reshape(-1, 2)


TASK = Arc()
