"""The search for the solutions of one board, against the solver of many and on boards that are known to be hard."""

import time

import numpy as np
import pytest

from hrm.data.builders.sudoku_puzzles import dig_holes, random_grids
from hrm.tasks.base import Solutions
from hrm.tasks.sudoku import BoxShape, is_solved, parse_grid
from hrm.tasks.sudoku_search import find_solutions

# Norvig's: no rule is broken, but there is no solution; his solver looked for 24 minutes.
UNSOLVABLE = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
# In each, some cell is left without a digit, or some box, column or row without a place for one.
NO_PLACE = [
    "..9.287..8.6..4..5..3.....46.........2.71345.........23.....5..9..4..8.7..125.3..",
    ".9.3....1....8..46......8..4.5.6..3...32756...6..1.9.4..1......58..2....2....7.6.",
    "....41....6.....2...2......32.6.........5..417.......2......23..48......5.1..2...",
    "..9.7...5..21..9..1...28....7...5..1..851......5....3.......3..68........21.....7",
]
HARD = [
    "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......",
    "..............3.85..1.2.......5.7.....4...1...9.......5......73..2.1........4...9",
    "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..",
]
NINE = BoxShape(3, 3)


def solutions_of(text: str, **options: float) -> Solutions:
    shape = BoxShape.from_cells(len(text))
    return find_solutions(parse_grid(text, shape), shape, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [UNSOLVABLE, *NO_PLACE])
def test_boards_without_solution(text: str) -> None:
    started = time.process_time()
    assert solutions_of(text) == ([], True)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", HARD)
def test_hard_boards_have_one(text: str) -> None:
    found = solutions_of(text)
    assert found.is_complete
    assert found.only is not None
    puzzle = parse_grid(text, NINE)
    assert is_solved(found.only.astype(np.uint8), NINE)
    assert (found.only[puzzle > 0] == puzzle[puzzle > 0]).all()


@pytest.mark.parametrize("text", ["." * 16, "." * 36, "." * 81, "1" + "." * 80])
def test_boards_with_several(text: str) -> None:
    found = solutions_of(text)
    assert not found.is_complete
    assert found.only is None
    first, second = found.answers
    assert is_solved(first.astype(np.uint8), BoxShape.from_cells(len(text)))
    assert is_solved(second.astype(np.uint8), BoxShape.from_cells(len(text)))
    assert (first != second).any()


def test_givens_that_clash_leave_no_solution() -> None:
    assert solutions_of("11" + "." * 14) == ([], True)
    assert solutions_of("1..." + ".1.." + "." * 8) == ([], True)


def test_all_boards_of_four_by_four_are_found() -> None:
    found = solutions_of("." * 16, limit=1000)
    assert found.is_complete
    assert len({bytes(grid) for grid in found.answers}) == 288


@pytest.mark.parametrize(("shape", "givens"), [(BoxShape(2, 2), 5), (BoxShape(2, 3), 12), (NINE, 26)])
def test_dug_boards_have_the_grid_they_were_dug_from(shape: BoxShape, givens: int) -> None:
    rng = np.random.default_rng(0)
    grids = random_grids(5, shape, rng)
    for puzzle, grid in zip(dig_holes(grids, givens, shape, rng), grids, strict=True):
        found = find_solutions(puzzle, shape)
        assert found.is_complete
        np.testing.assert_array_equal(found.only, grid)


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_the_search_ends_in_time_and_says_so(seconds: float) -> None:
    started = time.process_time()
    found = solutions_of("." * 81, limit=10**9, seconds=seconds)
    assert not found.is_complete
    assert time.process_time() - started < seconds + 5
