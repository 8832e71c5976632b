"""CSV files from lists of puzzles: solved, without what is no puzzle, and nothing equivalent on both sides."""

import csv
from pathlib import Path

import numpy as np
import pytest

from hrm.data.builders import sudoku, sudoku_lists
from hrm.data.builders.sudoku_puzzles import dig_holes, random_grids, symmetry_invariant
from hrm.tasks.sudoku import BoxShape, random_symmetries

SHAPE = BoxShape(3, 3)


def text_of(board: np.ndarray) -> str:
    return "".join(map(str, board)).replace("0", ".")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_lists_become_csv_files_and_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    answers = random_grids(20, SHAPE, rng)
    questions = dig_holes(answers, 32, SHAPE, rng)
    solution_of = {text_of(question): text_of(answer) for question, answer in zip(questions, answers, strict=True)}
    twin = text_of(random_symmetries(1, SHAPE, rng).apply(questions[:1])[0])
    texts = list(solution_of)
    (tmp_path / "first.txt").write_text(
        "# the first\n\n" + "\n".join(f"{text} 11.9 name" for text in texts[:12]) + "\n"
    )
    more = [*texts[10:], twin, "." * 81, "11" + "." * 79]  # two come twice, one has many solutions, one has none
    (tmp_path / "second.txt").write_text("\n".join(text.replace(".", "0") + ",7" for text in more))
    lists = [str(tmp_path / name) for name in ("first.txt", "second.txt")]
    csvs = tmp_path / "csv"
    assert sudoku_lists.main([*lists, "--output-dir", str(csvs), "--test-size", "5"]) == 0
    assert "2 without exactly one solution are left out" in capsys.readouterr().out

    train, test = rows_of(csvs / "train.csv"), rows_of(csvs / "test.csv")
    assert len(train) + len(test) == 21
    assert 5 <= len(test) <= 6
    for row in train + test:
        if row["question"] != twin:
            assert row["answer"] == solution_of[row["question"]]
            assert row["source"] == ("first" if row["question"] in texts[:12] else "second")
    boards = [np.array([list(map(int, row["answer"])) for row in rows]) for rows in (train, test)]
    assert not np.isin(*(symmetry_invariant(part, SHAPE) for part in boards)).any()

    pack = tmp_path / "pack"
    assert sudoku.main(["--source-dir", str(csvs), "--output-dir", str(pack), "--num-aug", "2"]) == 0
    assert f"{len(train)} training puzzles" in capsys.readouterr().out
    again = tmp_path / "again"
    assert sudoku_lists.main([*lists, "--output-dir", str(again), "--test-size", "5"]) == 0
    assert (again / "test.csv").read_bytes() == (csvs / "test.csv").read_bytes()


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("12345\n", [], "list.txt, line 1: The board has 5 characters"),
        ("# nothing\n", [], "hold no puzzle"),
        ("8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4..\n", [], "--test-size 1000"),
        ("", ["--test-size", "0"], "--test-size 0 is too small"),
    ],
)
def test_bad_lists(
    text: str, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text(text)
    command = [str(tmp_path / "list.txt"), "--output-dir", str(tmp_path / "csv"), *arguments]
    assert sudoku_lists.main(command) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "csv").exists()
