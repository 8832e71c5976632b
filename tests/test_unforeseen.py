"""Errors that nobody foresaw: a sentence, a status that is not 0, and a traceback that is kept."""

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hrm.config import EvaluateConfig
from hrm.config.compose import run
from hrm.data.builders.common import run_command
from hrm.unforeseen import EXIT_UNFORESEEN, traceback_folder, unforeseen


def failing(error: BaseException, folder: Path | None = None) -> Callable[[object], str]:
    def work(_: object) -> str:
        with contextlib.nullcontext() if folder is None else traceback_folder(folder):
            raise type(error)(*error.args)

    return work


def status_of(work: Callable[[object], object]) -> int:
    with pytest.raises(SystemExit) as ended:
        run(EvaluateConfig, "evaluate", work, "python evaluate.py", ["checkpoint=x"])
    status = ended.value.code
    assert isinstance(status, int)
    return status


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "error", [RuntimeError("odd\x1b[31m thing"), KeyError("odd"), AssertionError(), TypeError("odd")]
)
@pytest.mark.parametrize("in_run_folder", [True, False])
def test_one_sentence_and_a_traceback_in_a_file(
    error: Exception, in_run_folder: bool, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path if in_run_folder else None
    assert status_of(failing(error, folder)) == EXIT_UNFORESEEN
    said = capsys.readouterr().err
    assert said.startswith(f"error: this was not foreseen ({type(error).__name__}: ")
    assert said.count("\n") == 1
    assert "\x1b" not in said
    (file,) = (folder or here).glob("traceback_*.txt")
    assert str(file.resolve()) in said
    assert "in work\n    raise type(error)(*error.args)\n" in file.read_text()


def test_builders_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(RuntimeError("odd")), dict) == EXIT_UNFORESEEN  # type: ignore[arg-type]
    assert re.fullmatch(r"error: this was not foreseen \(RuntimeError: odd\): .*\n", capsys.readouterr().err)
    assert len(list(here.glob("traceback_*.txt"))) == 1


def test_without_a_writable_folder_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> io.TextIOWrapper:
        raise PermissionError("read-only")

    with pytest.raises(RuntimeError) as raised:
        failing(RuntimeError("odd"), tmp_path)(None)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refused)
        sentence = unforeseen(raised.value)
    assert sentence.startswith("this was not foreseen (RuntimeError: odd), and no file")
    assert "in work\n    raise type(error)(*error.args)\n" in capsys.readouterr().err


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "now")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f"traceback_now_{os.getpid()}.txt").symlink_to(tmp_path / "victim")
    assert status_of(failing(RuntimeError("odd"), tmp_path)) == EXIT_UNFORESEEN
    assert (tmp_path / "victim").read_text() == "precious"


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_too_little_memory_is_foreseen(error: Exception, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(failing(error)) == EXIT_UNFORESEEN
    assert capsys.readouterr().err.startswith("error: there is too little memory (")
    assert not list(here.iterdir())
