"""From training tasks to answers that nobody can check here: ARC as the competition asks it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.builders import arc as builder
from tests.helpers.entry_points import CPU, TINY_RUN, Outcome, run_script

pytestmark = pytest.mark.slow

UNSCORED = "No right answer is known to any puzzle of the set all, so nothing is scored."


def write_tasks(file: Path, names: list[str], *, tests: int, hidden: bool = False) -> None:
    """Tasks whose outputs are their inputs, one colour on."""
    rng = np.random.default_rng(len(names))

    def pair(hidden: bool = False) -> dict[str, Any]:
        grid = rng.integers(10, size=rng.integers(1, 5, size=2))
        return {"input": grid.tolist()} | ({} if hidden else {"output": ((grid + 1) % 10).tolist()})

    tasks = {
        name: {"train": [pair() for _ in range(2)], "test": [pair(hidden) for _ in range(tests)]} for name in names
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tasks))


def build(pack: Path, *sources: Path) -> None:
    argv = ["--num-aug", "1", "--workers", "1", "--output-dir", str(pack), "--dataset-dirs", *map(str, sources)]
    assert builder.main(argv) == 0


def run(root: Path, pack: str, folder: str, *options: str) -> Outcome:
    paths = [f"data_path={root / pack}", f"checkpoint_path={root / folder}"]
    outcome = run_script("pretrain.py", *TINY_RUN, "epochs=1", "stop_after=1", *paths, *options)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In `run`, a model trained on the tasks that have outputs, then on the demonstrations of the hidden ones."""
    root = tmp_path_factory.mktemp("hidden")
    write_tasks(root / "mine/arc-agi_training_challenges.json", ["aa", "ab"], tests=1)
    write_tasks(root / "mine/arc-agi_evaluation_challenges.json", ["ba"], tests=1)
    write_tasks(root / "hidden/arc-agi_test_challenges.json", ["ca", "cb"], tests=2, hidden=True)
    build(root / "known", root / "mine")
    build(root / "asked", root / "hidden")
    run(root, "known", "first")
    told = run(root, "asked", "run", f"init_from={root / 'first'}", "epochs=2", "eval_interval=1")
    assert f"step 1: {UNSCORED}" in told.err + told.out
    assert "Ended early" not in told.err + told.out  # stop_after=1 judges by scores, of which there are none
    return root


def check_submission(file: Path, tests: dict[str, int]) -> None:
    """As the competition wants it: two grids of digits to every test input."""
    submission = json.loads(file.read_text())
    assert {task: len(answers) for task, answers in submission.items()} == tests
    for attempts in (attempts for answers in submission.values() for attempts in answers):
        assert list(attempts) == ["attempt_1", "attempt_2"]
        for grid in attempts.values():
            assert 1 <= len(grid) <= 30
            assert len({len(row) for row in grid}) == 1
            assert 1 <= len(grid[0]) <= 30
            assert all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row)


@pytest.mark.parametrize(
    "options",
    [["act=both", "save_outputs=[logits]"], ["report={}/report"], ["ensemble.checkpoints=[{}]"], ["puzzle_emb=mean"]],
    ids=["both", "report", "ensemble", "mean"],
)
def test_hidden_outputs_are_answered(options: list[str], adapted: Path, tmp_path: Path) -> None:
    checkpoint = adapted / "run"
    given = [option.format(checkpoint) for option in options]
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={checkpoint}", f"output_dir={tmp_path}", *given)
    assert outcome.status == 0, outcome.err
    assert UNSCORED in outcome.out
    assert "accuracy" not in outcome.out
    assert "Tasks solved" not in outcome.out
    assert ("No report is written" in outcome.out) == (options[0].startswith("report"))
    check_submission(tmp_path / "submission.json", {"ca": 2, "cb": 2})


def test_what_is_known_is_scored(adapted: Path, tmp_path: Path) -> None:
    """Known and hidden outputs in one pack: the counts are those of the known alone."""
    build(tmp_path / "both", adapted / "mine", adapted / "hidden")
    argv = [f"checkpoint={adapted / 'first'}", f"data_path={tmp_path / 'both'}", "puzzle_emb=mean"]
    outcome = run_script("evaluate.py", *CPU, *argv, f"output_dir={tmp_path}", f"report={tmp_path / 'report'}")
    assert outcome.status == 0, outcome.err
    assert "all/count                     2\n" in outcome.out  # the one known output, and its augmentation
    assert "The outputs of 1 of 5 test inputs are known, in 1 of 3 tasks; only these are scored." in outcome.out
    assert (tmp_path / "report/report.html").is_file()
    check_submission(tmp_path / "submission.json", {"ba": 1, "ca": 2, "cb": 2})
