"""`hrm predict`: files and pipes of puzzles, for every task."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import hrm
from hrm import cli
from hrm.data.builders import custom as build_custom_dataset
from hrm.errors import UserError
from hrm.inference.command import EXIT_UNANSWERED
from hrm.tasks.form import PuzzleForm
from hrm.writing import new_file
from tests.helpers.entry_points import ROOT, run_script, train
from tests.helpers.inference import untrained

pytestmark = pytest.mark.slow

EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
EASY_SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."
HARD_SOLVED = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"
PREDICT = [sys.executable, "-m", "hrm", "predict"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def predict(*options: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    argv = [*PREDICT, "device=cpu", *map(str, options)]
    return subprocess.run(argv, input=given, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_a_typed_puzzle_is_drawn() -> None:
    done = predict("checkpoint=sudoku_small", "dtype=float32", "act_max_steps=4", f"puzzle={EASY}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Solved: this is the only solution.\n")


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def answered(tmp_path: Path, run: Path | str, source: Path, *options: str, status: int = 0) -> list[dict[str, Any]]:
    """The records that `evaluate.py input= output=` writes."""
    target = tmp_path / "answers.jsonl"
    outcome = run_script(
        "evaluate.py", f"checkpoint={run}", "device=cpu", f"input={source}", f"output={target}", *options
    )
    assert outcome.status == status, outcome.err
    return records(target.read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("small"), PuzzleForm("sudoku", 16, 6))


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_pipe_of_boards() -> None:
    done = predict("checkpoint=sudoku_small", "dtype=float32", given=f"{HARD}\n\nfoo\n{json.dumps({'input': EASY})}\n")
    assert done.returncode == EXIT_UNANSWERED
    first, bad, second = records(done.stdout)
    assert [first["text"], second["text"]] == [HARD_SOLVED, EASY_SOLVED]
    assert first.keys() == second.keys() == {"index", "answer", "q_halt", "steps", "text"}
    assert "".join(str(digit) for row in first["answer"] for digit in row) == HARD_SOLVED
    assert bad.keys() == {"index", "error"}
    assert bad["error"].startswith("line 3: No Sudoku board has 3 cells")
    assert [record["index"] for record in (first, bad, second)] == [0, 1, 2]
    assert done.stderr == "Answered 2 of 3 inputs; 1 could not be answered: their lines have error.\n"


def test_answers_come_before_the_input_ends(small: Path) -> None:
    argv = [*PREDICT, "device=cpu", f"checkpoint={small}"]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for number in range(3):
            process.stdin.write("1..." * 1 + "." * 12 + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["index"] == number
        process.stdin.close()
        assert process.stdout.read() == process.stderr.read() == ""
    assert process.returncode == 0


def test_a_closed_pipe_ends_quietly(small: Path, tmp_path: Path) -> None:
    """As `hrm predict ... | head -n 1` does."""
    source = written(tmp_path / "boards.txt", *["." * 16] * 5000)
    argv = [*PREDICT, "device=cpu", f"checkpoint={small}", f"input={source}"]
    with subprocess.Popen(argv, stdin=-3, stdout=-1, stderr=-1, text=True, env=ENVIRONMENT) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def csv_text(rows: Sequence[Sequence[str]]) -> list[str]:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().splitlines()


def test_kinds_of_files(small: Path, tmp_path: Path) -> None:
    boards = ["1" + "." * 15, ".2" + "." * 14, "..3" + "." * 13]
    expected = [record["answer"] for record in answered(tmp_path, small, written(tmp_path / "a.txt", *boards))]
    assert len(expected) == 3
    rated = [["source", "question", "answer", "rating"], *(["here, there", board, "", "1"] for board in boards)]
    files = [
        written(tmp_path / "a.jsonl", *(json.dumps({"input": board}) for board in boards)),
        written(tmp_path / "b.jsonl", *map(json.dumps, boards)),
        written(tmp_path / "c.jsonl", *(json.dumps([int(cell) for cell in b.replace(".", "0")]) for b in boards)),
        written(tmp_path / "a.csv", *csv_text(rated)),
        written(tmp_path / "b.csv", "input", *boards),
        written(tmp_path / "a.json", json.dumps(boards)),
        written(tmp_path / "d.txt", *boards).rename(tmp_path / "name = with, (all)"),
    ]
    with gzip.open(packed := tmp_path / "a.txt.gz", "wt") as stream:
        stream.write("\r\n".join(boards))
    for file in (*files, packed):
        assert [record["answer"] for record in answered(tmp_path, small, file)] == expected, file
    tokens = written(tmp_path / "t.jsonl", json.dumps({"tokens": [2, *[1] * 15]}))
    assert answered(tmp_path, small, tokens)[0]["answer"] == expected[0]


def test_bad_lines_are_named_and_the_others_answered(small: Path, tmp_path: Path) -> None:
    lines = ["." * 16, '{"input": "...', "." * 15, "1" * 16, '{"puzzle": 3}', "[1, 2", "." * 16, "\ufffd", "null"]
    found = answered(tmp_path, small, written(tmp_path / "a.jsonl", *lines), status=EXIT_UNANSWERED)
    assert [record["index"] for record in found] == list(range(len(lines)))
    assert [number for number, record in enumerate(found) if "error" not in record] == [0, 6]
    assert found[1]["error"].startswith("line 2: it is not valid JSON")
    assert found[2]["error"].startswith("line 3: No Sudoku board has 15 cells")
    assert "breaks the rules" in found[3]["error"]
    rows = ["input,puzzle", "." * 16 + ",", "." * 16, '"..']
    found = answered(tmp_path, small, written(tmp_path / "b.csv", *rows), status=EXIT_UNANSWERED)
    assert ["error" in record for record in found] == [False, True, True]
    assert found[1]["error"] == "line 3: it has 1 cells, but the header has 2"


def test_a_first_line_too_long_for_csv_is_an_input_as_any(small: Path, tmp_path: Path) -> None:
    long, board = answered(
        tmp_path, small, written(tmp_path / "a.txt", "1" * 200_000, "." * 16), status=EXIT_UNANSWERED
    )
    assert "No Sudoku board has 200000 cells" in long["error"]
    assert "answer" in board


def test_output_into_a_pipe_or_a_device_leaves_it_there(small: Path, tmp_path: Path) -> None:
    pipe, source = tmp_path / "pipe", written(tmp_path / "a.txt", "." * 16)
    os.mkfifo(pipe)
    argv = [*PREDICT, "device=cpu", f"checkpoint={small}", f"input={source}", f"output={pipe}"]
    with subprocess.Popen(argv, stderr=-1, text=True, env=ENVIRONMENT) as process:
        assert [record["index"] for record in records(pipe.read_text())] == [0]
    assert process.returncode == 0
    assert pipe.is_fifo()
    with pytest.raises(UserError, match="is no regular file"), new_file(pipe):
        pass
    assert pipe.is_fifo()


def test_a_row_of_a_board_is_told_how_to_become_one(small: Path, tmp_path: Path) -> None:
    rows = ["1...", "..1.", ".1.."]
    found = answered(tmp_path, small, written(tmp_path / "a.txt", *rows, "..."), status=EXIT_UNANSWERED)
    ends = "it has 4 characters, a row of a puzzle of 4 rows: write all of them in one line."
    assert [record["error"] for record in found[:3]] == [f"line {number}: {ends}" for number in (1, 2, 3)]
    assert "No Sudoku board has 3 cells" in found[3]["error"]


def test_tasks_of_arc(tmp_path: Path) -> None:
    form = PuzzleForm("arc", 900, 12, 3, identifiers=("<blank>", "rule", "other"))
    run = untrained(tmp_path / "run", form, halt_max_steps=1)
    task = {"train": [], "test": [{"input": [[1, 2]]}, {"input": [[3]]}]}
    one = answered(tmp_path, run, written(tmp_path / "rule.json", json.dumps(task)))
    assert [record["index"] for record in one] == [0, 0]
    both = answered(tmp_path, run, written(tmp_path / "all.json", json.dumps({"rule": task, "other": task})))
    assert [record["index"] for record in both] == [0, 0, 1, 1]
    assert [record["answer"] for record in both[:2]] == [record["answer"] for record in one]
    line = written(tmp_path / "a.jsonl", json.dumps({"input": [[3]], "puzzle": "rule"}))
    assert answered(tmp_path, run, line)[0]["answer"] == one[1]["answer"]


def test_options(small: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "a.txt", *["." * 16, "1" + "." * 15])
    steps = {
        options: [record["steps"] for record in answered(tmp_path, small, source, *options.split())]
        for options in (
            "act=full",
            "act_max_steps=1",
            "ensemble.augmentations=3 act=full",
            "global_batch_size=1 act=full",
        )
    }
    assert list(steps.values()) == [[3, 3], [1, 1], [9, 9], [3, 3]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["input={source}", "show=3"], "input= cannot be used with show="),
        (["input={source}", "act=both"], "input= cannot be used with act=both"),
        (["input={source}", "ensemble.checkpoints=[sudoku]"], "input= cannot be used with ensemble.checkpoints="),
        (["input={source}", "output={source}"], "is the input: give another file"),
        (["input=none.txt"], "input=none.txt cannot be read (No such file or directory)"),
        (["input={source}", "output=no/where"], "no/where cannot be written"),
        (["output=somewhere"], "output= is for the answers to input="),
    ],
)
def test_what_cannot_be(small: Path, tmp_path: Path, options: list[str], sentence: str) -> None:
    source = written(tmp_path / "a.txt", "." * 16)
    given = [option.format(source=source) for option in options]
    outcome = run_script("evaluate.py", f"checkpoint={small}", "device=cpu", *given)
    assert outcome.status == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1
    assert source.read_text() == "." * 16 + "\n"


def test_help_says_what_goes_in_and_comes_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(words in page for words in ("hrm predict checkpoint=", "JSON lines", "Exit status: 0; 3", "CSV"))


def test_one_puzzle_that_is_no_board(tmp_path: Path) -> None:
    """`puzzle=` for ARC and for symbols of one's own prints the answer that `input=` writes, ARC's beside the input."""
    arc = untrained(tmp_path / "arc", PuzzleForm("arc", 900, 12, 2, identifiers=("<blank>", "rule")), halt_max_steps=1)
    own = untrained(tmp_path / "own", PuzzleForm("tokens", 4, 5, symbols=("a", "go", 1, 2), answers_cover_inputs=True))
    for run, typed, value in (
        (arc, '{"input": [[1, 2]], "puzzle": "rule"}', {"input": [[1, 2]], "puzzle": "rule"}),
        (own, "a go 1", ["a", "go", 1]),
    ):
        outcome = run_script("evaluate.py", f"checkpoint={run}", "device=cpu", f"puzzle={typed}")
        assert outcome.status == 0, outcome.err
        (record,) = answered(tmp_path, run, written(tmp_path / "a.jsonl", json.dumps(value)))
        if run is arc:
            rows = record["answer"]
            assert f"input 1x2   answer {len(rows)}x{len(rows[0]) if rows else 0}" in outcome.out
            assert all("".join(f" {color}" for color in row) in outcome.out for row in rows)
            assert "\n 1 2 " in outcome.out
        else:
            assert outcome.out.splitlines()[:-1] == [" ".join(map(str, record["answer"]))]
        assert outcome.out.splitlines()[-1].startswith(f"q_halt {record['q_halt']:.2f} after ")
    outcome = run_script("evaluate.py", f"checkpoint={own}", "device=cpu", "puzzle=a went")
    assert outcome.status == 2
    assert (
        outcome.err == 'error: puzzle= cannot be answered: cell 2 is "went", which is no symbol that the model knows.\n'
    )


@pytest.mark.slow
def test_a_task_of_ones_own_from_examples_to_a_pipe(tmp_path: Path) -> None:
    """Lists of 3 to 5 letters, whose answer is the same with each letter replaced by the next one."""
    letters = ["alpha", "beta", "gamma", "delta"]
    following = dict(zip(letters, letters[1:] + letters[:1], strict=True))
    words = [[]]
    for _ in range(5):
        words = [[*word, letter] for word in words for letter in letters] + [word for word in words if len(word) >= 3]
    words = [word for word in words if len(word) >= 3]
    asked = words[::7]
    known = [word for word in words if word not in asked]
    lines = [json.dumps({"input": word, "output": [following[letter] for letter in word]}) for word in known]
    examples = written(tmp_path / "examples.jsonl", *lines)
    argv = ["--train", str(examples), "--test-fraction", "0.05", "--output-dir", str(tmp_path / "pack")]
    assert build_custom_dataset.main(argv) == 0
    train(
        *("arch=hrm_small", "arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=2", "kernels=naive"),
        *("device=cpu", "wandb=disabled", "global_batch_size=128", "epochs=60", "eval_interval=60", "lr=3e-3"),
        *("lr_warmup_steps=20", f"data_path={tmp_path / 'pack'}", f"checkpoint_path={tmp_path / 'run'}"),
    )
    (tmp_path / "pack").rename(tmp_path / "away")  # answers are read without the pack
    given = "".join(json.dumps({"input": word}) + "\n" for word in asked)
    done = predict(f"checkpoint={tmp_path / 'run'}", given=given)
    assert done.returncode == 0, done.stderr
    expected = [[following[letter] for letter in word] for word in asked]
    assert [record["answer"] for record in records(done.stdout)] == expected
    model = hrm.from_pretrained(tmp_path / "run", device="cpu")
    assert model.predict("alpha beta delta").values == [["beta", "gamma", "alpha"]]
