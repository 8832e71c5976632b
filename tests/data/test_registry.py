"""The registry says of every data set what it must, and packs say where they came from."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from hrm.config import PROJECT_DIR
from hrm.data.builders import find_builders
from hrm.data.builders import listing as list_datasets
from hrm.data.builders import sudoku as build_sudoku_dataset
from hrm.data.pack import PackMetadata, PackSet, read_provenance, write_provenance, write_split
from hrm.data.registry import COLUMNS, listing, read_registry
from hrm.errors import UserError

REGISTRY = read_registry()


@pytest.mark.parametrize("name", REGISTRY)
def test_entries_are_complete(name: str) -> None:
    entry = REGISTRY[name]
    assert entry.name == name
    assert set(entry) == {*COLUMNS.keys() - {"built"}, "path", "build"}
    assert all(isinstance(value, str) and value for value in entry.values())
    assert str(entry.build).split()[0] in find_builders()


def test_every_pack_has_a_place_of_its_own() -> None:
    paths = [entry.path for entry in REGISTRY.values()]
    assert len(set(paths)) == len(paths)


def write_pack(folder: Path) -> None:
    """4 groups, 5 puzzles and 6 examples to train on, the same to test on; with a record in the pack."""
    tokens = np.ones((6, 3), dtype=np.uint8)
    data = PackSet(tokens, tokens, np.zeros(5, dtype=np.int32), np.array([0, 1, 2, 3, 4, 6]), np.array([0, 1, 2, 3, 5]))
    for split in ("train", "test"):
        write_split(folder / split, PackMetadata(0, 0, 0, 2, 3, 1, 4, 1.2, ("all",)), {"all": data})


def test_provenance_counts_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_bytes(b"puzzles")
    write_pack(tmp_path)
    write_provenance(tmp_path, "builder.py", {"seed": 3}, "somewhere", {"raw": tmp_path / "raw.csv"})
    provenance = read_provenance(tmp_path)
    counts = {"groups": 4, "puzzles": 5, "examples": 6}
    assert provenance["counts"] == {"train": counts, "test": counts}
    assert provenance["sha256"] == {"raw": hashlib.sha256(b"puzzles").hexdigest()}
    assert (provenance["builder"], provenance["source"], provenance["arguments"]) == (
        "builder.py",
        "somewhere",
        {"seed": 3},
    )


def test_sudoku_packs_record_their_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        line = f"{split},1.34341221434321,1234341221434321,0\n"
        (tmp_path / f"{split}.csv").write_text("source,question,answer,rating\n" + line)
    command = ["--source-dir", str(tmp_path), "--output-dir", str(tmp_path / "pack"), "--num-aug", "2"]
    assert build_sudoku_dataset.main(command) == 0
    provenance = read_provenance(tmp_path / "pack")
    assert provenance["sha256"] == {
        f"{split}.csv": hashlib.sha256((tmp_path / f"{split}.csv").read_bytes()).hexdigest()
        for split in ("train", "test")
    }
    assert provenance["counts"]["train"] == {"groups": 1, "puzzles": 3, "examples": 3}


def test_packs_without_provenance(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) == {}
    for text, problem in (("{", "is not valid JSON"), ("[1]", "holds a list where an object belongs")):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(UserError, match=rf"provenance\.json {problem}"):
            read_provenance(tmp_path)


def entry(path: Path) -> DictConfig:
    fields = dict.fromkeys(COLUMNS.keys() - {"built"}, "some thing") | {"path": str(path), "build": "dataset/b.py -x 1"}
    return OmegaConf.create(fields)


def test_listing(tmp_path: Path) -> None:
    packs = {name: tmp_path / name for name in ("recorded", "published", "missing", "homemade", "found")}
    for name in packs.keys() - {"missing"}:
        write_pack(packs[name])
    for name in ("recorded", "homemade"):
        write_provenance(packs[name], "dataset/b.py", {}, "my kitchen")
    (tmp_path / "notes").mkdir()
    lines = listing({name: entry(packs[name]) for name in ("recorded", "published", "missing")}).splitlines()
    rows = {line.split()[0]: line for line in lines if line and line[0] not in " -"}
    assert rows["name"].split() == list(COLUMNS)
    assert rows["recorded"].endswith("  4 + 4")
    assert rows["published"].endswith("  yes, uncounted")
    assert rows["missing"].endswith("  no")
    assert f"    python dataset/b.py -x 1 --output-dir {packs['missing']}" in lines
    assert lines[lines.index("Other packs here:") + 1 :] == [
        f"    {packs['found']}: yes, uncounted, of unknown origin",
        f"    {packs['homemade']}: 4 + 4, my kitchen, by dataset/b.py",
    ]


def test_long_cells_are_wrapped_and_kept_whole() -> None:
    words = [f"word-{number}" for number in range(20)]
    long = OmegaConf.merge(entry(Path("nowhere")), {"augmentation": " ".join(words)})
    assert isinstance(long, DictConfig)
    text = listing({"long": long})
    assert [word for word in text.split() if word.startswith("word-")] == words


def test_the_command_lists_every_entry(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT_DIR / "dataset/list_datasets.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines() if line} >= REGISTRY.keys()
    assert max(map(len, done.stdout.splitlines())) <= 150


def test_a_broken_pack_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pack = Path(next(iter(REGISTRY.values())).path)
    write_pack(pack)
    (pack / "provenance.json").write_text(json.dumps("lost"))
    assert list_datasets.main([]) == 2
    assert f"error: {pack / 'provenance.json'} holds a str" in capsys.readouterr().err
