"""Progress bars write seldom where every state of them is kept."""

import io
import sys

import pytest

from hrm.output import bar_interval


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
