"""Which task a pack holds: what it says, and what is guessed of packs that say nothing."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hrm.data.builders import custom, maze
from hrm.data.builders.maze_puzzles import random_mazes, shortest_paths
from hrm.data.pack import Pack, PackMetadata, PackSet, open_pack, write_split
from hrm.errors import UserError
from hrm.tasks import all_tasks, task_of
from hrm.tasks.base import PuzzleSize
from hrm.tasks.sudoku import BoxShape
from tests.helpers.entry_points import make_pack
from tests.helpers.recordings import ARC_PAIRS, corner


def write_foreign_pack(folder: Path, inputs: NDArray[Any], labels: NDArray[Any], vocab_size: int) -> Pack:
    """A test split as the published builders leave it: without provenance."""
    offsets = np.arange(len(inputs) + 1)
    metadata = PackMetadata(0, 0, 0, vocab_size, inputs.shape[1], 1, len(inputs), 1.0, ("all",))
    identifiers = np.zeros(len(inputs), dtype=np.int32)
    write_split(folder / "test", metadata, {"all": PackSet(inputs, labels, identifiers, offsets, offsets)})
    return open_pack(folder, "test")


def make_mazes(folder: Path, side: int) -> Pack:
    size = ["--generate", f"{side}x{side}", "--min-length", "4", "--train-size", "4", "--test-size", "4"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert maze.main([*size, "--output-dir", str(folder)]) == 0
    return open_pack(folder, "test")


def forget(pack: Pack, *fields: str) -> Pack:
    """The pack without these fields of its provenance; without any, if none is given."""
    file = pack.path / "provenance.json"
    provenance = json.loads(file.read_text())
    if fields:
        file.write_text(json.dumps({name: value for name, value in provenance.items() if name not in fields}))
    else:
        file.unlink()
    return pack


def test_the_tasks_are_found_in_their_folder() -> None:
    assert {"arc", "maze", "sudoku", "tokens"} <= all_tasks().keys()
    assert all(task.name == name for name, task in all_tasks().items())


@pytest.mark.parametrize("box", BoxShape.supported(), ids=str)
def test_sudoku(box: BoxShape, tmp_path: Path) -> None:
    make_pack(tmp_path, box=str(box))
    pack = open_pack(tmp_path, "test")
    assert task_of(pack).name == "sudoku"
    assert task_of(forget(pack, "task")).name == "sudoku"
    assert task_of(forget(pack)).name == "sudoku"


@pytest.mark.parametrize("side", [4, 7])
def test_mazes_of_4x4_cells_are_no_sudoku(side: int, tmp_path: Path) -> None:
    pack = make_mazes(tmp_path, side)
    assert task_of(pack).name == "maze"
    assert task_of(forget(pack, "task")).name == "maze"  # as packs of early versions are
    assert task_of(forget(pack)).name == "maze"


def test_packs_of_the_published_code_are_guessed(tmp_path: Path) -> None:
    mazes, _ = random_mazes(3, 8, 10, np.random.default_rng(0))
    inputs, labels = mazes.reshape(3, 64), shortest_paths(mazes).reshape(3, 64)
    assert task_of(write_foreign_pack(tmp_path / "maze", inputs, labels, 6)).name == "maze"
    grids = np.concatenate([corner(pair.input) for pair in ARC_PAIRS])
    assert task_of(write_foreign_pack(tmp_path / "arc", grids, grids, 12)).name == "arc"
    assert task_of(write_foreign_pack(tmp_path / "other", inputs, labels, 17)).name == "tokens"


def test_a_vocabulary_file_means_your_own_data(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"input": [1, 2, 3, 4] * 4, "output": [4, 3, 2, 5] * 4}) + "\n" for _ in range(4))
    (tmp_path / "lines.jsonl").write_text(lines)
    argv = ["--train", str(tmp_path / "lines.jsonl"), "--test-fraction", "0.5", "--output-dir", str(tmp_path / "pack")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert custom.main(argv) == 0
    pack = open_pack(tmp_path / "pack", "test")
    assert PuzzleSize.of(pack) == (16, 6)  # as a 4x4 Sudoku
    assert task_of(pack).name == "tokens"
    assert task_of(forget(pack)).name == "tokens"


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("suduko", r"says task 'suduko', which is not known; did you mean sudoku\?"),
        ("chess", r"says task 'chess', which is not known; there are: arc, .*tokens"),
        (7, r"says task 7, which is not known"),
        ("arc", r"says task 'arc', but no puzzle of it has 16 tokens in a vocabulary of 6: correct it"),
    ],
)
def test_a_task_that_cannot_be(task: object, sentence: str, tmp_path: Path) -> None:
    make_pack(tmp_path)
    (tmp_path / "provenance.json").write_text(json.dumps({"task": task}))
    with pytest.raises(UserError, match=sentence) as told:
        task_of(open_pack(tmp_path, "test"))
    assert str(tmp_path / "provenance.json") in str(told.value)


def test_training_loads_no_report() -> None:
    """Nor do tasks need PyTorch, so that builders start at once."""
    listing = "; import sys; print(*sys.modules)"
    for statement, unwanted in (
        ("import hrm.training.loop", ("hrm.evaluation.report", "hrm.evaluation.show", "matplotlib", "PIL")),
        ("import hrm.tasks; hrm.tasks.all_tasks()", ("torch",)),
        ("import hrm.data.builders.sudoku", ("torch",)),
    ):
        command = [sys.executable, "-c", statement + listing]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        loaded = done.stdout.split()
        assert len(loaded) > 50
        assert [name for name in loaded if name.startswith(unwanted)] == []
