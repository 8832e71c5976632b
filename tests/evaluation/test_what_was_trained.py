"""evaluate.py names what makes its figures meaningless: weights that are not finite, other meanings of identifiers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.entry_points import CPU, run_script


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the fixture `trained`, whose run reads the pack beside it."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def warnings_of(copied: Path, *options: str) -> list[str]:
    outcome = run_script("evaluate.py", *CPU, f"checkpoint={copied / 'run'}", f"data_path={copied / 'pack'}", *options)
    assert outcome.status == 0, outcome.err
    return [line for line in outcome.err.splitlines() if "warning: " in line]


def weights_file(copied: Path) -> Path:
    return max(file for file in (copied / "run").glob("step_*") if not file.suffix)


def test_nothing_is_said_of_what_is_well(copied: Path) -> None:
    assert warnings_of(copied) == []


@pytest.mark.parametrize(("value", "names"), [(math.nan, 1), (-math.inf, 2)])
def test_weights_that_are_not_finite(copied: Path, value: float, names: int) -> None:
    file = weights_file(copied)
    weights = torch.load(file, weights_only=True)
    for name in [name for name in weights if "lm_head" in name or "q_head.bias" in name][:names]:
        weights[name].view(-1)[-1] = value
    torch.save(weights, file)
    (warning,) = warnings_of(copied)
    assert f"{file} holds NaN or infinities in model.inner." in warning
    assert ("and 1 more" in warning) == (names == 2)


@pytest.mark.parametrize("change", ["reordered", "renamed", "as they were", "unknown"])
def test_other_meanings_of_identifiers(copied: Path, change: str) -> None:
    file = copied / "pack" / "identifiers.json"
    names = json.loads(file.read_text())
    if change == "reordered":
        file.write_text(json.dumps([*reversed(names), "one more"]))
    elif change == "unknown":
        file.unlink()
    elif change != "as they were":
        file.write_text(json.dumps(["<other>", *names[1:]]))
    assert len(warnings_of(copied)) == (change in ("reordered", "renamed"))
