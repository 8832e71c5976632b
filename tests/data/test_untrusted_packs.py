"""Packs that somebody else made: pipes, holes and odd values in their files end in a sentence, soon."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.data.pack import open_pack, read_identifiers, read_provenance
from hrm.data.registry import built
from hrm.errors import UserError
from tests.helpers.entry_points import make_pack

ARRAYS = ["inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    make_pack(tmp_path / "pack")
    return tmp_path / "pack"


@pytest.mark.parametrize("name", [*(f"all__{array}.npy" for array in ARRAYS), "dataset.json"])
def test_pipes_are_not_waited_for(name: str, pack: Path) -> None:
    (pack / "test" / name).unlink()
    os.mkfifo(pack / "test" / name)
    with pytest.raises(UserError, match=r"regular file|is missing"):
        open_pack(pack, "test")


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("gigabytes", [3, 3000])
def test_holes_are_not_read(array: str, gigabytes: int, pack: Path) -> None:
    size = gigabytes << 30
    file = pack / "test" / f"all__{array}.npy"
    np.save(file, np.load(file)[:0].astype(np.int8))
    shape = f"({size // 16}, 16)" if array in ("inputs", "labels") else f"({size},)"
    header = f"{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with file.open("wb") as stream:
        stream.write(b"\x93NUMPY\x01\x00v\x00" + header.encode())
        stream.truncate(128 + size)
    started = time.process_time()
    with pytest.raises(UserError, match="hardly any are stored"):
        open_pack(pack, "test")
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean_puzzle_examples", 10**400),
        ("mean_puzzle_examples", float("nan")),
        ("vocab_size", 2**31),
        ("num_puzzle_identifiers", 10**30),
        ("seq_len", -(10**400)),
        ("total_groups", 10**400),
        ("sets", ["all\0"]),
        ("sets", ["x" * 300]),
        ("sets", [["all"]]),
        ("pad_id", [[[[]]]]),
    ],
)
def test_odd_metadata(field: str, value: Any, pack: Path) -> None:
    file = pack / "test/dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError) as told:
        open_pack(pack, "test")
    assert str(told.value).startswith(str(pack / "test"))


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "x/" * 3000])
def test_impossible_paths_do_not_exist(path: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_pack(path, "test")


@pytest.mark.parametrize("content", ["[" * 10_000, '["\\ud800"]', "{}", '["a", "a"]', "[1, 2]"])
def test_odd_identifiers(content: str, pack: Path) -> None:
    (pack / "identifiers.json").write_text(content)
    with pytest.raises(UserError, match=r"identifiers\.json"):
        read_identifiers(pack, 1)


@pytest.mark.parametrize("content", ['{"counts": 3}', '{"counts": {"train": {"groups": "x"}}}', "{}"])
def test_provenance_of_other_builders_is_no_hindrance_to_the_list(content: str, pack: Path) -> None:
    (pack / "provenance.json").write_text(content)
    assert built(pack) == "yes, uncounted"


@pytest.mark.parametrize("content", ["[" * 10_000, "[]", '{"counts": '])
def test_damaged_provenance_is_told(content: str, pack: Path) -> None:
    (pack / "provenance.json").write_text(content)
    for read in (read_provenance, built):
        with pytest.raises(UserError, match=r"provenance\.json"):
            read(pack)
