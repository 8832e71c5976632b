"""Boards on the terminal and as pictures: every cell is of the right kind and stands in the right place."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hrm.batch import IGNORE_LABEL_ID
from hrm.evaluation.report.boards import Board, Cell, outcome_of
from hrm.evaluation.report.drawings import draw_boards
from hrm.evaluation.report.text import LEGEND, legend_of, render_text
from hrm.tasks import all_tasks
from hrm.tasks.base import PuzzleSize, Solutions, View
from hrm.tasks.maze import parse_maze
from hrm.tasks.sudoku import BoxShape, Grids, encode_tokens, parse_grid
from tests.helpers.recordings import ARC_VIEW, Tokens, corner, maze_view

PUZZLE_4 = "1... .... .... ...1"
SOLUTION_4 = "1234 3412 2143 4321"
OTHER_SOLUTION_4 = "1324 2413 3142 4231"

PUZZLE_6 = "1..... ....2. ..1... ...2.. .1.... .....2"
SOLUTION_6 = "123456 456123 231564 564231 312645 645312"

PUZZLE_9 = (
    "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"  # Wikipedia's example
)
SOLUTION_9 = "534678912 672195348 198342567 859761423 426853791 713924856 961537284 287419635 345286179"


def grid(text: str) -> Grids:
    return np.array([int(cell) for cell in text.replace(" ", "").replace(".", "0")], dtype=np.uint8)


def board(puzzle: str, answer: str, solution: str | None, title: str = "") -> Board:
    """As evaluate.py makes one of Sudoku, by the solution or by the rules."""
    task, (inputs, tokens) = all_tasks()["sudoku"], (encode_tokens(grid(text)) for text in (puzzle, answer))
    size = PuzzleSize(len(inputs), round(len(inputs) ** 0.5) + 2)
    rules = task.rules(size)
    assert rules is not None
    assert rules.broken_at is not None
    if solution is not None:
        return Board(task.view(size), inputs, tokens, encode_tokens(grid(solution)), title=title)
    (broken,) = rules.broken_at(inputs[None], tokens[None])
    return Board(task.view(size), inputs, tokens, broken=broken, title=title)


def kinds(shown: Board) -> str:
    """The cells' kinds, by rows: given, right, wrong."""
    letters = "".join({Cell.GIVEN: "g", Cell.RIGHT: "r", Cell.WRONG: "w"}[Cell(kind)] for kind in shown.cells())
    side = shown.columns
    return " ".join(letters[start : start + side] for start in range(0, len(letters), side))


# --- kinds of cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SOLUTION_4, "grrr rrrr rrrr rrrg"),
        ("1243 3412 2143 4321", "grww rrrr rrrr rrrg"),
        ("1.34 3412 2143 4321", "gwrr rrrr rrrr rrrg"),
        ("2234 3412 2143 4321", "wrrr rrrr rrrr rrrg"),
        (".234 3412 2143 4321", "wrrr rrrr rrrr rrrg"),
        (OTHER_SOLUTION_4, "gwwr wrrw wrrw rwwg"),
    ],
    ids=["solved", "swapped", "blank", "given changed", "given erased", "right by the rules only"],
)
def test_cells_with_a_solution(answer: str, expected: str) -> None:
    shown = board(PUZZLE_4, answer, SOLUTION_4)
    assert kinds(shown) == expected
    assert shown.num_wrong() == expected.count("w")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SOLUTION_4, "grrr rrrr rrrr rrrg"),
        (OTHER_SOLUTION_4, "grrr rrrr rrrr rrrg"),
        ("1233 3412 2144 4321", "grww rrrr rrww rrrg"),
        ("1134 3412 2143 4321", "gwrr rrrr rwrr rrrg"),
        ("1234 3412 2143 43.1", "grrr rrrr rrrr rrwg"),
        ("2134 3412 1243 4321", "wrrr rrrr rrrr rrrg"),
        (".234 3412 2143 4321", "wrrr rrrr rrrr rrrg"),
        (".... .... .... ....", "wwww wwww wwww wwww"),
    ],
    ids=[
        "solved",
        "another solution",
        "conflicts",
        "conflict with a given, which stays right",
        "blank",
        "given changed within the rules",
        "given erased",
        "nothing answered",
    ],
)
def test_cells_without_a_solution(answer: str, expected: str) -> None:
    shown = board(PUZZLE_4, answer, None)
    assert kinds(shown) == expected
    assert shown.num_wrong() == expected.count("w")


