"""What `kernels=` can name is read from the files in `config/kernels/`, for the README, the benchmarks and the list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hrm.config.paths import choices_of
from hrm.errors import UserError
from hrm.kernels import __main__ as listing
from hrm.kernels import backend_names
from hrm.kernels.presets import AUTO, presets, table
from hrm.kernels.registry import EXPERIMENTAL
from tests.helpers.entry_points import ROOT


def test_every_file_is_a_preset_and_every_backend_has_one() -> None:
    names = [preset.name for preset in presets()]
    assert sorted(names) == sorted(choices_of("kernels"))
    assert names[0] == AUTO
    assert set(backend_names()) <= set(names)


def test_what_does_not_pay_comes_last() -> None:
    flags = [preset.experimental for preset in presets()]
    assert flags == sorted(flags)
    assert {preset.name for preset in presets() if preset.experimental} >= set(backend_names(EXPERIMENTAL))


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert f"{listing.BEGIN}\n\n{table()}\n\n{listing.END}" in page, "python -m hrm.kernels --write docs/kernels.md"


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{listing.BEGIN}\nold\n{listing.END}\nafter\n")
    listing.write_table(page)
    assert page.read_text() == f"before\n{listing.BEGIN}\n\n{table()}\n\n{listing.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(UserError, match="has no place for the table"):
        listing.write_table(page)


def test_a_preset_that_does_not_say_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# mine\nbackend: naive\n")
    monkeypatch.setattr("hrm.kernels.presets.choices_of", lambda group: {"mine": file})
    with pytest.raises(UserError, match=r"mine\.yaml must begin with `# WHAT IT IS"):
        presets()


def test_the_list_says_what_runs_here() -> None:
    done = subprocess.run([sys.executable, "-m", "hrm.kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    for preset in presets():
        assert f"kernels={preset.name}: {preset.what}" in done.stdout
    assert done.stdout.count("\n  here: ") == len(presets())
