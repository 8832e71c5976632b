"""The console script `hrm`: its commands are found, and do what the doors at the top do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hrm import cli
from hrm.cli.train import DEMO, with_recipe
from hrm.data.builders import find_builders
from hrm.version import __version__
from tests.helpers.entry_points import ROOT


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        listed = {line.split()[0]: line for line in lines if line.startswith("  ")}
        assert {"data", "evaluate", "train"} <= set(cli.commands()) == set(listed)
        assert all(len(line.split()) > 3 for line in listed.values()), "a command says what it is for"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hrm {__version__} (hrm-torch)\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["trian"], "hrm trian is not a command; did you mean train?"),
        (["data", "sudko"], "hrm data sudko is not a builder; did you mean sudoku?"),
    ],
)
def test_misspelt_commands_name_their_neighbours(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_unknown_commands_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyz"]) == 2
    assert f"there are: {', '.join(cli.commands())}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "hrm"],
        ["-m", "hrm", "data", "list"],
        pytest.param(["pretrain.py", "--help"], marks=pytest.mark.slow),
        pytest.param(["-m", "hrm.kernels"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("buffering", ["", "1"])  # with it, the pipe breaks when Python ends
def test_readers_may_leave(command: list[str], buffering: str) -> None:
    """As `| head -1` does."""
    environment = os.environ | {"PYTHONUNBUFFERED": buffering}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_needs_no_pytorch() -> None:
    check = "import sys; from hrm.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def test_data_lists_every_builder(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"arc", "custom", "example", "list", "maze", "sudoku"} <= find_builders().keys()
    assert cli.main(["data"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(find_builders())


def test_data_builds_a_pack(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    options = ["--generate", "2x2", "--train-size", "4", "--test-size", "2", "--output-dir", str(pack)]
    assert cli.main(["data", "sudoku", *options]) == 0
    assert (pack / "test/dataset.json").is_file()


def test_builders_call_themselves_as_they_were_called(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hrm"])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["data", "maze", "--help"])
    assert "usage: hrm data maze " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "is_demo"),
    [
        ([], True),
        (["seed=1", "checkpoint_path=runs/a"], True),
        (["experiment=sudoku_extreme_1k"], False),
        (["experiment=null"], False),
        (["data_path=data/mine", "lr=1e-3"], False),
        (["data=maze_30x30"], False),
        (["arch=hrm_v1"], False),
        (["--help"], False),
    ],
)
def test_training_without_a_recipe_is_the_demo(
    argv: list[str], is_demo: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_recipe(argv) == ([DEMO, *argv] if is_demo else argv)
    assert (DEMO in capsys.readouterr().out) is is_demo