@pytest.mark.parametrize(
    ("puzzle", "solution", "cell", "digit", "wrong"),
    [
        # The changed cell and its peer of that digit in row, column and box, those left out that are given.
        (PUZZLE_6, SOLUTION_6, 8, 2, {8, 26, 1}),
        (PUZZLE_9, SOLUTION_9, 5, 1, {5, 7, 32}),
    ],
    ids=["6x6", "9x9"],
)
def test_conflicts_follow_the_boxes(puzzle: str, solution: str, cell: int, digit: int, wrong: set[int]) -> None:
    answer = grid(solution)
    answer[cell] = digit
    found = board(puzzle, "".join(map(str, answer)), None).cells() == Cell.WRONG
    assert set(np.flatnonzero(found).tolist()) == wrong


# --- text ------------------------------------------------------------------------------------------------------------

TEXT_4 = """\
┌──────┬──────┐
│ 1 ·2·│[4][3]│
│·3··4·│·1··2·│
├──────┼──────┤
│·2··1·│·4··3·│
│·4··3·│[.] 1 │
└──────┴──────┘"""

TEXT_6 = """\
┌─────────┬─────────┐
│ 1 ·2··3·│·4··5··6·│
│·4··5··6·│·1· 2 ·3·│
├─────────┼─────────┤
│·2··3· 1 │·5··6·[5]│
│·5··6··4·│ 2 ·3··1·│
├─────────┼─────────┤
│·3· 1 ·2·│·6··4··5·│
│[.]·4··5·│·3··1· 2 │
└─────────┴─────────┘"""

TEXT_9 = """\
┌─────────┬─────────┬─────────┐
│ 5  3 ·4·│·6· 7 ·8·│·9··1·[3]│
│ 6 ·7··2·│ 1  9  5 │·3··4··8·│
│·1· 9  8 │·3··4··2·│·5· 6 ·7·│
├─────────┼─────────┼─────────┤
│ 8 ·5··9·│·7· 6 ·1·│·4··2· 3 │
│ 4 ·2··6·│ 8 ·5· 3 │·7··9· 1 │
│ 7 ·1··3·│·9· 2 ·4·│·8··5· 6 │
├─────────┼─────────┼─────────┤
│·9· 6 ·1·│·5··3··7·│ 2  8 ·4·│
│·2··8··7·│ 4  1  9 │·6··3· 5 │
│[1]·4··5·│·2· 8 ·6·│·1· 7  9 │
└─────────┴─────────┴─────────┘"""

BOARDS = {
    "4x4": (board(PUZZLE_4, "1243 3412 2143 43.1", SOLUTION_4), TEXT_4),
    "6x6": (board(PUZZLE_6, "123456 456123 231565 564231 312645 .45312", SOLUTION_6), TEXT_6),
    "9x9": (
        board(
            PUZZLE_9,
            "534678913 672195348 198342567 859761423 426853791 713924856 961537284 287419635 145286179",
            SOLUTION_9,
        ),
        TEXT_9,
    ),
}


@pytest.mark.parametrize("size", BOARDS)
def test_text(size: str) -> None:
    shown, text = BOARDS[size]
    assert render_text(shown, color=False).splitlines() == text.splitlines()


@pytest.mark.parametrize("size", BOARDS)
def test_colour_changes_nothing_else(size: str) -> None:
    shown, text = BOARDS[size]
    coloured = render_text(shown, color=True)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == text
    # Every cell is coloured for itself and reset at once, each kind in a way of its own.
    cells = re.findall(r"\x1b\[([\d;]+)m([ ·\[][\d.][ ·\]])\x1b\[0m", coloured)
    assert len(cells) == len(shown.inputs)
    codes = {mark: {code for code, cell in cells if cell[0] == mark} for mark in " ·["}
    assert all(len(of_kind) == 1 for of_kind in codes.values())
    assert len(set.union(*codes.values())) == 3


def test_title_stands_above() -> None:
    shown = board(PUZZLE_4, "1243 3412 2143 43.1", SOLUTION_4, title="test puzzle 7")
    assert render_text(shown, color=False).splitlines() == ["test puzzle 7", *TEXT_4.splitlines()]


