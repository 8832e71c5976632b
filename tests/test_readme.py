"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hrm.data.pack import open_pack
from tests.helpers.entry_points import ROOT
from tests.helpers.readme import README, python_block


def test_pack_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", python_block("data/sorting")], cwd=tmp_path, check=True)
    examples = open_pack(tmp_path / "data/sorting", "test").sets["all"]
    assert len(examples.inputs) == 500
    assert (np.sort(examples.inputs, axis=1) == examples.labels).all()


def test_model_script(tmp_path: Path) -> None:
    script = python_block("build_model")
    check = "assert outputs['logits'].shape == (2, 81, 11) and carry.steps.tolist() == [1, 1] and loss.requires_grad"
    subprocess.run([sys.executable, "-c", f"{script}\n{check}"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("group", ["arch", "data", "optim", "experiment"])
def test_all_choices_are_named(group: str) -> None:
    (row,) = re.findall(rf"^\| `{group}=` \| (.*?) \|", README, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == {file.stem for file in (ROOT / "config" / group).glob("*.yaml")}
