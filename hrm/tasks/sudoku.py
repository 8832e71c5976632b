"""Sudoku: rules, a batch solver, symmetries and random puzzles, all vectorised over boards.

A board of side `n` is `n*n` digits, row by row, 0 for a blank: uint8 `[..., n*n]`. A *box* has `rows` rows and `cols`
columns, `n = rows * cols`; `rows` grid rows through one line of boxes are a *band*, `cols` grid columns a *stack*.

The solver holds a board as one bit mask of possible digits per cell and works on `[cells, boards]` arrays, boards last,
so that every numpy call runs over many boards at once.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hrm.errors import UserError

Grids = NDArray[np.uint8]
Masks = NDArray[np.uint16]

_SUPPORTED = ((2, 2), (2, 3), (3, 3))

PAD_TOKEN = 0


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


def encode_tokens(grids: Grids) -> Grids:
    """Digits 0..n to the model's tokens 1..n+1."""
    tokens: Grids = grids + np.uint8(1)
    return tokens


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
_UNITS = (_ROW, _COLUMN, _BOX)


def _unit_view(boards: Masks, shape: BoxShape) -> Masks:
    return boards.reshape(shape.cols, shape.rows, shape.rows, shape.cols, -1)


def _once_and_twice(view: Masks, unit: tuple[int, int]) -> tuple[Masks, Masks]:
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
    view = _unit_view(bits, shape)
    repeated = np.zeros_like(view)
    for unit in _UNITS:
        repeated |= _once_and_twice(view, unit)[1]
    clash: NDArray[np.bool_] = (view & repeated) != 0
    return clash.reshape(shape.cells, -1).T.reshape(grids.shape)


def is_solved(grids: Grids, shape: BoxShape) -> NDArray[np.bool_]:
    """Which boards are complete and break no rule: bool `[...]` for grids `[..., cells]`."""
    solved: NDArray[np.bool_] = ((grids != 0) & ~conflicts(grids, shape)).all(-1)
    return solved


# Solver.

# Boards worked on together: enough to hide the cost of a numpy call, few enough to stay in the cache.
_WIDTH = 2048

_MASKS = np.arange(1 << 9)
_POPCOUNT = ((_MASKS[:, None] >> np.arange(9)) & 1).sum(1).astype(np.uint8)
_DIGIT = np.zeros(1 << 9, dtype=np.uint8)  # of a mask with a single bit
_DIGIT[1 << np.arange(9)] = np.arange(1, 10)


def _full_mask(shape: BoxShape) -> np.uint16:
    return np.uint16((1 << shape.side) - 1)


def _candidates(puzzles: Grids, shape: BoxShape) -> Masks:
    """Possible digits `[..., cells]` as bits (digit d is bit d-1) before any reasoning: all in a blank."""
    bits = np.left_shift(1, np.maximum(puzzles, 1) - np.uint8(1), dtype=np.uint16)
    return np.where(puzzles == 0, _full_mask(shape), bits)


def _is_single(masks: Masks) -> NDArray[np.bool_]:
    """Which masks have at most one bit."""
    return np.equal(masks & (masks - np.uint16(1)), 0)


@dataclass(frozen=True)
class _Step:
    """Boards after one round of propagation: `states` uint16 `[cells, boards]`, and for each what became of it.

    `stuck` boards are not solved, but this kind of reasoning takes them no further. Boards of none of the three kinds
    have lost candidates and want another round.
    """

    states: Masks
    dead: NDArray[np.bool_]
    solved: NDArray[np.bool_]
    stuck: NDArray[np.bool_]


def _propagate(states: Masks, shape: BoxShape) -> _Step:
    """One round of naked singles (a cell with one digit) and hidden singles (a digit with one cell in a unit)."""
    view = _unit_view(states, shape)
    full = _full_mask(shape)
    settled = np.where(_is_single(view), view, np.uint16(0))
    taken, only = np.zeros_like(view), np.zeros_like(view)
    dead = (states == 0).any(0)
    for unit in _UNITS:
        placeable, ambiguous = _once_and_twice(view, unit)
        taken |= np.bitwise_or.reduce(settled, axis=unit, keepdims=True)
        only |= placeable & ~ambiguous
        dead |= (placeable != full).any((0, 1, 2, 3))
    reduced = (view & ~taken) | settled
    only &= reduced
    reduced = np.where(only != 0, only, reduced).reshape(states.shape)

    still = ~dead & (reduced == states).all(0)
    # Every unit has a place for every digit, or the board were dead: single candidates all over break no rule.
    solved = still & (settled != 0).all((0, 1, 2, 3))
    return _Step(reduced, dead, solved, still & ~solved)


