"""The architecture of docs/add-an-architecture.md, dropped into a copy of the project as a file and a yaml, works."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.drop_in import block, copy_project, run_in
from tests.helpers.entry_points import CPU, make_pack

pytestmark = pytest.mark.slow

PAGE = "add-an-architecture.md"
TINY = ["arch=three_levels", "arch.hidden_size=32", "arch.num_heads=2", "arch.num_layers=1", "arch.halt_max_steps=3"]
TINY += ["arch.forward_dtype=float32"]
SHORT = ["data_path=pack", "wandb=disabled", "global_batch_size=6", "log_interval=1", "lr=1e-3", "lr_warmup_steps=2"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the two files, a pack, and the folder `run` of 4 passes of 2 steps."""
    folder = copy_project(tmp_path_factory.mktemp("project"), "tests", "pyproject.toml", "README.md", "docs")
    (folder / "hrm" / "models" / "three_levels.py").write_text(block(PAGE, "python"))
    (folder / "config" / "arch" / "three_levels.yaml").write_text(block(PAGE, "yaml"))
    make_pack(folder / "pack")
    train(folder, "checkpoint_path=run", "epochs=4", "eval_interval=2")
    return folder


def train(project: Path, *options: str) -> str:
    return run_in(project, "pretrain.py", *CPU, *TINY, *SHORT, *options)


def logged(run: Path) -> list[dict[str, float]]:
    """The records of training steps, without what the clock decides."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    clocked = ("puzzles_per_second", "tflops", "data_wait")
    return [{k: v for k, v in line.items() if k not in clocked} for line in lines if "train/lm_loss" in line]


def test_it_is_listed(project: Path) -> None:
    assert re.search(r"^\s*arch: .*\bthree_levels\b", run_in(project, "pretrain.py", "--help"), re.MULTILINE)
    out = run_in(project, "pretrain.py", "arch=three_levels", "--help")
    assert re.search(r"\bcycles\b.*updates of a level before each of the level above", out)


def test_it_trains_and_resumes_with_the_same_bits(project: Path) -> None:
    whole = logged(project / "run")
    assert [record["step"] for record in whole] == list(range(1, 9))
    train(project, "checkpoint_path=parts", "epochs=2", "eval_interval=2")
    out = train(project, "checkpoint_path=parts", "epochs=4", "eval_interval=2", "resume=auto", "resume_changed=true")
    assert re.search(r"Going on from \S*state_4", out)
    assert logged(project / "parts") == whole


def test_it_is_evaluated_halts_early_and_is_reported(project: Path) -> None:
    out = run_in(project, "evaluate.py", *CPU, "checkpoint=run", "act=both", "act_margin=-1e9", "report=report")
    assert re.findall(r"all/steps +(\S+)", out) == ["3.0000", "1.0000"]  # with this margin, all halt at once
    page = (project / "report" / "report.html").read_text()
    assert page.count("data-puzzle") >= 1


def test_all_tests_of_architectures_find_it(project: Path) -> None:
    """Its FLOPs are those that PyTorch counts, among others."""
    report = project / "report.xml"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", "-k", "three_levels"]
    run_in(project, *command, "tests/models/test_architectures.py")
    (counts,) = re.findall(r'errors="0" failures="0" skipped="(\d+)" tests="(\d+)"', report.read_text())
    skipped, tests = map(int, counts)
    assert tests - skipped >= 8
    assert re.search(r'name="test_\w*(flops|operations)\w*\[', report.read_text())
