"""A copy of the project, into which a test drops files that nothing else in it knows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.entry_points import ROOT

COPIED = ("hrm", "config", "pretrain.py", "evaluate.py")


def copy_project(folder: Path, *more: str) -> Path:
    """What runs in the project, and `more` of its files and folders."""
    for name in (*COPIED, *more):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def block(page: str, language: str) -> str:
    """The first block of a page of `docs/` in a language."""
    found = re.search(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def run_in(project: Path, *command: str) -> str:
    """What Python prints in the copy; it must succeed."""
    # A wide terminal: help is not broken into lines.
    shared = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
    done = subprocess.run([sys.executable, *command], cwd=project, env=shared, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
