"""The recipes of `config/experiment/` from one command to the next, on a pack and a model that take seconds."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import ensembles, run_curves
from hrm.data.builders.maze import main as build_maze
from tests.helpers.entry_points import CPU, TINY_RUN, make_pack, printed_metrics, run_script, train


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pack"
    make_pack(folder)
    return folder


def run(experiment: str, pack: Path, folder: Path, *options: str) -> list[dict[str, float]]:
    """What a run of the recipe logs, with a tiny model, for the speedrun of its own kind."""
    arch = "trm" if "speedrun" in experiment else "hrm_small"
    tiny = [option.replace("hrm_small", arch) for option in TINY_RUN]
    train(f"experiment={experiment}", *tiny, f"data_path={pack}", f"checkpoint_path={folder}", *options)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("experiment", "named", "presets"),
    [
        ("sudoku_extreme_1k", "all", ["naive", "fp8"]),
        ("sudoku_speedrun", "ema/all", ["naive"]),
        ("sudoku_speedrun_small", "ema/all", ["naive"]),
    ],
)
def test_hard_sudoku(experiment: str, named: str, presets: list[str], pack: Path, tmp_path: Path) -> None:
    """Trained, its curves drawn, its answers compared in 16 and 8 bit where both can be had, and put to the vote."""
    records = run(experiment, pack, tmp_path / "run")
    assert f"{named}/exact_accuracy" in records[-1]
    run_curves.main([str(tmp_path / "run"), "--picture", str(tmp_path / "curves.svg")])
    assert (tmp_path / "curves.svg").stat().st_size > 1000
    counts = []
    for kernels in presets:
        outcome = run_script("evaluate.py", f"checkpoint={tmp_path / 'run'}", f"kernels={kernels}", "device=cpu")
        assert outcome.status == 0, outcome.err
        counts.append(printed_metrics(outcome.out)["count"])
    assert counts == [5] * len(presets)
    argv = [
        str(tmp_path / "run"),
        "--augmentations",
        "1,2",
        "--kernels",
        "naive",
        "--device",
        "cpu",
        "--batch-size",
        "4",
    ]
    ensembles.main([*argv, "--output-dir", str(tmp_path)])
    (table,) = tmp_path.glob("*-ensembles.json")
    assert [row["ACT steps"] for row in json.loads(table.read_text())["rows"]] == [2, 4]


def test_the_speedrun_has_no_q_continue(pack: Path, tmp_path: Path) -> None:
    stage = "curriculum=[{until:3,H_cycles:1,L_cycles:2,halt_max_steps:1}]"
    records = run("sudoku_speedrun_small", pack, tmp_path / "run", stage)
    assert not any("train/q_continue_loss" in record for record in records)
    assert any("train/q_halt_loss" in record for record in records)
    saved = yaml.safe_load((tmp_path / "run" / "all_config.yaml").read_text())
    assert (saved["arch"]["q_continue"], saved["arch"]["train_max_steps"], saved["arch"]["mlp_t"]) == (False, 4, True)
    assert saved["curriculum"] == [{"until": 3, "H_cycles": 1, "L_cycles": 2, "halt_max_steps": 1}]


def test_mazes(tmp_path: Path) -> None:
    """In their eight orientations, of which an epoch shows one, and to a rate of 0; right paths are counted."""
    build_maze(
        ["--generate", "6x6", "--aug", "--train-size", "8", "--test-size", "5", "--output-dir", f"{tmp_path}/mazes"]
    )
    records = run("maze_speedrun", tmp_path / "mazes", tmp_path / "run")
    assert [record["step"] for record in records if "ema/all/exact_accuracy" in record] == [2, 4]
    rates = [record["train/lr"] for record in records if "train/lr" in record]
    assert rates[0] == pytest.approx(0.005, rel=0.2)
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={tmp_path / 'run'}")
    assert outcome.status == 0, outcome.err
    assert "of 5 answers are a shortest path, the label's or another one." in outcome.out
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={tmp_path / 'run'}", "ensemble.augmentations=2")
    assert outcome.status == 0, outcome.err
    assert "warning: puzzles of the task maze have several right answers" in outcome.err
