"""Several runs by `-m` end with a table of how each one did."""

from pathlib import Path

import pytest

from hrm.config.compose import SweptRun
from hrm.training.loop import TrainResult
from hrm.training.sweep import sweep_table
from tests.helpers.entry_points import TINY_RUN, make_pack, run_script

Runs = list[SweptRun[TrainResult]]


def swept(folder: str, exact: float, *overrides: str) -> SweptRun[TrainResult]:
    metrics = {"all": {"exact_accuracy": exact, "accuracy": 0.5, "steps": 4.0}}
    return SweptRun(overrides, TrainResult(Path(folder), 10, metrics))


def test_table() -> None:
    runs = [
        swept("sweep/a", 0.25, "experiment=sudoku_demo", "lr=0.001", "arch.L_cycles=2", "checkpoint_path=sweep/a"),
        swept("sweep/b", 1, "experiment=sudoku_demo", "lr=0.003", "+arch.L_cycles=2", "checkpoint_path=sweep/b"),
    ]
    assert sweep_table(runs).splitlines() == [
        "lr     exactly right  cells right  run folder",
        "0.001  25.00%         50.00%       sweep/a",
        "0.003  100.00%        50.00%       sweep/b",
    ]


def test_sets_and_averages_have_columns() -> None:
    result = TrainResult(Path("run"), 1, {"hard": {"exact_accuracy": 0.5}, "ema/all": {"exact_accuracy": 0.75}})
    head, line = sweep_table([SweptRun(("lr=1",), result)]).splitlines()
    assert head.split("  ") == ["hard exactly right", "ema/all exactly right", "run folder"]
    assert line.split() == ["50.00%", "75.00%", "run"]


@pytest.mark.slow
def test_a_sweep_ends_with_the_table_also_where_a_run_fails(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack")
    options = [*TINY_RUN, f"data_path={tmp_path / 'pack'}", "epochs=2", "eval_interval=2"]
    command = [*options, "lr=1e-3,2e-3,-1", f"checkpoint_path={tmp_path}/sweep_${{lr}}"]
    done = run_script("pretrain.py", "-m", *command)
    assert done.status == 2
    assert "lr=-1" in done.err
    lines = done.out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["lr", "0.001", "0.002"]
    assert [line.split()[-1] for line in lines[1:]] == [f"{tmp_path}/sweep_{lr}" for lr in ("0.001", "0.002")]
    once = run_script("pretrain.py", *options, f"checkpoint_path={tmp_path}/once")
    assert "exactly right  " not in once.out, "one run needs no table"
