"""The notebooks: stored without what they printed, they run from beginning to end, at toy size, in any folder."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.entry_points import ROOT

NOTEBOOKS = {
    "train-and-watch": {"epochs": 2, "train_puzzles": 80, "test_puzzles": 16},
    "look-inside": {"steps": 3, "starts": 2},
}
PICTURES = {"train-and-watch": 5, "look-inside": 7}

# Runs the cells as a notebook does, and has pictures that it would show drawn. Arguments: the file, and other values of
# its parameters.
RUN = """
import ast, json, sys
file, parameters = sys.argv[1:]
names, pictures = {"__name__": "__main__"}, 0
for cell in json.load(open(file, encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        body = ast.parse("".join(cell["source"]))
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, cell["id"], "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            pictures += hasattr(value, "_repr_png_") and value._repr_png_().startswith(b"\\x89PNG")
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names.keys() >= json.loads(parameters).keys()
            names.update(json.loads(parameters))
print("pictures:", pictures)
"""


def cells(name: str) -> list[dict[str, Any]]:
    content = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    found: list[dict[str, Any]] = content["cells"]
    return found


def test_all_are_tested() -> None:
    assert {file.stem for file in (ROOT / "notebooks").iterdir()} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_not_stored(name: str) -> None:
    assert len({cell["id"] for cell in cells(name)}) == len(cells(name))
    for cell in cells(name):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    text = "".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (ROOT / "notebooks" / target).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(ROOT / "notebooks" / f"{name}.ipynb"), json.dumps(NOTEBOOKS[name])]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"pictures: {PICTURES[name]}\n" in done.stdout
