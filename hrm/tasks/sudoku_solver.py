"""A Sudoku solver that works on many boards at once.

It holds a board as one bit mask of possible digits per cell and works on `[cells, boards]` arrays, boards last, so that
every numpy call runs over many boards.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrm.tasks.sudoku import UNITS, BoxShape, Grids, Masks, once_and_twice, unit_view

# Boards worked on together: enough to hide the cost of a numpy call, few enough to stay in the cache.
_WIDTH = 2048

_MASKS = np.arange(1 << 9)
POPCOUNT = ((_MASKS[:, None] >> np.arange(9)) & 1).sum(1).astype(np.uint8)
DIGIT = np.zeros(1 << 9, dtype=np.uint8)  # of a mask with a single bit
DIGIT[1 << np.arange(9)] = np.arange(1, 10)


def full_mask(shape: BoxShape) -> np.uint16:
    return np.uint16((1 << shape.side) - 1)


def candidate_masks(puzzles: Grids, shape: BoxShape) -> Masks:
    """Possible digits `[..., cells]` as bits (digit d is bit d-1) before any reasoning: all in a blank."""
    bits = np.left_shift(1, np.maximum(puzzles, 1) - np.uint8(1), dtype=np.uint16)
    return np.where(puzzles == 0, full_mask(shape), bits)


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


def propagate(states: Masks, shape: BoxShape) -> _Step:
    """One round of naked singles (a cell with one digit) and hidden singles (a digit with one cell in a unit)."""
    view = unit_view(states, shape)
    full = full_mask(shape)
    settled = np.where(_is_single(view), view, np.uint16(0))
    taken, only = np.zeros_like(view), np.zeros_like(view)
    dead = (states == 0).any(0)
    for unit in UNITS:
        placeable, ambiguous = once_and_twice(view, unit)
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


def search(
    candidates: Masks, shape: BoxShape, limit: int, deadline: float = math.inf
) -> tuple[NDArray[np.intp], Grids]:
    """Solutions of many boards at once, by propagation and by splitting the cell of fewest candidates.

    Args:
        candidates: possible digits, uint16 `[boards, cells]`.
        limit: a board is left alone once it has so many solutions (those of its last round may exceed it).
        deadline: when to end with what was found, by `time.monotonic()`.

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
    while (owner.size or entered < len(candidates)) and time.monotonic() < deadline:
        if owner.size < _WIDTH and entered < len(candidates):
            entering = np.arange(entered, min(entered + _WIDTH - owner.size, len(candidates)))
            owner = np.concatenate([entering, owner])
            states = np.concatenate([candidates[entering].T, states], axis=1)
            entered += entering.size

        top_owner = owner[-_WIDTH:]
        step = propagate(states[:, -_WIDTH:], shape)
        if step.solved.any():
            owners.append(top_owner[step.solved])
            solutions.append(DIGIT[step.states[:, step.solved].T])
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
    counts = POPCOUNT[states]
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
    owners, _ = search(candidate_masks(boards, shape), shape, limit)
    return np.minimum(np.bincount(owners, minlength=len(boards)), limit).reshape(puzzles.shape[:-1])


def count_ambiguous(puzzles: Grids, shape: BoxShape, seconds: float) -> tuple[int, int]:
    """How many of the puzzles `[N, cells]` have several solutions, and how many were looked at in so many seconds."""
    deadline = time.monotonic() + seconds
    ambiguous = checked = 0
    while checked < len(puzzles) and time.monotonic() < deadline:
        boards = puzzles[checked : checked + _WIDTH]
        owners, _ = search(candidate_masks(boards, shape), shape, 2, deadline)
        ambiguous += int(np.count_nonzero(np.bincount(owners, minlength=len(boards)) > 1))
        checked += len(boards)
    return ambiguous, checked


def solve(puzzles: Grids, shape: BoxShape) -> Grids:
    """The only solution of each puzzle, shaped like `puzzles`; all zeros where there is none or more than one."""
    boards = puzzles.reshape(-1, shape.cells)
    owners, found = search(candidate_masks(boards, shape), shape, limit=2)
    unique = np.bincount(owners, minlength=len(boards))[owners] == 1
    solutions = np.zeros_like(boards)
    solutions[owners[unique]] = found[unique]
    return solutions.reshape(puzzles.shape)
