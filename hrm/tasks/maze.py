"""Mazes: tokens, breadth-first search over many mazes at once, a checker of answers; what evaluation asks of the task.

A maze is a square grid of `n*n` cells, row by row: `#` wall, ` ` free, `S` start, `G` goal and, in an answer, `o` on
every cell of the path between the two. A path goes up, down, left and right; its length is its number of moves.

The search holds 64 mazes in the bits of one word: an array `[n, n, words]` is a set of cells in each of them, and one
numpy call moves all of them on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import Pack
from hrm.errors import UserError
from hrm.tasks.base import (
    Booleans,
    Difficulty,
    Evaluator,
    PuzzleSize,
    Rules,
    RulesEvaluator,
    Symmetry,
    Task,
    View,
)
from hrm.tasks.dihedral import NUM_DIHEDRAL, dihedral
from hrm.tasks.form import PuzzleForm

Tokens = NDArray[np.uint8]  # of one maze [n*n]
Mazes = NDArray[np.uint8]  # tokens [N, n, n]
Cells = NDArray[np.bool_]  # a set of cells of each maze [N, n, n]
_Token = TypeVar("_Token", bound=np.generic)
Words = NDArray[np.uint64]  # the same as bits [n, n, words]

CHARSET = "# SGo"
PAD_TOKEN, WALL, FREE, START, GOAL, PATH = range(len(CHARSET) + 1)
VOCAB_SIZE = len(CHARSET) + 1

# Random mazes, and the share of their cells that are walls, among which an example is found with a path of 121 moves at
# 30x30 cells: as long as those of generated packs.
_EXAMPLES_DRAWN, _EXAMPLES_WALLS = 64, 0.38


# Text and tokens.


def side_of(cells: int) -> int:
    """Rows and columns of a maze with so many cells; UserError unless it is a square of 2x2 or more."""
    side = math.isqrt(cells)
    if side < 2 or side**2 != cells:
        raise UserError(f"No maze has {cells} cells; mazes are square, such as 900 cells for 30x30.")
    return side


def parse_maze(text: str) -> Tokens:
    """The tokens `[cells]` of a maze or of an answer written row by row in the characters `# SGo`.

    Raises:
        UserError: for another character, or a number of cells that is no square.
    """
    tokens = np.array([CHARSET.find(symbol) + 1 for symbol in text], dtype=np.uint8)
    if (tokens == 0).any():
        at = int((tokens == 0).argmax())
        raise UserError(f"Character {at + 1} of the maze is {text[at]!r}; write one of {CHARSET!r}.")
    side_of(len(tokens))
    return tokens


def dihedral_variants(mazes: NDArray[_Token]) -> NDArray[_Token]:
    """The 8 variants `[N, 8, n, n]` of each maze under the symmetries of the square, the maze itself first.

    In the order of the published packs, see `hrm.tasks.dihedral`.
    """
    return np.stack([dihedral(mazes, number) for number in range(NUM_DIHEDRAL)], axis=1)


# Breadth-first search.


def to_words(cells: Cells) -> Words:
    count, rows, columns = cells.shape
    padded = np.zeros((rows, columns, -(-count // 64) * 64), dtype=np.bool_)
    padded[..., :count] = cells.transpose(1, 2, 0)
    return np.packbits(padded, axis=-1).view(np.uint64)


def from_words(words: Words, count: int) -> Cells:
    """The first `count` bits along the last axis, which becomes the first."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=count).view(np.bool_)
    return np.moveaxis(bits, -1, 0)


def waves(passable: Words, sources: Words) -> Iterator[Words]:
    """The cells at distance 0, 1, 2, ... from the sources through passable cells, until no maze has any left."""
    wave, unreached = sources, passable & ~sources
    while wave.any():
        yield wave
        spread = wave.copy()
        spread[1:] |= wave[:-1]
        spread[:-1] |= wave[1:]
        spread[:, 1:] |= wave[:, :-1]
        spread[:, :-1] |= wave[:, 1:]
        wave = spread & unreached
        unreached ^= wave


def any_cell(words: Words) -> Words:
    """For each maze, whether it has any cell: words `[words]`."""
    result: Words = np.bitwise_or.reduce(words, axis=(0, 1))
    return result


def path_lengths(passable: Cells, sources: Cells, targets: Cells) -> NDArray[np.int64]:
    """Fewest moves `[N]` from a source to a target, both passable, through passable cells; -1 if there is no way."""
    count = len(passable)
    wanted = to_words(targets)
    lengths = np.full(count, -1, dtype=np.int64)
    searching = any_cell(wanted)
    for distance, wave in enumerate(waves(to_words(passable), to_words(sources))):
        found = any_cell(wave & wanted) & searching
        if found.any():
            lengths[from_words(found, count)] = distance
            searching &= ~found
            if not searching.any():
                break
    return lengths


def farthest(passable: Cells, sources: Cells) -> tuple[NDArray[np.int64], Cells]:
    """How many moves `[N]` the cells that are farthest from a source are away, -1 without a source; and these cells."""
    count = len(passable)
    lengths = np.zeros(count, dtype=np.int64)
    last = to_words(sources)
    for wave in waves(to_words(passable), last):
        present = any_cell(wave)
        lengths += from_words(present, count)
        last = (last & ~present) | wave
    return lengths - 1, from_words(last, count)