def _search(candidates: Masks, shape: BoxShape, limit: int) -> tuple[NDArray[np.intp], Grids]:
    """Solutions of many boards at once, by propagation and by splitting the cell of fewest candidates.

    Args:
        candidates: possible digits, uint16 `[boards, cells]`.
        limit: a board is left alone once it has so many solutions (those of its last round may exceed it).

    Returns:
        The board each solution belongs to, `[solutions]`, and the solutions, `[solutions, cells]`.
    """
    found = np.zeros(len(candidates), dtype=np.int64)
    owners: list[NDArray[np.intp]] = [np.empty(0, dtype=np.intp)]
    solutions: list[Grids] = [np.empty((0, shape.cells), dtype=np.uint8)]
    # A stack of states, its top at the end. Boards enter only as room appears, and only the top is worked on: the
    # search goes deep before it goes wide, so memory stays bounded however many boards or branches there are.
    owner = np.empty(0, dtype=np.intp)
    states = np.empty((shape.cells, 0), dtype=np.uint16)
    entered = 0
    while owner.size or entered < len(candidates):
        if owner.size < _WIDTH and entered < len(candidates):
            entering = np.arange(entered, min(entered + _WIDTH - owner.size, len(candidates)))
            owner = np.concatenate([entering, owner])
            states = np.concatenate([candidates[entering].T, states], axis=1)
            entered += entering.size

        top_owner = owner[-_WIDTH:]
        step = _propagate(states[:, -_WIDTH:], shape)
        if step.solved.any():
            owners.append(top_owner[step.solved])
            solutions.append(_DIGIT[step.states[:, step.solved].T])
            np.add.at(found, owners[-1], 1)
        wanted = found[top_owner] < limit
        moving = wanted & ~(step.dead | step.solved | step.stuck)
        stuck = wanted & step.stuck
        rest, first = _split(step.states[:, stuck])
        owner = np.concatenate([owner[:-_WIDTH], top_owner[moving], top_owner[stuck], top_owner[stuck]])
        states = np.concatenate([states[:, :-_WIDTH], step.states[:, moving], rest, first], axis=1)
    return np.concatenate(owners), np.concatenate(solutions)


def _split(states: Masks) -> tuple[Masks, Masks]:
    """Splits an open cell of fewest candidates: states without its lowest candidate, and states with that one only."""
    boards = np.arange(states.shape[1])
    counts = _POPCOUNT[states]
    cell = np.where(counts == 1, 10, counts).argmin(0)
    mask = states[cell, boards]
    lowest = mask & (~mask + np.uint16(1))
    rest, first = states.copy(), states.copy()
    rest[cell, boards] = mask ^ lowest
    first[cell, boards] = lowest
    return rest, first


def count_solutions(puzzles: Grids, shape: BoxShape, limit: int = 2) -> NDArray[np.int64]:
    """The number of solutions, counted up to `limit`: int64 `[...]` for puzzles `[..., cells]`."""
    boards = puzzles.reshape(-1, shape.cells)
    owners, _ = _search(_candidates(boards, shape), shape, limit)
    return np.minimum(np.bincount(owners, minlength=len(boards)), limit).reshape(puzzles.shape[:-1])


def solve(puzzles: Grids, shape: BoxShape) -> Grids:
    """The only solution of each puzzle, shaped like `puzzles`; all zeros where there is none or more than one."""
    boards = puzzles.reshape(-1, shape.cells)
    owners, found = _search(_candidates(boards, shape), shape, limit=2)
    unique = np.bincount(owners, minlength=len(boards))[owners] == 1
    solutions = np.zeros_like(boards)
    solutions[owners[unique]] = found[unique]
    return solutions.reshape(puzzles.shape)


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
        """The images of grids `[N, cells]`, the i-th under the i-th symmetry."""
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


def symmetry_invariant(grids: Grids, shape: BoxShape) -> NDArray[np.uint64]:
    """A key `[...]` of each complete grid `[..., cells]` that no symmetry of `random_symmetries` changes.

    Grids with different keys are certainly not equivalent; inequivalent 9x9 grids share one only by rare chance.

    Reading one row above another gives a permutation of the digits. Its cycle type depends neither on the names of the
    digits nor on the order of the columns, and is that of its inverse. So each row is described by the unordered cycle
    types towards the others of its band and towards the other bands, a band by its unordered rows, the grid by its
    unordered bands; columns alike.
    """
    boards = grids.reshape(-1, shape.side, shape.side).astype(np.intp) - 1
    rows = _line_invariant(boards, shape.rows)
    cols = _line_invariant(boards.transpose(0, 2, 1), shape.cols)
    key = _scramble(rows) + _scramble(cols) if shape.rows == shape.cols else _scramble(rows + _scramble(cols))
    return key.reshape(grids.shape[:-1])


