"""Output that cannot be written: work whose results are in files goes on, work whose result is printed says so."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hrm.output import bar_interval
from tests.helpers.entry_points import ROOT

PRINTS = "import sys; from hrm.output import {name}\nwith {name}():\n    print('x' * 100_000, flush=True)\n"
BUILDS = [sys.executable, "dataset/build_sudoku_dataset.py", "--generate", "3x3"]


def status_of(code: str, redirected: str) -> tuple[int, str]:
    """The exit status of Python's, and what is told on stderr."""
    script = f'{sys.executable} -c "$CODE" {redirected}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | {"CODE": code}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["unbreakable_output", "output_that_counts"])
@pytest.mark.parametrize("redirected", ["| head -c 1", "| true", ">&-", ""])
def test_readers_may_leave(name: str, redirected: str) -> None:
    assert status_of(PRINTS.format(name=name), redirected) == (0, "")


@pytest.mark.parametrize(("name", "is_told"), [("unbreakable_output", False), ("output_that_counts", True)])
def test_a_full_disk_is_told_where_output_is_the_result(name: str, is_told: bool) -> None:
    status, said = status_of(PRINTS.format(name=name), "> /dev/full")
    assert ("UserError: the output cannot be written (No space left on device)" in said) == is_told
    assert status == is_told


def test_a_full_disk_is_told_from_within() -> None:
    code = "from hrm.output import unbreakable_output\nwith unbreakable_output():\n    {}"
    inner = PRINTS.format(name="output_that_counts").replace("\n", "\n    ")
    status, said = status_of(code.format(inner), "> /dev/full")
    assert status == 1
    assert "the output cannot be written" in said


@pytest.mark.parametrize("redirected", ["2> /dev/full", "2>&-"])
def test_errors_that_nobody_hears_keep_their_status(redirected: str) -> None:
    code = "import sys; from hrm.unforeseen import tell; tell('wrong'); sys.exit(2)"
    assert status_of(code, redirected)[0] == 2


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("SIGINT", 130, "error: stopped by Ctrl-C; nothing was written.\n"), ("SIGTERM", 143, ""), ("SIGHUP", 129, "")],
)
def test_builders_that_are_ended_leave_nothing(name: str, status: int, said: str, tmp_path: Path) -> None:
    arguments = ["--train-size", "100000", "--test-size", "100", "--output-dir", str(tmp_path / "packs/one")]
    errors = subprocess.PIPE
    # In the background of a script, Ctrl-C is ignored, and children inherit that.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        builder = subprocess.Popen([*BUILDS, *arguments], cwd=ROOT, stderr=errors, text=True)
    finally:
        signal.signal(signal.SIGINT, former)
    patience = time.monotonic() + 60
    while not any(tmp_path.glob("packs/.one-*")):
        assert time.monotonic() < patience
        time.sleep(0.05)
    builder.send_signal(signal.Signals[name])
    _, told = builder.communicate(timeout=60)
    assert (builder.returncode, told.splitlines()[-1:]) == (status, said.splitlines())
    assert not list((tmp_path / "packs").iterdir())


def test_bars_in_files_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    closed = io.StringIO()
    closed.close()
    for stream in (io.StringIO(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert bar_interval() == 10.0
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bar_interval() == 0.1


def test_no_file_gets_a_standard_descriptor(tmp_path: Path) -> None:
    """With all three closed by the caller, what C code prints would end in one of a run's files."""
    file = tmp_path / "file"
    script = f"""
from hrm.output import unbreakable_output

with unbreakable_output(), open({str(file)!r}, "w") as opened:
    opened.write(str(opened.fileno()))
"""
    shell = 'exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", shell, sys.executable, script], cwd=ROOT, check=True)
    assert int(file.read_text()) > 2
