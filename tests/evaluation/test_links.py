"""A run folder of somebody else: what evaluation writes there goes to new files, never through links to other ones."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hrm.checkpoint.run_folder import keep_earlier_run
from hrm.errors import UserError
from hrm.evaluation.report.plots import read_records
from hrm.writing import new_file
from tests.helpers.entry_points import CPU, run_script

LINKS: dict[str, Callable[[Path, Path], None]] = {
    "symbolic": lambda victim, name: name.symlink_to(victim),
    "hard": os.link,
    "dangling": lambda victim, name: name.symlink_to(victim.with_name("not_there")),
}
OUTPUTS = ["boards.png", "curves.png", "report.html", "right.gif", "wrong.gif", "slow.gif"]


@pytest.mark.parametrize("kind", LINKS)
def test_outputs_go_through_no_link(kind: str, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    step = max(int(file.name[5:]) for file in run.glob("step_*") if file.name[5:].isdigit())
    for name in (f"step_{step}_all_preds.0", *OUTPUTS):
        LINKS[kind](victim, run / name)
    options = ["save_outputs=[q_halt_logits]", "show=2", f"report={run}"]
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={run}", *options)
    assert outcome.status == 0, outcome.err
    assert victim.read_text() == "precious"
    assert not (tmp_path / "not_there").exists()
    for name in (f"step_{step}_all_preds.0", *OUTPUTS[:5]):
        assert not (run / name).is_symlink()
        assert (run / name).stat().st_size > 100
        assert (run / name).stat().st_nlink == 1


@pytest.mark.parametrize("kind", LINKS)
def test_new_files(kind: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    LINKS[kind](tmp_path / "victim", tmp_path / "name")
    with new_file(tmp_path / "name") as file:
        file.write_text("new")
    assert [(tmp_path / name).read_text() for name in ("victim", "name")] == ["precious", "new"]
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "name"}


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "not/there", "x" * 300):
        with pytest.raises(UserError, match="cannot be written"), new_file(tmp_path / name) as file:
            file.write_text("new")


def test_an_earlier_runs_links_are_moved_aside(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "all_config.yaml", "step_3"):
        (tmp_path / name).symlink_to(tmp_path / "not_there")
    keep_earlier_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier_1"]


@pytest.mark.parametrize("line", ["[" * 5000, "[1, 2]", "3", "null", '{"step": ', "\x00"])
def test_records_that_are_none_end_the_curves(line: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    odd = {"step": 2, "name": "x", "list": [1], "large": 1e308, "nan": np.nan, "loss": 0.5, "yes": True}
    file.write_text("\n".join([json.dumps({"step": 1}), json.dumps(odd), line, json.dumps({"step": 3})]))
    assert list(read_records(file)) == [{"step": 1}, {"step": 2, "loss": 0.5}]


def test_records_in_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_records(tmp_path / "metrics.jsonl"))