def _line_invariant(lines: NDArray[np.intp], block: int) -> NDArray[np.uint64]:
    """The key `[N]` of lines `[N, n, n]` (digits from 0) in blocks of `block` lines, in which no order counts."""
    side = lines.shape[1]
    profile = np.zeros(lines.shape[:2], dtype=np.uint64)
    for one, other in itertools.combinations(range(side), 2):
        permutation = np.empty_like(lines[:, one])
        np.put_along_axis(permutation, lines[:, one], lines[:, other], axis=1)
        same_block = np.uint64(one // block == other // block)
        relation = _scramble(_cycle_type(permutation) + same_block)
        profile[:, one] += relation
        profile[:, other] += relation
    blocks = _scramble(profile).reshape(len(lines), side // block, block).sum(2)
    key: NDArray[np.uint64] = _scramble(blocks).sum(1)
    return key


def _cycle_type(permutations: NDArray[np.intp]) -> NDArray[np.uint64]:
    """A number `[N]` for the cycle lengths of permutations `[N, n]`."""
    side = permutations.shape[1]
    start = np.arange(side)
    length = np.zeros(permutations.shape, dtype=np.uint64)
    position = permutations
    for steps in range(1, side + 1):
        length[(position == start) & (length == 0)] = steps
        position = np.take_along_axis(permutations, position, axis=1)
    number: NDArray[np.uint64] = _scramble(length).sum(1)
    return number


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A fixed one-to-one map of 64-bit numbers that leaves sums of its values telling their terms apart."""
    for odd in (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)):
        values = (values ^ (values >> np.uint64(32))) * odd
    return values ^ (values >> np.uint64(32))


# Random puzzles.


def all_grids(shape: BoxShape) -> Grids:
    """Every complete grid `[grids, cells]`; there are 288 of 2x2 boxes, and far too many of larger ones."""
    blank = np.zeros((1, shape.cells), dtype=np.uint8)
    return _search(_candidates(blank, shape), shape, limit=np.iinfo(np.int64).max)[1]


def random_grids(count: int, shape: BoxShape, rng: np.random.Generator) -> Grids:
    """`count` complete grids `[count, cells]`, each filled by random choices and started anew at a dead end."""
    full = _full_mask(shape)
    states = np.full((shape.cells, count), full)
    grids: list[Grids] = [np.empty((0, shape.cells), dtype=np.uint8)]
    while states.shape[1]:
        step = _propagate(states, shape)
        grids.append(_DIGIT[step.states[:, step.solved].T])
        step.states[:, step.stuck] = _guess(step.states[:, step.stuck], shape, rng)
        step.states[:, step.dead] = full
        states = step.states[:, ~step.solved]
    return np.concatenate(grids)


def _guess(states: Masks, shape: BoxShape, rng: np.random.Generator) -> Masks:
    """Settles one open cell of fewest candidates in each state, cell and digit drawn at random."""
    boards = np.arange(states.shape[1])
    counts = _POPCOUNT[states]
    # Adding a draw from [0, 1) to whole numbers breaks ties only.
    cell = (np.where(counts == 1, 10, counts) + rng.random(states.shape)).argmin(0)
    digit_bits = np.uint16(1) << np.arange(shape.side, dtype=np.uint16)
    possible = (states[cell, boards][:, None] & digit_bits) != 0
    guessed = states.copy()
    guessed[cell, boards] = digit_bits[np.where(possible, rng.random(possible.shape), -1.0).argmax(1)]
    return guessed


def dig_holes(solutions: Grids, givens: int, shape: BoxShape, rng: np.random.Generator) -> Grids:
    """Blanks cells of complete grids `[N, cells]` in random order while the solution stays the only one.

    Returns:
        Puzzles `[N, cells]` with `givens` filled cells, or more where no further cell of that grid can be spared.
    """
    puzzles = solutions.copy()
    orders = rng.permuted(np.tile(np.arange(shape.cells), (len(solutions), 1)), axis=1)
    for cells in orders.T:
        open_ = np.flatnonzero(np.count_nonzero(puzzles, axis=1) > givens)
        if not open_.size:
            break
        # The cell can be spared unless some solution has another digit there.
        cell = cells[open_]
        others = _candidates(puzzles[open_], shape)
        others[np.arange(open_.size), cell] ^= _full_mask(shape)
        needed, _ = _search(others, shape, limit=1)
        spared = np.ones(open_.size, dtype=bool)
        spared[needed] = False
        puzzles[open_[spared], cell[spared]] = 0
    return puzzles
