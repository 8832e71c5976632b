"""The task of docs/add-a-task.md, dropped into a copy of the project as one file and one yaml, does what others do."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.drop_in import block, copy_project, run_in
from tests.helpers.entry_points import CPU, TINY_MODEL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the two files, and a pack and a run made by `pretrain.py data=latin`."""
    folder = copy_project(tmp_path_factory.mktemp("project"))
    (folder / "hrm" / "tasks" / "latin.py").write_text(block("add-a-task.md", "python"))
    (folder / "config" / "data" / "latin.yaml").write_text(block("add-a-task.md", "yaml"))
    options = ["data=latin", "data.build=latin --train-size 240 --test-size 40", "checkpoint_path=run", "epochs=16"]
    options += ["global_batch_size=24", "eval_interval=16", "lr=3e-3", "lr_warmup_steps=10", "augment_act_steps=true"]
    run_in(folder, "pretrain.py", *TINY_MODEL, *CPU, "wandb=disabled", *options)
    return folder


def test_its_builder_is_found(project: Path) -> None:
    assert "latin" in run_in(project, "-m", "hrm", "data", "--help")
    provenance = json.loads((project / "data" / "latin" / "provenance.json").read_text())
    assert provenance["task"] == "latin"
    assert provenance["counts"]["train"]["examples"] == 240


def test_it_is_evaluated_shown_and_reported(project: Path) -> None:
    out = run_in(project, "evaluate.py", *CPU, "checkpoint=run", "act=both", "show=1", "report=report")
    assert re.search(r"all: \d+\.\d\d % of 40 answers are a Latin square, the label's or another one", out)
    assert re.search(r"^│[ ·\[]\d[ ·\]]", out, re.MULTILINE)
    page = (project / "report" / "report.html").read_text()
    assert '"drawing":"symbols","symbols":["","","1","2","3","4"],"columns":4,"blank":1' in page
    assert (project / "run" / "boards.png").is_file()


def test_its_symmetries_vote_and_its_rules_are_checked(project: Path) -> None:
    out = run_in(project, "evaluate.py", *CPU, "checkpoint=run", "ensemble.augmentations=4", "ensemble.check=true")
    assert "augmentations of each puzzle: 4, rules checked" in out
    kept = [float(share) for share in re.findall(r"exact_accuracy/of_\d +(\S+)", out)]
    assert len(kept) == 3


def test_it_answers_a_puzzle(project: Path) -> None:
    puzzle = "123434122143432."
    out = run_in(project, "evaluate.py", *CPU, "checkpoint=run", f"puzzle={puzzle}", "ensemble.augmentations=32")
    lines = [line for line in out.splitlines() if line.startswith("│")]
    assert len(lines) == 4
    answer = "".join(re.findall(r"\d", "".join(lines)))
    last_line = out.splitlines()[-1]
    assert last_line.startswith("Solved: this is a Latin square.") is (answer == "1234341221434321")
