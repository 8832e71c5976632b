"""One living run a folder: the living are not disturbed, the dead block nobody."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hrm.checkpoint import lock as lock_module
from hrm.checkpoint.lock import LOCK_FILE, Holder, RunLock
from hrm.errors import UserError
from tests.helpers.entry_points import ROOT
from tests.helpers.ranks import PATIENCE

pytestmark = pytest.mark.slow

# Takes the lock of a folder, says so, and holds it until its input ends.
HOLD = """
import sys
from pathlib import Path
from hrm.checkpoint.lock import RunLock
from hrm.errors import UserError
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""
# The same, with a child that was forked while the lock was held, as a loader's workers are.
_FORK = 'import os, time; os.fork() or (time.sleep(20), os._exit(0)); print("held", flush=True)'
HOLD_WITH_CHILD = HOLD.replace('print("held", flush=True)', _FORK)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock_module, "LEASE_SECONDS", 1.0)


def holding(folder: Path, program: str = HOLD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = holding(tmp_path)
    assert first_line(process) == "held"
    yield process
    process.kill()
    process.communicate()


def on_another_host(folder: Path, **changes: object) -> Holder:
    """Leave the lock file of a process that cannot be seen from here."""
    holder = replace(Holder.this_process(), host="elsewhere", pid=12, machine="another", token="t", **changes)  # type: ignore[arg-type]
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_living_process_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(UserError, match=rf"is held by process {holder.pid} on \S+ .*checkpoint_path"),
        RunLock(tmp_path),
    ):
        pass


def test_the_same_process_twice(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(UserError, match=rf"is held by process {os.getpid()} on"),
        RunLock(tmp_path / ".." / tmp_path.name),
    ):
        pass
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("program", [HOLD, HOLD_WITH_CHILD], ids=["alone", "its child lives on"])
def test_a_killed_process_blocks_nobody(tmp_path: Path, program: str) -> None:
    process = holding(tmp_path, program)
    assert first_line(process) == "held"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    started = time.monotonic()
    with RunLock(tmp_path):
        pass
    assert time.monotonic() - started < lock_module.LEASE_SECONDS / 2
    assert not list(tmp_path.iterdir())
    if program is HOLD_WITH_CHILD:
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdout is not None
    process.stdout.close()


def test_only_one_of_many_gets_it(tmp_path: Path) -> None:
    """Those that start at once, in a folder where a dead process left its lock."""
    (tmp_path / LOCK_FILE).write_text("{")
    processes = [holding(tmp_path) for _ in range(4)]
    lines = [first_line(process) for process in processes]
    winner = lines.index("held")
    sentences = [line for line in lines if line != "held"]
    assert len(sentences) == 3
    assert all(f"process {processes[winner].pid} on" in line for line in sentences)
    for process in processes:
        process.communicate("")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_a_beating_process_elsewhere_keeps_it(tmp_path: Path) -> None:
    on_another_host(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=beat)
    thread.start()
    lines: list[str] = []
    try:
        with pytest.raises(UserError, match="is held by process 12 on elsewhere"), RunLock(tmp_path, lines.append):
            pass
    finally:
        ended.set()
        thread.join()
    assert len(lines) == 1


@pytest.mark.usefixtures("quick")
def test_a_silent_process_elsewhere_loses_it(tmp_path: Path) -> None:
    on_another_host(tmp_path)
    started, lines = time.monotonic(), []
    with RunLock(tmp_path, lines.append) as taken:
        assert time.monotonic() - started > lock_module.LEASE_SECONDS
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert not taken.lost
    assert re.search(r"process 12 on elsewhere .*waiting up to 1 s", lines[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "attempt"),
    [("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")],
)
def test_a_later_attempt_at_the_same_job_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, attempt: str
) -> None:
    monkeypatch.setenv(name, "17")
    monkeypatch.setenv(attempt, "1")
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    on_another_host(tmp_path, jobs={name: ("17", 0)})
    with RunLock(tmp_path, pytest.fail):
        pass
    on_another_host(tmp_path, jobs={name: ("18", 0)})
    with pytest.raises(BaseException, match="waiting"), RunLock(tmp_path, pytest.fail):
        pass


@pytest.mark.usefixtures("quick")
def test_who_was_taken_for_dead_notices(tmp_path: Path) -> None:
    with RunLock(tmp_path) as suspended:
        (tmp_path / "new").write_text(json.dumps(asdict(replace(Holder.this_process(), host="elsewhere"))))
        (tmp_path / "new").replace(tmp_path / LOCK_FILE)
        deadline = time.monotonic() + PATIENCE
        while not suspended.lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (tmp_path / LOCK_FILE).is_file()  # it is the other's


@pytest.mark.usefixtures("quick")
def test_a_folder_that_is_gone_is_no_lost_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        (tmp_path / "run" / LOCK_FILE).unlink()
        (tmp_path / "run").rmdir()
        time.sleep(0.5)
        assert not lock.lost


NO_LOCK = r"\.lock is not the file that a run leaves there: remove it"
FOREIGN = '{"host": "h", "since": "s", "token": "t", "machine": "m", "pid": Infinity, "jobs": {}}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "1e999", '{"host": 1}', '{"jobs": [3]}', "\0" * 100, "[" * 60_000, FOREIGN, b"\xff"],
    ids=lambda content: repr(content)[:20],
)
def test_any_content_is_no_obstacle(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content.encode() if isinstance(content, str) else content)
    with RunLock(tmp_path, pytest.fail):
        pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=NO_LOCK), RunLock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / LOCK_FILE)
    with pytest.raises(UserError, match=NO_LOCK), RunLock(tmp_path):
        pass


@pytest.mark.parametrize("holder_is_dead", [True, False])
def test_a_hard_link_is_not_written_through(holder_is_dead: bool, tmp_path: Path, quick: None) -> None:
    """Such as in a copy by `cp -al`, of the folder of a run that was killed, or of other content."""
    text = json.dumps(asdict(Holder.this_process()) | {"pid": 1}) if holder_is_dead else "precious"
    (tmp_path / "other").write_text(text)
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "other", tmp_path / "run" / LOCK_FILE)
    with RunLock(tmp_path / "run", pytest.fail):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / "other").read_text() == text
    assert not list((tmp_path / "run").iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"run cannot be written \(No space left"), RunLock(tmp_path / "a" / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_folders_made_for_nothing_go(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "b"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made a folder"), RunLock(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\0b"])
def test_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be made a folder") as told, RunLock(tmp_path / name):
        pass
    assert len(str(told.value)) < 300
