"""Random Sudoku puzzles, and which complete grids are equivalent."""

import itertools

import numpy as np
from numpy.typing import NDArray

from hrm.tasks.sudoku import BoxShape, Grids, Masks
from hrm.tasks.sudoku_solver import DIGIT, POPCOUNT, candidate_masks, full_mask, propagate, search


def all_grids(shape: BoxShape) -> Grids:
    """Every complete grid `[grids, cells]`; there are 288 of 2x2 boxes, and far too many of larger ones."""
    blank = np.zeros((1, shape.cells), dtype=np.uint8)
    return search(candidate_masks(blank, shape), shape, limit=np.iinfo(np.int64).max)[1]


def random_grids(count: int, shape: BoxShape, rng: np.random.Generator) -> Grids:
    """`count` complete grids `[count, cells]`, each filled by random choices and started anew at a dead end."""
    full = full_mask(shape)
    states = np.full((shape.cells, count), full)
    grids: list[Grids] = [np.empty((0, shape.cells), dtype=np.uint8)]
    while states.shape[1]:
        step = propagate(states, shape)
        grids.append(DIGIT[step.states[:, step.solved].T])
        step.states[:, step.stuck] = _guess(step.states[:, step.stuck], shape, rng)
        step.states[:, step.dead] = full
        states = step.states[:, ~step.solved]
    return np.concatenate(grids)


def _guess(states: Masks, shape: BoxShape, rng: np.random.Generator) -> Masks:
    """Settles one open cell of fewest candidates in each state, cell and digit drawn at random."""
    boards = np.arange(states.shape[1])
    counts = POPCOUNT[states]
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
        others = candidate_masks(puzzles[open_], shape)
        others[np.arange(open_.size), cell] ^= full_mask(shape)
        needed, _ = search(others, shape, limit=1)
        spared = np.ones(open_.size, dtype=bool)
        spared[needed] = False
        puzzles[open_[spared], cell[spared]] = 0
    return puzzles


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