def test_legend_shows_the_marks_in_use() -> None:
    shown = render_text(board(PUZZLE_4, "1243 3412 2143 43.1", SOLUTION_4), color=False)
    for mark, meaning in ((" {} ", "given"), ("·{}·", "right"), ("[{}]", "wrong")):
        example = re.search(rf"{re.escape(mark.format('5'))} .*?{meaning}", LEGEND)
        assert example, meaning
        assert re.search(re.escape(mark).replace(r"\{\}", r"\d"), shown)


def test_grids_of_other_symbols() -> None:
    """Words as wide as the widest, and cells that may stay blank without marks."""
    view = View(("", "_", "a", "bcd"), columns=2, blank=1)
    shown = Board(view, np.array([2, 1, 1, 1]), np.array([2, 3, 1, 2]), np.array([2, 3, 1, 3]))
    assert render_text(shown, color=False).splitlines() == [
        "┌──────────┐",
        "│  a  ·bcd·│",
        "│  _  [ a ]│",
        "└──────────┘",
    ]
    assert outcome_of(shown, None) == "1 of 4 cells are wrong."


@pytest.mark.parametrize(
    ("count", "is_complete", "words"),
    [
        (0, True, "cells are wrong. The puzzle has no solution."),
        (0, False, "cells are wrong. No solution was found in time."),
        (1, True, "Solved: this is the only solution."),
        (1, False, "Solved; whether there is another solution was not found out in time."),
        (2, False, "Solved: this is one of several solutions."),
    ],
)
def test_what_was_found_of_the_solutions_is_told(count: int, is_complete: bool, words: str) -> None:
    rules = all_tasks()["sudoku"].rules(PuzzleSize(16, 6))
    answer = encode_tokens(parse_grid("1234341221434321", BoxShape(2, 2)))
    solutions = Solutions([answer] * count, is_complete)
    broken = np.full(16, count == 0)
    board = Board(all_tasks()["sudoku"].view(PuzzleSize(16, 6)), np.ones(16, np.uint8), answer, solutions.only, broken)
    assert outcome_of(board, rules, solutions).endswith(words)


# --- mazes, coloured grids and what is no grid ------------------------------------------------------------------------

MAZE_SOLVED = "Soo# #o# #oo   G"


def maze_board(answer: str) -> Board:
    """A maze of 4x4 with one right answer, of which the first column is free."""
    maze, solution = "S  #" + " # #" + " #  " + "   G", "Soo#" + " #o#" + " #oo" + "   G"
    return Board(maze_view(4), parse_maze(maze), parse_maze(answer), parse_maze(solution))


def test_mazes_show_walls_the_path_and_what_is_wrong_with_it() -> None:
    answer = "So #" + "o#o#" + " #o#" + "   G"
    shown = maze_board(answer)
    assert render_text(shown, color=False).splitlines() == [
        "┌────────┐",
        "│S ••○○██│",
        "│××██••██│",
        "│  ██••○○│",
        "│      G │",
        "└────────┘",
    ]
    assert outcome_of(shown, None) == "3 of 16 cells are wrong."
    unknown = replace(shown, solution=None, answer=parse_maze("So #" + "oo #" + "## #" + "   G"))
    assert render_text(unknown, color=False).splitlines()[1:4] == ["│S ••  ██│", "│••××  ██│", "│??██  ??│"]


SMALL = np.array([[1, 1], [3, 4]], dtype=np.uint8)


def colored(answer: Tokens) -> Board:
    """An ARC puzzle: a row of three colours, to be answered by two rows of them."""
    inputs, truth = np.array([[0, 1, 2]], dtype=np.uint8), np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    labels = corner(truth)[0].astype(np.int64)
    return Board(ARC_VIEW, corner(inputs)[0], corner(answer)[0], np.where(labels == 0, IGNORE_LABEL_ID, labels))


def test_coloured_grids_stand_beside_input_and_truth() -> None:
    shown = colored(SMALL)
    assert render_text(shown, color=False, width=80).splitlines() == [
        "input 1x3   answer 2x2   truth 2x3",
        " 0 1 2      ×1 1×·        0 1 2",
        "             3 4×·        3 4 5",
    ]
    assert outcome_of(shown, None) == "3 of 6 cells are wrong."
    right = colored(np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8))
    assert outcome_of(right, None) == "Right in every cell."
    too_many = colored(np.arange(9, dtype=np.uint8).reshape(3, 3))
    assert too_many.num_wrong() == 3
    nothing = replace(shown, answer=np.zeros(900, dtype=np.uint8))
    assert "answer 0x0" in render_text(nothing, width=80)
    assert nothing.num_wrong() == 6
    alone = render_text(replace(shown, solution=None), color=False, width=80)
    assert "truth" not in alone
    assert "×" not in alone