# Answers.


def is_maze(inputs: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether each row `[B]` of tokens `[B, S]` is a maze: walls and free cells, one start and one goal."""
    one_of_each = [np.count_nonzero(inputs == end, axis=1) == 1 for end in (START, GOAL)]
    result: NDArray[np.bool_] = ((inputs >= WALL) & (inputs <= GOAL)).all(1) & one_of_each[0] & one_of_each[1]
    return result


def is_shortest_path(inputs: NDArray[np.integer[Any]], answers: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether each answer marks a shortest path through its maze and changes nothing else.

    Any of several shortest paths counts, so this never says less than exact match with a right label.

    Args:
        inputs, answers: tokens `[B, S]`, S a square number.

    Returns:
        `[B]`; false where the input is no maze, such as the padding of a batch.

    Raises:
        UserError: if S is not the number of cells of a square maze.
    """
    side = side_of(inputs.shape[1])
    mazes, marked = (tokens.reshape(-1, side, side) for tokens in (inputs, answers))
    starts, goals, path = mazes == START, mazes == GOAL, marked == PATH
    unchanged = (np.where(path, FREE, marked) == mazes).all((1, 2))
    # If the cells of the path connect start and goal in as few moves as there are cells, every one lies on the way.
    moves = np.count_nonzero(path, axis=(1, 2)) + 1
    connected = path_lengths(path | starts | goals, starts, goals) == moves
    shortest = path_lengths((mazes == FREE) | starts | goals, starts, goals) == moves
    result: NDArray[np.bool_] = is_maze(inputs) & unchanged & connected & shortest
    return result


# The task.


class MazeTask(Task):
    """Square mazes of any size."""

    name = "maze"
    one_answer = False  # of shortest paths, of which a maze with 30x30 cells has millions

    def fits(self, size: PuzzleSize) -> bool:
        side = math.isqrt(size.seq_len)
        return side >= 2 and size == (side**2, VOCAB_SIZE)

    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        return View(("", *CHARSET), side_of(size.seq_len), blank=FREE, drawing="path")

    def title(self, size: PuzzleSize) -> str:
        side = side_of(size.seq_len)
        return f"Mazes, {side} × {side}"

    def is_input(self, inputs: NDArray[np.integer[Any]]) -> Booleans:
        return is_maze(inputs)

    def rules(self, size: PuzzleSize) -> Rules:
        return Rules(is_shortest_path, "a shortest path")

    def num_symmetries(self, size: PuzzleSize) -> float:
        return NUM_DIHEDRAL

    def symmetries(self, size: PuzzleSize, count: int, seed: int = 0) -> list[Symmetry]:
        """The first of the eight symmetries of the square."""
        side = side_of(size.seq_len)
        square = np.arange(size.seq_len).reshape(1, side, side)
        variants = dihedral_variants(square).reshape(NUM_DIHEDRAL, size.seq_len)
        return [Symmetry(cells, np.arange(size.vocab_size)) for cells in variants[:count]]

    def difficulty(self) -> Difficulty:
        return Difficulty("length of the path", lambda inputs, labels: (labels == PATH).sum(1) + 1)

    def evaluators(self, pack: Pack) -> list[Evaluator]:
        return [RulesEvaluator(self.rules(PuzzleSize.of(pack)))]

    def parse_input(self, text: str, size: PuzzleSize) -> Tokens:
        maze = parse_maze("".join(text.splitlines()))
        if not is_maze(maze[None])[0]:
            raise UserError("A maze to solve has one S, one G and no o.")
        side = side_of(len(maze))
        passable, starts, goals = (
            cells.reshape(1, side, side) for cells in (maze != WALL, maze == START, maze == GOAL)
        )
        if path_lengths(passable, starts, goals)[0] < 0:
            raise UserError("No path leads from S to G; open a wall.")
        return maze

    def example(self, form: PuzzleForm) -> str:
        """A random maze, such as generated packs hold: the one of the longest path among some; a line for each row."""
        side = side_of(form.seq_len)
        rng = np.random.default_rng(0)
        passable = rng.random((_EXAMPLES_DRAWN, side, side)) >= _EXAMPLES_WALLS
        anywhere = np.zeros_like(passable)
        anywhere[np.arange(_EXAMPLES_DRAWN), *rng.integers(side, size=(2, _EXAMPLES_DRAWN))] = True
        passable |= anywhere
        mazes = np.where(passable, FREE, WALL)
        starts = _first(farthest(passable, anywhere)[1])
        lengths, goals = farthest(passable, starts)
        goals = _first(goals)
        mazes[starts], mazes[goals] = START, GOAL
        return "\n".join("".join(CHARSET[token - 1] for token in row) for row in mazes[lengths.argmax()])


def _first(cells: Cells) -> Cells:
    """The first cell of each set in reading order."""
    first = np.zeros(cells.shape, dtype=np.bool_)
    first.reshape(len(cells), -1)[np.arange(len(cells)), cells.reshape(len(cells), -1).argmax(1)] = True
    return first


TASK = MazeTask()
