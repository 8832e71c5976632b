"""The trained models that come with the package."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hrm
from hrm.checkpoint.weights import PRETRAINED, find_checkpoint, pretrained
from hrm.data.builders.maze import least_moves
from hrm.data.builders.maze_puzzles import random_mazes
from hrm.errors import UserError
from hrm.tasks.form import PuzzleForm
from hrm.tasks.maze import CHARSET, TASK, is_shortest_path
from hrm.tasks.sudoku import BoxShape, parse_grid
from hrm.tasks.sudoku_solver import solve
from tests.helpers.entry_points import CPU, run_script

# Random puzzles of the kind that newspapers print, and one that is printed as the hardest of all.
BOARDS = [
    "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79",
    "..3.2.6..9..3.5..1..18.64....81.29..7.......8..67.82....26.95..8..2.3..9..5.1.3..",
    "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..",
]


def test_what_there_is() -> None:
    stored = {
        "maze": {torch.int8, torch.float32},
        "sudoku": {torch.bfloat16},
        "sudoku_small": {torch.bfloat16},
    }
    assert pretrained() == [*stored]
    for name, dtypes in stored.items():
        file = find_checkpoint(name).weights_file
        assert file.parent == PRETRAINED / name
        assert file.suffix == ".safetensors"
        assert file.stat().st_size < 10e6
        assert {tensor.dtype for tensor in load_file(file).values()} == dtypes


def assert_solved(checkpoint: str | Path, puzzle: str) -> None:
    assert (solve(parse_grid(puzzle, BoxShape(3, 3)), BoxShape(3, 3)) > 0).all()
    outcome = run_script(
        "evaluate.py", *CPU, f"checkpoint={checkpoint}", f"puzzle={puzzle}", "ensemble.augmentations=8"
    )
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].startswith("Solved: this is the only solution.")
    assert outcome.out.count("[") == 1  # the legend's


@pytest.mark.parametrize("puzzle", BOARDS)
@pytest.mark.parametrize("name", ["sudoku", "sudoku_small"])
def test_sudoku_is_solved(name: str, puzzle: str, tmp_path: Path) -> None:
    """In float32, which all CPUs multiply fast."""
    run = Path(shutil.copytree(PRETRAINED / name, tmp_path / "sudoku"))
    config = (run / "all_config.yaml").read_text()
    assert "forward_dtype: bfloat16" in config
    (run / "all_config.yaml").write_text(config.replace("forward_dtype: bfloat16", "forward_dtype: float32"))
    assert_solved(run, puzzle)


@pytest.mark.slow
def test_sudoku_is_solved_as_it_comes() -> None:
    """In bfloat16, which a CPU without instructions for it takes ten seconds or more for."""
    assert_solved("sudoku_small", BOARDS[-1])


def test_a_maze_is_solved() -> None:
    """One that `hrm data maze --generate 30x30` makes, by another seed than the training mazes'."""
    maze = random_mazes(1, 30, least_moves(30), np.random.default_rng(0))[0].reshape(1, 900)
    model = hrm.from_pretrained("maze", device="cpu")
    found = model.predict("".join(CHARSET[token - 1] for token in maze[0]))
    assert is_shortest_path(maze, found.answers).all()
    assert found.steps < 16


def test_the_example_of_the_page_is_solved_soon() -> None:
    model = hrm.from_pretrained("maze", device="cpu")
    (puzzle,) = model.task.puzzles_of(model.task.example(model.form), model.form)
    found = model.predict(puzzle.tokens[None], tokens=True, act_max_steps=4)
    assert is_shortest_path(puzzle.tokens[None].astype(np.uint8), found.answers.astype(np.uint8)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda maze: maze.replace("G", " "), "A maze to solve has one S, one G and no o."),
        (lambda maze: "x" + maze[1:], "Character 1 of the maze is 'x'"),
        (lambda maze: maze[1:], "No maze has 899 cells"),
        (lambda _: "S" + " " * 62 + "G", "the puzzle has 64 cells, but those that"),
    ],
)
def test_a_text_is_read_as_the_model_s_task(change: Callable[[str], str], words: str) -> None:
    maze = TASK.example(PuzzleForm("maze", 900, 6)).replace("\n", "")
    outcome = run_script("evaluate.py", *CPU, "checkpoint=maze", f"puzzle='{change(maze)}'")
    assert outcome.status == 2
    assert words in outcome.err


def test_a_run_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sudoku").mkdir()
    with pytest.raises(UserError, match="sudoku holds no weights"):
        find_checkpoint("sudoku")


def test_another_name_is_told_what_there_is() -> None:
    with pytest.raises(UserError, match="comes with this package: maze, sudoku, sudoku_small"):
        find_checkpoint("sudoko")