def test_grids_that_do_not_fit_stand_below_each_other() -> None:
    lines = render_text(colored(SMALL), color=False, width=20).splitlines()
    assert lines == ["input 1x3", " 0 1 2", "answer 2x2", "×1 1×·", " 3 4×·", "truth 2x3", " 0 1 2", " 3 4 5"]


@pytest.mark.parametrize("shown", [colored(SMALL), maze_board("So #" + "o#o#" + " #o#" + "   G")], ids=["arc", "maze"])
def test_colour_changes_nothing_else_in_grids(shown: Board) -> None:
    plain = render_text(shown, color=False, width=80)
    coloured = render_text(shown, color=True, width=80)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert len(set(re.findall(r"\x1b\[([\d;]+)m", coloured))) >= 5


def test_lists_are_written_one_below_the_other() -> None:
    view = View(("", "a", "bc"))
    shown = Board(view, np.array([1, 2, 1]), np.array([2, 2, 1]), np.array([1, 2, IGNORE_LABEL_ID]))
    assert render_text(shown, color=False, width=20).splitlines() == [
        "input",
        "┌────────────┐",
        "│ a   bc  a  │",
        "└────────────┘",
        "answer",
        "┌────────────┐",
        "│[bc]·bc· a  │",
        "└────────────┘",
        "truth",
        "┌────────────┐",
        "│ a   bc     │",
        "└────────────┘",
    ]
    assert outcome_of(shown, None) == "1 of 2 cells are wrong."


# --- pictures --------------------------------------------------------------------------------------------------------


def png_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels; fails for what is no PNG."""
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:])
    return width, height


@pytest.mark.parametrize("size", BOARDS)
def test_picture(size: str, tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    shown, _ = BOARDS[size]
    assert shown.solution is not None
    solved = replace(shown, answer=shown.solution)
    open_before = plt.get_fignums()
    draw_boards([shown], tmp_path / "wrong.png")
    draw_boards([solved], tmp_path / "right.png")
    draw_boards([shown, solved, shown], tmp_path / "three.png")
    width, height = png_size(tmp_path / "wrong.png")
    assert min(width, height) >= 300
    assert png_size(tmp_path / "three.png") == (3 * width, height)
    pixels = [plt.imread(tmp_path / f"{name}.png") for name in ("wrong", "right", "three")]
    assert all(image.std() > 0.05 for image in pixels), "an empty picture"
    assert not np.array_equal(pixels[0], pixels[1]), "wrong cells look like right ones"
    assert plt.get_fignums() == open_before, "figures are left open"


def test_pictures_of_grids_and_mazes(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    backend = plt.get_backend()
    for name, boards in {
        "arc": [colored(SMALL)],
        "arcs": [colored(SMALL), colored(SMALL)],
        "maze": [maze_board("So #" + "o#o#" + " #o#" + "   G")],
        "solved": [maze_board(MAZE_SOLVED)],
    }.items():
        draw_boards(boards, tmp_path / f"{name}.png")
    (width, height), (_, twice) = png_size(tmp_path / "arc.png"), png_size(tmp_path / "arcs.png")
    assert width > 2 * height, "input, answer and truth side by side"
    assert twice > 1.5 * height
    assert not np.array_equal(plt.imread(tmp_path / "maze.png"), plt.imread(tmp_path / "solved.png"))
    assert plt.get_backend() == backend, "a notebook's pictures go on showing"


def test_legend_calls_nothing_right_that_nobody_knows() -> None:
    by_rules = board(PUZZLE_4, SOLUTION_4, None)
    assert "against the rules" in legend_of(by_rules)
    assert "right" not in legend_of(by_rules)
    alone = legend_of(replace(by_rules, broken=None))
    assert not any(mark in alone for mark in ("right", "wrong", "against"))
    assert legend_of(board(PUZZLE_4, SOLUTION_4, SOLUTION_4)) == LEGEND
    for shown in (colored(SMALL), maze_board(MAZE_SOLVED)):
        assert "missing" in legend_of(shown) or "missed" in legend_of(shown)
        assert not any(mark in legend_of(replace(shown, solution=None)) for mark in ("right", "wrong", "miss"))
