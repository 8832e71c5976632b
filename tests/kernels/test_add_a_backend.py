"""The backend of docs/add-a-backend.md, dropped into a copy of the project as a file and a yaml, works as others do."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.drop_in import block, copy_project, run_in
from tests.helpers.entry_points import TINY_RUN, make_pack

pytestmark = pytest.mark.slow

PAGE = "add-a-backend.md"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the two files, and a pack."""
    folder = copy_project(
        tmp_path_factory.mktemp("project"), "tests", "benchmarks", "README.md", "docs", "pyproject.toml"
    )
    (folder / "hrm" / "kernels" / "backends" / "two_matmuls.py").write_text(block(PAGE, "python"))
    (folder / "config" / "kernels" / "two_matmuls.yaml").write_text(block(PAGE, "yaml"))
    make_pack(folder / "pack")
    return folder


def test_it_trains_and_evaluates_like_the_definition(project: Path) -> None:
    losses = {}
    for kernels in ("two_matmuls", "naive"):
        options = [*TINY_RUN, f"kernels={kernels}", "data_path=pack", f"checkpoint_path={kernels}"]
        out = run_in(project, "pretrain.py", *options, "arch.forward_dtype=float32")
        assert f"kernels: {kernels}" in out
        lines = map(json.loads, (project / kernels / "metrics.jsonl").read_text().splitlines())
        losses[kernels] = [line["train/lm_loss"] for line in lines if "train/lm_loss" in line]
    assert len(losses["naive"]) == 6
    assert losses["two_matmuls"] == pytest.approx(losses["naive"], rel=1e-5)
    out = run_in(project, "evaluate.py", "checkpoint=two_matmuls", "kernels=two_matmuls", "device=cpu")
    assert "kernels: two_matmuls" in out


def test_it_is_listed(project: Path) -> None:
    for script in ("pretrain.py", "evaluate.py"):
        # The choices of a group may take several lines.
        assert re.search(r"^ *kernels: [\w, \n]*\btwo_matmuls\b", run_in(project, script, "--help"), re.MULTILINE)
    listed = run_in(project, "-m", "hrm.kernels")
    assert "kernels=two_matmuls: Gate and up projections as two matmuls\n" in listed
    run_in(project, "-m", "hrm.kernels", "--write", "docs/kernels.md")
    row = "| `two_matmuls` | Gate and up projections as two matmuls | to see how a backend is written |"
    assert row in (project / "docs" / "kernels.md").read_text()
    assert "two_matmuls" in run_in(project, "-c", "from benchmarks.common import PRESETS; print(PRESETS)")


def test_its_tests_are_there(project: Path) -> None:
    report = project / "report.xml"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", "-k", "two_matmuls"]
    run_in(project, *command, "tests/kernels/test_backends.py")
    (counts,) = re.findall(r'errors="0" failures="0" skipped="(\d+)" tests="(\d+)"', report.read_text())
    skipped, tests = map(int, counts)
    assert tests - skipped >= 10
