"""Every kind of task from raw puzzles to a report, at toy size: build, train, evaluate, score, report."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.builders import arc as build_arc_dataset
from hrm.data.builders import custom as build_custom_dataset
from hrm.data.builders import example_tasks as write_example_task
from hrm.data.builders import maze as build_maze_dataset
from hrm.data.pack import open_pack
from hrm.errors import UserError
from hrm.evaluation.symmetries import symmetries_of
from hrm.tasks.sudoku import BoxShape, decode_tokens, is_solved
from hrm.training.step import cell_permutations
from tests.helpers.entry_points import CPU, TINY_RUN, evaluated, make_pack, run_script, train

pytestmark = pytest.mark.slow


def run(builder: Callable[[Sequence[str]], int], *argv: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert builder(argv) == 0


def make_mazes(folder: Path) -> None:
    sizes = ["--generate", "6x6", "--min-length", "7", "--train-size", "16", "--test-size", "9"]
    run(build_maze_dataset.main, *sizes, "--output-dir", str(folder))


def make_arc(folder: Path) -> None:
    """Five tasks that mirror a grid, one of them with two test inputs."""
    rng = np.random.default_rng(0)

    def pair() -> dict[str, Any]:
        grid = rng.integers(0, 10, (3, 4))
        return {"input": grid.tolist(), "output": grid[:, ::-1].tolist()}

    for part, tasks in (("training", 2), ("evaluation", 3)):
        raw = folder.parent / "raw" / part
        raw.mkdir(parents=True)
        for number in range(tasks):
            tests = [pair() for _ in range(2 if number == 0 else 1)]
            (raw / f"{part}{number}.json").write_text(json.dumps({"train": [pair(), pair()], "test": tests}))
    arguments = ["--dataset-dirs", str(folder.parent / "raw"), "--num-aug", "2", "--workers", "1"]
    run(build_arc_dataset.main, *arguments, "--output-dir", str(folder))


def make_routes(folder: Path) -> None:
    lines = folder.parent / "tools.jsonl"
    run(write_example_task.main, "tool_routing", "--count", "60", "--output", str(lines))
    run(build_custom_dataset.main, "--train", str(lines), "--test-fraction", "0.2", "--output-dir", str(folder))


PACKS = {"maze": make_mazes, "arc": make_arc, "tokens": make_routes}
DRAWINGS = {"maze": "path", "arc": "colors", "tokens": "symbols"}


@pytest.mark.parametrize("kind", PACKS)
def test_from_raw_puzzles_to_a_report(kind: str, tmp_path: Path) -> None:
    pack, folder = tmp_path / "pack", tmp_path / "run"
    PACKS[kind](pack)
    train(*TINY_RUN, f"data_path={pack}", f"checkpoint_path={folder}", "arch.forward_dtype=float32")
    report = tmp_path / "report"
    metrics, out = evaluated(f"checkpoint={folder}", "act=both", f"report={report}", "show=2")
    examples = sum(len(data.inputs) for data in open_pack(pack, "test").sets.values())
    assert metrics["count"] == examples
    assert out.count("puzzles/s") == 2
    page = (report / "report.html").read_text()
    assert f'"drawing":"{DRAWINGS[kind]}"' in page
    assert not re.search(r"(src|href)=.?https?:", page)  # one file, no network

    assert len(re.findall(r"^test puzzle \d+", out, re.MULTILINE)) == 2
    assert (folder / "boards.png").is_file() is (kind != "tokens"), "lists are printed only"
    if kind == "maze":
        assert out.count("answers are a shortest path") == 2
    if kind == "arc":
        assert re.findall(r"^test puzzle \d+, task (\w+)$", out, re.MULTILINE) == ["evaluation0", "evaluation0"]
        assert "truth 3x4" in out
        assert out.count("Tasks solved, by answers allowed") == 2
        submission = json.loads((folder / "submission.json").read_text())
        assert {name: len(attempts) for name, attempts in submission.items()} == {
            "evaluation0": 2,
            "evaluation1": 1,
            "evaluation2": 1,
        }


def test_mazes_are_shown_and_solved(tmp_path: Path) -> None:
    pack, folder = tmp_path / "pack", tmp_path / "run"
    make_mazes(pack)
    train(*TINY_RUN, f"data_path={pack}", f"checkpoint_path={folder}")
    _, out = evaluated(f"checkpoint={folder}", "show=2")
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 2 * 6
    assert all(len(row) == 2 * 6 + 2 for row in rows)
    assert (folder / "boards.png").is_file()
    maze = "".join("?# SGo"[token] for token in open_pack(pack, "test").sets["all"].inputs[0])
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={folder}", f"puzzle={maze}", "ensemble.augmentations=8")
    assert (outcome.status, outcome.err) == (0, "")
    answer = [line for line in outcome.out.splitlines() if line.startswith("│")]
    assert len(answer) == 6
    assert "a shortest path" in outcome.out.splitlines()[-1]
    two_starts = run_script("evaluate.py", *CPU, f"checkpoint={folder}", f"puzzle={maze.replace('G', 'S')}")
    assert two_starts.status == 2
    assert "A maze to solve has one S, one G and no o." in two_starts.err


@pytest.mark.slow
def test_arc_checkpoints_vote_together(tmp_path: Path) -> None:
    pack, folder = tmp_path / "pack", tmp_path / "run"
    make_arc(pack)
    train(*TINY_RUN, f"data_path={pack}", f"checkpoint_path={folder}")
    _, out = evaluated(f"checkpoint={folder}", f"ensemble.checkpoints=[{folder}]")
    assert out.count("Tasks solved, by answers allowed") == 1


def test_symmetries_that_a_task_has(tmp_path: Path) -> None:
    make_mazes(tmp_path / "maze")
    make_pack(tmp_path / "sudoku")
    make_routes(tmp_path / "routes")
    assert len(symmetries_of(open_pack(tmp_path / "sudoku", "test"), 20)) == 20
    assert len(symmetries_of(open_pack(tmp_path / "maze", "test"), 8)) == 8
    assert len(symmetries_of(open_pack(tmp_path / "routes", "test"), 1)) == 1
    with pytest.raises(UserError, match="a puzzle of the task maze has 8 symmetries"):
        symmetries_of(open_pack(tmp_path / "maze", "test"), 9)
    with pytest.raises(UserError, match="needs a task with known symmetries"):
        symmetries_of(open_pack(tmp_path / "routes", "test"), 2)


def test_permutations_of_cells_keep_the_rules(tmp_path: Path) -> None:
    make_mazes(tmp_path / "maze")
    make_pack(tmp_path / "sudoku", box="2x3", train_size=20)
    make_routes(tmp_path / "routes")
    pack = open_pack(tmp_path / "sudoku", "train")
    solutions = np.asarray(pack.sets["all"].labels)
    cells = cell_permutations(pack, seed=3, count=200).numpy()
    assert is_solved(decode_tokens(solutions[:, cells].reshape(-1, 36)), BoxShape(2, 3)).all()
    assert len({tuple(image) for image in cells}) > 150
    assert not np.array_equal(cells, cell_permutations(pack, seed=4, count=200).numpy())
    images = cell_permutations(open_pack(tmp_path / "maze", "train"), seed=0)
    assert len(images) == 8
    assert images.sort().values.equal(images[:1].expand(8, -1))
    with pytest.raises(
        UserError, match=r"^augment_act_steps=true needs a task with known symmetries, .*routes holds tokens"
    ):
        cell_permutations(open_pack(tmp_path / "routes", "train"), seed=0)


def test_another_image_at_every_step(tmp_path: Path) -> None:
    """The same seed trains the same; without images, it would train otherwise."""
    make_pack(tmp_path / "pack")
    losses = []
    for run_name, turned in (("a", "true"), ("b", "true"), ("c", "false")):
        folder = tmp_path / run_name
        train(*TINY_RUN, f"data_path={tmp_path / 'pack'}", f"checkpoint_path={folder}", f"augment_act_steps={turned}")
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([record["train/lm_loss"] for record in records if "train/lm_loss" in record])
    assert losses[0] == losses[1] != losses[2]
