"""Sudoku: boards, tokens, rules and symmetries, all vectorised over boards; and what evaluation asks of the task.

A board of side `n` is `n*n` digits, row by row, 0 for a blank: uint8 `[..., n*n]`. A *box* has `rows` rows and `cols`
columns, `n = rows * cols`; `rows` grid rows through one line of boxes are a *band*, `cols` grid columns a *stack*.
As tokens, 0 is padding, 1 a blank and digit `d` is `d + 1`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hrm.errors import UserError
from hrm.tasks.base import (
    UNLIMITED,
    Booleans,
    Difficulty,
    PuzzleSize,
    Rules,
    Solutions,
    Symmetry,
    Task,
    Tokens,
    View,
    identity,
)
from hrm.tasks.form import Puzzle, PuzzleForm

Grids = NDArray[np.uint8]
Masks = NDArray[np.uint16]

_SUPPORTED = ((2, 2), (2, 3), (3, 3))

PAD_TOKEN, BLANK_TOKEN = 0, 1


@dataclass(frozen=True)
class BoxShape:
    """The size of a box, `rows` x `cols`: 2x2 (4x4 boards), 2x3 (6x6) or 3x3 (9x9).

    Raises:
        UserError: for any other size.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if (self.rows, self.cols) not in _SUPPORTED:
            raise UserError(f"Sudoku boxes of {self} are not supported; choose 2x2, 2x3 or 3x3.")

    @property
    def side(self) -> int:
        """Rows, columns and digits of the board."""
        return self.rows * self.cols

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def vocab_size(self) -> int:
        """Tokens: pad, blank and the digits."""
        return self.side + 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"

    @classmethod
    def supported(cls) -> list[Self]:
        return [cls(rows, cols) for rows, cols in _SUPPORTED]

    @classmethod
    def from_cells(cls, cells: int) -> Self:
        """The box shape of a board with so many cells; UserError unless 16, 36 or 81."""
        for shape in cls.supported():
            if shape.cells == cells:
                return shape
        raise UserError(f"No Sudoku board has {cells} cells; boards of 16, 36 or 81 cells are supported.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The box shape written as "2x3"; UserError for anything that is not a supported one."""
        match = re.fullmatch(r"(\d)x(\d)", text)
        if match is None:
            raise UserError(f"{text!r} is not a Sudoku box size; choose 2x2, 2x3 or 3x3.")
        return cls(int(match[1]), int(match[2]))


def encode_tokens(grids: NDArray[np.integer[Any]]) -> Grids:
    """Digits 0..n to the model's tokens 1..n+1."""
    return (grids + 1).astype(np.uint8)


def decode_tokens(tokens: NDArray[np.integer[Any]]) -> Grids:
    """Tokens 0..n+1 to digits 0..n; the pad token, which stands for no digit either, becomes a blank."""
    digits: Grids = (np.maximum(tokens, 1) - 1).astype(np.uint8)
    return digits


def parse_grid(text: str, shape: BoxShape) -> Grids:
    """A board `[cells]` from its digits row by row, '.' or '0' for a blank; white space is ignored.

    Raises:
        UserError: if a character is no digit of this board or their number is wrong.
    """
    symbols = "".join(text.split())
    expected = f"{shape.cells} characters from 1 to {shape.side}, or '.' or '0' for a blank, are needed"
    for position, symbol in enumerate(symbols, start=1):
        if symbol not in ".0123456789"[: shape.side + 2]:
            raise UserError(f"Character {position} of the board is {symbol!r}; {expected}.")
    if len(symbols) != shape.cells:
        raise UserError(f"The board has {len(symbols)} characters; {expected}.")
    return np.array([int(symbol) for symbol in symbols.replace(".", "0")], dtype=np.uint8)


# Rules. A [cells, boards] array viewed as [band, row in band, stack, column in stack, boards] has its rows, columns and
# boxes along these pairs of axes.
_ROW, _COLUMN, _BOX = (2, 3), (0, 1), (1, 3)
UNITS = (_ROW, _COLUMN, _BOX)


def unit_view(boards: Masks, shape: BoxShape) -> Masks:
    return boards.reshape(shape.cols, shape.rows, shape.rows, shape.cols, -1)


def once_and_twice(view: Masks, unit: tuple[int, int]) -> tuple[Masks, Masks]:
    """The bits set in at least one and in at least two cells of each unit; both broadcast against `view`."""

    def cells() -> Iterator[Masks]:
        for first, second in itertools.product(range(view.shape[unit[0]]), range(view.shape[unit[1]])):
            index = [slice(None)] * view.ndim
            index[unit[0]], index[unit[1]] = slice(first, first + 1), slice(second, second + 1)
            yield view[tuple(index)]

    remaining = cells()
    once = next(remaining).copy()
    twice = np.zeros_like(once)
    for cell in remaining:
        twice |= once & cell
        once |= cell
    return once, twice


def conflicts(grids: Grids, shape: BoxShape) -> NDArray[np.bool_]:
    """Which filled cells share their digit with another cell of their row, column or box: bool, shaped like `grids`."""
    boards = grids.reshape(-1, shape.cells).T
    bits = np.left_shift(1, boards, dtype=np.uint16) & np.uint16(0xFFFE)  # a blank has no bit
    view = unit_view(bits, shape)
    repeated = np.zeros_like(view)
    for unit in UNITS:
        repeated |= once_and_twice(view, unit)[1]
    clash: NDArray[np.bool_] = (view & repeated) != 0
    return clash.reshape(shape.cells, -1).T.reshape(grids.shape)


def is_solved(grids: Grids, shape: BoxShape) -> NDArray[np.bool_]:
    """Which boards are complete and break no rule: bool `[...]` for grids `[..., cells]`."""
    solved: NDArray[np.bool_] = ((grids != 0) & ~conflicts(grids, shape)).all(-1)
    return solved


# Symmetries.


@dataclass(frozen=True)
class Symmetries:
    """Maps of a board that keep the rules, one for each of N boards.

    `source` intp `[N, cells]` says from which cell each cell takes its digit, `relabel` uint8 `[N, n+1]` what the digit
    becomes; blanks stay blank.
    """

    source: NDArray[np.intp]
    relabel: Grids

    def apply(self, grids: Grids) -> Grids:
        """Grids `[N, cells]` mapped, the i-th by the i-th symmetry."""
        return np.take_along_axis(self.relabel, np.take_along_axis(grids, self.source, axis=1).astype(np.intp), axis=1)


def random_symmetries(count: int, shape: BoxShape, rng: np.random.Generator) -> Symmetries:
    """`count` independent symmetries: permutations of the digits, of bands and rows in bands, of stacks and columns in
    stacks, all drawn uniformly, and, where boxes are square, a transposition with probability 1/2."""
    rows = _random_line_order(count, shape.cols, shape.rows, rng)[:, :, None]
    cols = _random_line_order(count, shape.rows, shape.cols, rng)[:, None, :]
    source = rows * shape.side + cols
    if shape.rows == shape.cols:
        transposed = rng.random(count) < 0.5
        source[transposed] = source[transposed].transpose(0, 2, 1)
    relabel = np.zeros((count, shape.side + 1), dtype=np.uint8)
    relabel[:, 1:] = np.arange(1, shape.side + 1)
    rng.permuted(relabel[:, 1:], axis=1, out=relabel[:, 1:])
    return Symmetries(source.reshape(count, shape.cells), relabel)


def _random_line_order(count: int, blocks: int, size: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Orders `[count, blocks*size]` of the lines of a board that permute blocks, and lines within each block."""
    block = rng.permuted(np.tile(np.arange(blocks), (count, 1)), axis=1)[:, :, None]
    line = rng.permuted(np.tile(np.arange(size), (count, blocks, 1)), axis=2)
    order: NDArray[np.intp] = block * size + line
    return order.reshape(count, blocks * size)


# The task.

_EXAMPLES = {  # by side
    4: "1...3.2..1.22...",
    6: ".4.12.1..3...3..6.46.........2.5..4.",
    9: "6.57...9.4.....1.....3....5..2...8.7..6..3......9...46..9.....27..4....1.2.1.96..",
}


class Sudoku(Task):
    """Boards of 4x4, 6x6 and 9x9 cells."""

    name = "sudoku"

    def fits(self, size: PuzzleSize) -> bool:
        return size in {(box.cells, box.vocab_size) for box in BoxShape.supported()}

    def view(self, size: PuzzleSize, folder: Path | None = None) -> View:
        box = BoxShape.from_cells(size.seq_len)
        symbols = ("", "", *(str(digit) for digit in range(1, box.side + 1)))
        return View(symbols, box.side, blank=BLANK_TOKEN, box=(box.rows, box.cols))

    def title(self, size: PuzzleSize) -> str:
        side = BoxShape.from_cells(size.seq_len).side
        return f"Sudoku, {side} × {side}"

    def is_input(self, inputs: Tokens) -> Booleans:
        box = BoxShape.from_cells(inputs.shape[1])
        known: Booleans = np.all((inputs >= BLANK_TOKEN) & (inputs < box.vocab_size), axis=1)
        clash: Booleans = np.any(conflicts(decode_tokens(np.where(known[:, None], inputs, BLANK_TOKEN)), box), axis=1)
        return known & ~clash

    def rules(self, size: PuzzleSize) -> Rules:
        from hrm.tasks.sudoku_search import find_solutions

        box = BoxShape.from_cells(size.seq_len)

        def keeps(inputs: Tokens, answers: Tokens) -> Booleans:
            given, board = decode_tokens(inputs), decode_tokens(answers)
            kept: Booleans = is_solved(board, box) & ((given == 0) | (given == board)).all(-1)
            return kept

        def broken_at(inputs: Tokens, answers: Tokens) -> Booleans:
            """Blanks, changed givens, and filled in digits that stand more than once in a row, column or box."""
            given, board = decode_tokens(inputs), decode_tokens(answers)
            broken = (board == 0) | ((given > 0) & (board != given))
            result: Booleans = broken | (conflicts(board, box) & (given == 0))
            return result

        def solve(inputs: Tokens) -> Solutions:
            found = find_solutions(decode_tokens(inputs), box)
            return Solutions([encode_tokens(grid.astype(np.uint8)) for grid in found.answers], found.is_complete)

        return Rules(keeps, "a solution", broken_at, solve)

    def num_symmetries(self, size: PuzzleSize) -> float:
        return UNLIMITED

    def symmetries(self, size: PuzzleSize, count: int, seed: int = 0) -> list[Symmetry]:
        """The identity, and random permutations of digits, bands, rows, stacks and columns, and transpositions."""
        drawn = random_symmetries(count - 1, BoxShape.from_cells(size.seq_len), np.random.default_rng(seed))
        digits = drawn.relabel.astype(np.int64) + 1  # token 1 is a blank, 2 the digit 1
        tokens = np.concatenate([np.zeros_like(digits[:, :1]), digits], axis=1)
        return [identity(size), *map(Symmetry, drawn.source.astype(np.int64), tokens)]

    def cell_permutations(self, size: PuzzleSize, seed: int, count: int = 4096) -> NDArray[np.int64]:
        box = BoxShape.from_cells(size.seq_len)
        return random_symmetries(count, box, np.random.default_rng(seed)).source.astype(np.int64)

    def difficulty(self) -> Difficulty:
        return Difficulty("blanks to fill", lambda inputs, labels: (inputs == BLANK_TOKEN).sum(1))

    def parse_input(self, text: str, size: PuzzleSize) -> Tokens:
        box = BoxShape.from_cells(len("".join(text.split())))
        puzzle = parse_grid(text, box)
        if (clash := conflicts(puzzle, box)).any():
            cell = int(clash.argmax())
            row, column = divmod(cell, box.side)
            raise UserError(
                f"the puzzle breaks the rules: the {puzzle[cell]} in row {row + 1}, column {column + 1} stands more "
                "than once in a row, column or box."
            )
        return encode_tokens(puzzle)

    def example(self, form: PuzzleForm) -> str:
        return _EXAMPLES[BoxShape.from_cells(form.seq_len).side]

    def answer_value(self, answer: Tokens, puzzle: Puzzle, form: PuzzleForm) -> list[list[int]]:
        """The rows of digits, 0 for a blank."""
        side = math.isqrt(form.seq_len)
        rows: list[list[int]] = decode_tokens(answer).reshape(side, side).tolist()
        return rows


TASK = Sudoku()
