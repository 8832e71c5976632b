"""What tasks say of themselves: rules and symmetries that agree, inputs read and refused."""

import numpy as np
import pytest
import torch

from hrm.data.builders.maze_puzzles import random_mazes, shortest_paths
from hrm.data.builders.sudoku_puzzles import dig_holes, random_grids
from hrm.errors import UserError
from hrm.evaluation.symmetries import DeviceSymmetry
from hrm.tasks import all_tasks, parse_puzzle
from hrm.tasks.base import PuzzleSize, Tokens
from hrm.tasks.form import PuzzleForm
from hrm.tasks.maze import PATH, is_maze, is_shortest_path
from hrm.tasks.sudoku import BoxShape, decode_tokens, encode_tokens, is_solved
from hrm.tasks.sudoku_solver import count_solutions

SUDOKU, MAZE, ARC, TOKENS = (all_tasks()[name] for name in ("sudoku", "maze", "arc", "tokens"))


@pytest.mark.parametrize("box", ["2x2", "2x3", "3x3"])
def test_sudoku_symmetries_keep_the_rules(box: str) -> None:
    shape = BoxShape.parse(box)
    boards = encode_tokens(random_grids(5, shape, np.random.default_rng(0)))
    boards[0, :3] = 1  # blanks stay blank
    puzzles = boards.astype(np.int32)
    symmetries = SUDOKU.symmetries(PuzzleSize(shape.cells, shape.vocab_size), 6)
    images = [symmetry.apply(puzzles) for symmetry in symmetries]
    assert np.array_equal(images[0], puzzles)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 6
    for symmetry, image in zip(symmetries, images, strict=True):
        grids = decode_tokens(image)
        assert is_solved(grids[1:], shape).all()
        assert (grids[0] == 0).sum() == 3
        assert count_solutions(grids[:1], shape)[0] >= 1
        assert np.array_equal(symmetry.undo(image), puzzles)
        on_device = DeviceSymmetry.of(symmetry, torch.device("cpu"))
        assert on_device.apply(torch.from_numpy(puzzles)).tolist() == image.tolist()
        assert on_device.undo(torch.from_numpy(image)).tolist() == puzzles.tolist()


def solved_mazes() -> tuple[Tokens, Tokens]:
    """Three mazes of 8 x 8 cells and a shortest path through each, [3, 64]."""
    mazes, _ = random_mazes(3, 8, 10, np.random.default_rng(0))
    inputs = mazes.reshape(3, 64).astype(np.int32)
    answers = shortest_paths(mazes).reshape(3, 64).astype(np.int32)
    return inputs, answers


def test_maze_symmetries_keep_shortest_paths() -> None:
    inputs, answers = solved_mazes()
    symmetries = MAZE.symmetries(PuzzleSize(64, 6), 8)
    assert len({tuple(symmetry.cells.tolist()) for symmetry in symmetries}) == 8
    for symmetry in symmetries:
        assert is_shortest_path(symmetry.apply(inputs), symmetry.apply(answers)).all()
        assert np.array_equal(symmetry.undo(symmetry.apply(inputs)), inputs)


@pytest.mark.parametrize("box", ["2x2", "2x3", "3x3"])
def test_rules_of_sudoku(box: str) -> None:
    shape = BoxShape.parse(box)
    solution = encode_tokens(random_grids(1, shape, np.random.default_rng(0))).astype(np.int32)
    puzzle = solution.copy()
    puzzle[0, ::2] = 1
    swapped = np.where(solution == 2, 3, np.where(solution == 3, 2, solution))  # right, but for another puzzle
    clashing, blank, padded = solution.copy(), solution.copy(), solution.copy()
    clashing[0, 0] = clashing[0, 2]
    blank[0, 0], padded[0, 0] = 1, 0
    answers = np.concatenate([solution, swapped, clashing, blank, padded])
    rules = SUDOKU.rules(PuzzleSize(shape.cells, shape.vocab_size))
    assert rules is not None
    assert rules.keeps(np.repeat(puzzle, 5, axis=0), answers).tolist() == [True, False, False, False, False]


def test_rules_of_mazes_are_shortest_paths() -> None:
    inputs, answers = solved_mazes()
    rules = MAZE.rules(PuzzleSize(64, 6))
    assert rules is not None
    assert rules.keeps(inputs, answers).all()
    assert not rules.keeps(inputs, inputs).any()


def test_a_solver_gives_the_only_answer() -> None:
    shape = BoxShape(2, 3)
    solutions = random_grids(4, shape, np.random.default_rng(0))
    puzzles = dig_holes(solutions, 14, shape, np.random.default_rng(1))
    puzzles[3] = 0
    rules = SUDOKU.rules(PuzzleSize(36, 8))
    assert rules is not None
    assert rules.solve is not None
    found = [rules.solve(puzzle) for puzzle in encode_tokens(puzzles)]
    for only, expected in zip(found[:3], encode_tokens(solutions[:3]), strict=True):
        np.testing.assert_array_equal(only.only, expected)
    assert len(found[3].answers) == 2
    assert found[3].only is None


@pytest.mark.parametrize(
    ("text", "vocab_size", "task", "length"),
    [
        ("1..." + "." * 12, 6, SUDOKU, 16),
        ("S  #" + "#  G" * 3, 6, SUDOKU, 0),
        ("S #\n#  \n##G", 6, MAZE, 9),
        ("." * 81, 11, SUDOKU, 81),
        ("." * 81, 6, SUDOKU, 81),  # fits nothing: the caller says so
    ],
)
def test_puzzles_as_they_are_typed(text: str, vocab_size: int, task: object, length: int) -> None:
    if not length:
        with pytest.raises(UserError):
            parse_puzzle(text, vocab_size)
        return
    found, inputs = parse_puzzle(text, vocab_size)
    assert (found, len(inputs)) == (task, length)


def test_a_task_that_is_named_is_not_guessed() -> None:
    with pytest.raises(UserError, match="Character 1 of the maze is '1'"):
        parse_puzzle("1...............", 6, "maze")
    with pytest.raises(UserError, match="symbols are no single characters"):
        parse_puzzle("ab", 300, "tokens")


@pytest.mark.parametrize("box", ["2x2", "2x3", "3x3"])
def test_the_example_board_has_one_solution(box: str) -> None:
    shape = BoxShape.parse(box)
    form = PuzzleForm("sudoku", shape.cells, shape.vocab_size)
    (puzzle,) = SUDOKU.puzzles_of(SUDOKU.example(form), form)
    assert count_solutions(decode_tokens(puzzle.tokens[None]), shape)[0] == 1


@pytest.mark.parametrize("side", [2, 3, 5, 30])
def test_the_example_maze_has_a_long_path(side: int) -> None:
    form = PuzzleForm("maze", side**2, 6)
    (puzzle,) = MAZE.puzzles_of(MAZE.example(form), form)
    maze = puzzle.tokens.astype(np.uint8).reshape(1, side, side)
    assert is_maze(puzzle.tokens[None])[0]
    assert (shortest_paths(maze) == PATH).sum() >= side - 2
    assert MAZE.example(form) == MAZE.example(form)


def test_a_maze_is_read_in_any_line_ends() -> None:
    maze = "S #\n   \n# G"
    assert MAZE.parse_input(maze.replace("\n", "\r\n"), PuzzleSize(9, 6)).tolist() == [3, 2, 1, 2, 2, 2, 1, 2, 4]


def test_a_maze_without_a_path_is_told_so() -> None:
    with pytest.raises(UserError, match="No path leads from S to G"):
        MAZE.parse_input("S# ## # G", PuzzleSize(9, 6))
