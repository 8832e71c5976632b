"""What builders say of puzzles that somebody else made: test puzzles in train, repeats, boards of several solutions."""

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.builders import arc, custom, maze, sudoku
from hrm.data.builders.common import count_known, count_repeats, remarks
from hrm.tasks.sudoku import BoxShape
from hrm.tasks.sudoku_solver import count_ambiguous

GRIDS = ["1234341221434321", "1234341243212143", "2143432112343412", "3412123443212143"]


def with_blanks(grid: str, *cells: int) -> list[str]:
    return ["".join("." if cell in cells else digit for cell, digit in enumerate(grid)), grid]


def write_csv(file: Path, rows: Sequence[Sequence[str]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer"], *rows])


def said(builder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The summary without what it always says: from the time taken on."""
    assert builder.main([*map(str, arguments), "--output-dir", str(tmp_path / "pack")]) == 0
    return capsys.readouterr().out.strip().partition(" s; ")[2]


def test_counting() -> None:
    rows = np.array([[1, 2], [3, 4], [1, 2], [1, 2]])
    assert count_repeats(rows) == 2
    assert count_repeats(rows[:2]) == 0
    assert count_known(rows, np.array([[1, 2], [9, 9]])) == 3
    assert count_known(rows[:0], rows) == 0
    assert remarks({"apples": 0, "pears": 1200}) == "; 1,200 pears"


@pytest.mark.parametrize(
    ("train", "test", "remark"),
    [
        ([(0, 0), (1, 0)], [(2, 0), (3, 0)], ""),
        (
            [(0, 0), (1, 0)],
            [(0, 0), (1, 3)],
            "1 test puzzles are also trained on; 2 test puzzles have the solution of a training puzzle",
        ),
        ([(0, 0), (0, 0), (1, 0)], [(2, 0)], "1 train puzzles repeat another one"),
        ([(0, 0)], [(2, 1), (2, 1), (2, 1)], "2 test puzzles repeat another one"),
        ([(0, *range(12)), (1, 1)], [(2, 1)], "1 train puzzles have several solutions"),
        ([(0, 1)], [(2, *range(16)), (3, *range(4, 16))], "2 test puzzles have several solutions"),
    ],
)
def test_sudoku(
    train: list[tuple[int, ...]],
    test: list[tuple[int, ...]],
    remark: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split, puzzles in (("train", train), ("test", test)):
        write_csv(tmp_path / f"{split}.csv", [with_blanks(GRIDS[grid], *cells) for grid, *cells in puzzles])
    assert said(sudoku, tmp_path, capsys, "--source-dir", tmp_path) == remark


def test_checking_for_several_solutions_ends_in_time() -> None:
    blank = np.broadcast_to(np.zeros(81, dtype=np.uint8), (10**7, 81))  # an hour's work, and no memory
    started = time.process_time()
    ambiguous, checked = count_ambiguous(blank, BoxShape(3, 3), seconds=0.5)
    assert time.process_time() - started < 10
    assert ambiguous <= checked < len(blank)


def test_generated_puzzles_have_no_remark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(sudoku, tmp_path, capsys, "--generate", "2x2", "--train-size", 20, "--test-size", 5) == ""


def test_maze(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"train": [["S G      ", "SoG      "]] * 2, "test": [["G S      ", "GoS      "], ["S  #  #  ", "S  #  #  "]]}
    rows["test"][1] = ["S  # G # ", "So # G # "]
    for split, lines in rows.items():
        write_csv(tmp_path / f"{split}.csv", lines)
    remark = said(maze, tmp_path, capsys, "--source-dir", tmp_path)
    assert "1 test mazes are augmentations of training mazes" in remark
    assert "1 train mazes repeat another one" in remark
    assert "test mazes repeat" not in remark


def grid(number: int) -> list[list[int]]:
    return [[number % 10, number // 10 % 10]]


def task(*numbers: int, tests: int = 1) -> dict[str, Any]:
    pairs = [{"input": grid(number), "output": grid(number + 1)} for number in numbers]
    return {"train": pairs[:-tests], "test": pairs[-tests:]}


@pytest.mark.parametrize(
    ("training", "evaluation", "remark"),
    [
        ({"a": task(1, 2)}, {"b": task(3, 4)}, ""),
        ({"a": task(1, 2)}, {"b": task(3, 2), "c": task(5, 1)}, "2 test pairs are also trained on"),
        ({"a": task(1, 2)}, {"b": task(3, 4), "c": task(5, 4)}, "1 test pairs repeat another one"),
        ({"a": task(1, 2), "b": task(2, 1)}, {"c": task(3, 4)}, "1 tasks repeat another one under another name"),
    ],
)
def test_arc(
    training: dict[str, Any],
    evaluation: dict[str, Any],
    remark: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for split, tasks in (("training", training), ("evaluation", evaluation)):
        (tmp_path / "raw" / split).mkdir(parents=True)
        for name, content in tasks.items():
            (tmp_path / "raw" / split / f"{name}.json").write_text(json.dumps(content))
    arguments = ["--dataset-dirs", tmp_path / "raw", "--num-aug", 2, "--workers", 1]
    assert said(arc, tmp_path, capsys, *arguments) == remark


@pytest.mark.parametrize(
    ("train", "test", "remark"),
    [
        (["1>2"], ["3>4"], ""),
        (["1>2", "1>2"], ["3>4"], "1 train examples repeat another one"),
        (["1>2", "2>2"], ["3>4", "3>5", "3>4"], "1 test examples repeat another one; 1 test inputs stand there again"),
        (["1>2", "1>3"], ["1>2"], "1 test inputs are also trained on; 1 train inputs stand there again"),
    ],
)
def test_examples_of_ones_own(
    train: list[str], test: list[str], remark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, examples in (("train", train), ("test", test)):
        pairs = [example.split(">") for example in examples]
        lines = [json.dumps({"input": [question], "output": [answer]}) for question, answer in pairs]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    arguments = ["--train", tmp_path / "train.jsonl", "--test", tmp_path / "test.jsonl"]
    assert said(custom, tmp_path, capsys, *arguments).startswith(remark)
