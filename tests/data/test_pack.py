"""The pack format: what is written can be read, what is broken is named, what exists is never lost."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hrm.data.pack import (
    Pack,
    PackMetadata,
    PackSet,
    open_pack,
    replace_pack,
    write_identifiers,
    write_provenance,
    write_split,
)
from hrm.errors import UserError

# Two groups: one of a single puzzle with two examples, one of two puzzles with one and three examples.
METADATA = PackMetadata(
    pad_id=0,
    ignore_label_id=0,
    blank_identifier_id=0,
    vocab_size=11,
    seq_len=4,
    num_puzzle_identifiers=4,
    total_groups=2,
    mean_puzzle_examples=2.0,
    sets=("all",),
)


def example_set() -> PackSet:
    tokens = np.arange(24, dtype=np.uint8).reshape(6, 4) % 11
    return PackSet(
        inputs=tokens,
        labels=tokens[::-1].copy(),
        puzzle_identifiers=np.array([1, 2, 3], np.int32),
        puzzle_indices=np.array([0, 2, 3, 6], np.int32),
        group_indices=np.array([0, 1, 3], np.int32),
    )


@pytest.fixture
def pack_dir(tmp_path: Path) -> Path:
    write_split(tmp_path / "pack" / "train", METADATA, {"all": example_set()})
    return tmp_path / "pack"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_arrays(left: PackSet, right: PackSet) -> None:
    for name, array in vars(left).items():
        np.testing.assert_array_equal(array, getattr(right, name), err_msg=name)


# --- reading what was written ---


def test_round_trip(pack_dir: Path) -> None:
    pack = open_pack(str(pack_dir), "train")
    assert (pack.path, pack.split, pack.metadata) == (pack_dir, "train", METADATA)
    assert list(pack.sets) == ["all"]
    assert_same_arrays(pack.sets["all"], example_set())


def test_tokens_are_mapped_read_only(pack_dir: Path) -> None:
    data = open_pack(pack_dir, "train").sets["all"]
    for array in (data.inputs, data.labels):
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_pickles_as_its_address(tmp_path: Path) -> None:
    examples = 50_000
    tokens = np.ones((examples, 4), np.uint8)
    steps = np.arange(examples + 1)
    metadata = PackMetadata(0, 0, 0, 11, 4, 1, examples, 1.0, ("all",))
    data = PackSet(tokens, tokens, np.zeros(examples, np.int32), steps, steps)
    write_split(tmp_path / "train", metadata, {"all": data})
    pickled = pickle.dumps(open_pack(tmp_path, "train"))
    assert len(pickled) < 2_000
    copy = pickle.loads(pickled)
    assert isinstance(copy, Pack)
    assert copy.metadata == metadata
    assert_same_arrays(copy.sets["all"], data)


@pytest.mark.parametrize("ignore_label_id", [0, None])
def test_opens_packs_of_the_published_builders(tmp_path: Path, ignore_label_id: int | None) -> None:
    # Written here file by file: int64 tokens, int32 offsets, a whole number for the mean, a field we do not know.
    folder = tmp_path / "sudoku" / "test"
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(2, 11, (5, 81))
    np.save(folder / "all__inputs.npy", tokens)
    np.save(folder / "all__labels.npy", np.where(tokens > 5, tokens, 0))
    np.save(folder / "all__puzzle_identifiers.npy", np.zeros(5, np.int32))
    np.save(folder / "all__puzzle_indices.npy", np.arange(6, dtype=np.int32))
    np.save(folder / "all__group_indices.npy", np.arange(6, dtype=np.int32))
    metadata = {"seq_len": 81, "vocab_size": 11, "pad_id": 0, "ignore_label_id": ignore_label_id, "sets": ["all"]}
    metadata |= {"blank_identifier_id": 0, "num_puzzle_identifiers": 1, "total_groups": 5, "mean_puzzle_examples": 1}
    metadata |= {"made_by": "someone"}
    (folder / "dataset.json").write_text(json.dumps(metadata))
    pack = open_pack(tmp_path / "sudoku", "test")
    assert pack.metadata.ignore_label_id == ignore_label_id
    np.testing.assert_array_equal(pack.sets["all"].inputs, tokens)


@pytest.mark.parametrize(("dtype", "ignore"), [(np.uint8, 255), (np.int8, -1), (np.int64, -100), (">i4", -100)])
def test_ignored_labels_may_lie_outside_the_vocabulary(tmp_path: Path, dtype: str, ignore: int) -> None:
    data = example_set()
    labels = data.labels.astype(dtype)
    labels[1:3, 2] = ignore
    metadata = PackMetadata(**(vars(METADATA) | {"ignore_label_id": ignore}))
    write_split(tmp_path / "train", metadata, {"all": PackSet(**(vars(data) | {"labels": labels}))})
    np.testing.assert_array_equal(open_pack(tmp_path, "train").sets["all"].labels, labels)


def test_totals_are_over_all_sets(tmp_path: Path) -> None:
    metadata = PackMetadata(**(vars(METADATA) | {"sets": ("easy", "hard"), "total_groups": 4}))
    write_split(tmp_path / "train", metadata, {"easy": example_set(), "hard": example_set()})
    assert list(open_pack(tmp_path, "train").sets) == ["easy", "hard"]


def test_a_bad_token_is_found_wherever_it_is(tmp_path: Path) -> None:
    # Larger than one scanned chunk, the bad token in the last row.
    examples, width = 30_000, 81
    tokens = np.ones((examples, width), np.uint8)
    tokens[-1, 80] = 11
    steps = np.arange(examples + 1)
    data = PackSet(tokens, np.ones_like(tokens), np.zeros(examples, np.int32), steps, steps)
    write_split(tmp_path / "train", PackMetadata(0, 0, 0, 11, width, 1, examples, 1.0, ("all",)), {"all": data})
    with pytest.raises(UserError, match=f"holds 11 at row {examples - 1}, column 80"):
        open_pack(tmp_path, "train")


# --- one sentence for each way to be broken ---


def change_metadata(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def drop_field(folder: Path) -> None:
    file = folder / "dataset.json"
    metadata = json.loads(file.read_text())
    del metadata["vocab_size"]
    file.write_text(json.dumps(metadata))


def change_array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / f"all__{name}.npy"
        np.save(file, change(np.load(file)), allow_pickle=True)

    return apply


def put(name: str, index: int | tuple[int, int], value: int) -> Callable[[Path], None]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.int64)
        array[index] = value
        return array

    return change_array(name, change)


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def truncate(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return apply


def save_npz(folder: Path) -> None:
    with (folder / "all__inputs.npy").open("wb") as file:
        np.savez(file, tokens=np.zeros(3, np.int32))


BAD_PACKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # kind: (how it is broken, the file named, what is said of it)
    "no dataset.json": (remove("dataset.json"), "dataset.json", "is missing"),
    "torn json": (truncate("dataset.json", 40), "dataset.json", "is not valid JSON"),
    "binary json": (overwrite("dataset.json", b"\xff\xfe\x00"), "dataset.json", "is not valid JSON"),
    "json no object": (overwrite("dataset.json", b"[1]"), "dataset.json", "holds a list where an object"),
    "no field": (drop_field, "dataset.json", "lacks the field vocab_size"),
    "text for integer": (change_metadata(vocab_size="11"), "dataset.json", "has vocab_size '11', which is not an int"),
    "bool for integer": (change_metadata(pad_id=True), "dataset.json", "has pad_id True, which is not an integer"),
    "fraction": (change_metadata(seq_len=4.5), "dataset.json", "has seq_len 4.5, which is not an integer"),
    "ignore id": (change_metadata(ignore_label_id="no"), "dataset.json", "ignore_label_id 'no', which is not an integ"),
    "mean as text": (change_metadata(mean_puzzle_examples="2"), "dataset.json", "examples '2', which is not a number"),
    "sets as text": (change_metadata(sets="all"), "dataset.json", "has sets 'all', which is not a list"),
    "no sets": (change_metadata(sets=[]), "dataset.json", "has sets [], which is not a list of at least one"),
    "set twice": (change_metadata(sets=["all", "all"]), "dataset.json", "none of them twice"),
    "set of lists": (change_metadata(sets=[["all"]]), "dataset.json", "has sets [['all']], which is not a list"),
    "pad id": (
        change_metadata(pad_id=11),
        "dataset.json",
        "has pad_id 11, outside 0 to 10 (vocab_size 11);",
    ),
    "blank id": (
        change_metadata(blank_identifier_id=-1),
        "dataset.json",
        "has blank_identifier_id -1, outside 0 to 3 (num",
    ),
    "no width": (change_metadata(seq_len=0), "dataset.json", "has seq_len 0, which is not positive"),
    "groups in all": (change_metadata(total_groups=3), "dataset.json", "total_groups 3, but the sets hold 2 groups"),
    "mean": (change_metadata(mean_puzzle_examples=2.03), "dataset.json", "2.03, but the sets hold 2 examples for each"),
    "mean NaN": (change_metadata(mean_puzzle_examples=float("nan")), "dataset.json", "has mean_puzzle_examples nan"),
    "unknown set": (change_metadata(sets=["none"]), "none__inputs.npy", "is missing"),
    "no array": (remove("all__labels.npy"), "all__labels.npy", "is missing"),
    "torn array": (truncate("all__inputs.npy", 140), "all__inputs.npy", "is torn or is not a plain .npy file"),
    "torn header": (truncate("all__inputs.npy", 20), "all__inputs.npy", "is torn or is not a plain .npy file"),
    "empty array file": (truncate("all__group_indices.npy", 0), "all__group_indices.npy", "is torn or is not a plain"),
    "not npy": (overwrite("all__inputs.npy", b"1,2,3\n"), "all__inputs.npy", "is torn or is not a plain .npy file"),
    "npz": (save_npz, "all__inputs.npy", "is torn or is not a plain .npy file"),
    "pickled": (change_array("inputs", lambda a: a.astype(object)), "all__inputs.npy", "is torn or is not a plain"),
    "floats": (
        change_array("labels", lambda a: a.astype(np.float32)),
        "all__labels.npy",
        "holds float32, not integers",
    ),
    "bools": (change_array("inputs", lambda a: a > 5), "all__inputs.npy", "holds bool, not integers"),
    "float offsets": (change_array("puzzle_indices", lambda a: a / 1), "all__puzzle_indices.npy", "holds float64"),
    "flat tokens": (change_array("inputs", np.ravel), "all__inputs.npy", "has shape (24,), not 2 dimensions"),
    "deep offsets": (
        change_array("group_indices", lambda a: a[None]),
        "all__group_indices.npy",
        "has shape (1, 3), not 1 dimension;",
    ),
    "lengths": (
        change_array("labels", lambda a: a[:5]),
        "all__labels.npy",
        "has shape (5, 4), but the inputs have (6, ",
    ),
    "width": (change_metadata(seq_len=5), "all__inputs.npy", "has rows of 4 tokens, but dataset.json has seq_len 5"),
    "token high": (
        put("inputs", (5, 1), 11),
        "all__inputs.npy",
        "holds 11 at row 5, column 1, outside 0 to 10 (vocab",
    ),
    "token low": (put("inputs", (0, 3), -1), "all__inputs.npy", "holds -1 at row 0, column 3"),
    "label high": (put("labels", (2, 0), 12), "all__labels.npy", "holds 12 at row 2, column 0"),
    "label low": (
        put("labels", (2, 0), -100),
        "all__labels.npy",
        "outside 0 to 10 (vocab_size 11) and not ignore_label_id 0",
    ),
    "identifier": (
        put("puzzle_identifiers", 1, 4),
        "all__puzzle_identifiers.npy",
        "holds 4 at row 1, outside 0 to 3 (num_puzzle_identifiers 4);",
    ),
    "first offset": (put("puzzle_indices", 0, 1), "all__puzzle_indices.npy", "starts at 1, not at 0"),
    "empty puzzle": (
        put("puzzle_indices", 1, 3),
        "all__puzzle_indices.npy",
        "leaves puzzle 1 empty (from 3 to 3)",
    ),
    "empty group": (put("group_indices", 1, 0), "all__group_indices.npy", "leaves group 0 empty (from 0 to 0)"),
    "backwards": (
        change_array("puzzle_indices", lambda a: a[[0, 2, 1, 3]].astype(np.uint32)),
        "all__puzzle_indices.npy",
        "runs backwards at puzzle 1 (from 3 to 2)",
    ),
    "examples left": (put("puzzle_indices", 3, 5), "all__puzzle_indices.npy", "ends at 5, but there are 6 examples"),
    "puzzles beyond": (put("group_indices", 2, 4), "all__group_indices.npy", "ends at 4, but there are 3 puzzles"),
    "identifiers left": (
        change_array("puzzle_identifiers", lambda a: a[:2]),
        "all__puzzle_indices.npy",
        "has 4 offsets, but 2 puzzle identifiers need 3",
    ),
    "no groups": (change_array("group_indices", lambda a: a[:1]), "all__group_indices.npy", "has 1 offset, too few"),
}


@pytest.mark.parametrize("kind", BAD_PACKS)
def test_bad_pack(pack_dir: Path, kind: str) -> None:
    spoil, file, said = BAD_PACKS[kind]
    spoil(pack_dir / "train")
    with pytest.raises(UserError) as caught:
        open_pack(pack_dir, "train")
    sentence = str(caught.value)
    assert sentence.startswith(f"{pack_dir / 'train' / file} ")
    assert said in sentence
    assert re.search(r"; build .*\.$", sentence), "no way out"
    assert "\n" not in sentence


def test_missing_pack_and_split(pack_dir: Path) -> None:
    with pytest.raises(UserError, match=r"/nothing does not exist; build it, or correct data_path\.$"):
        open_pack(pack_dir / "nothing", "train")
    with pytest.raises(UserError, match=r"test/dataset\.json is missing \(complete splits there: train\)"):
        open_pack(pack_dir, "test")


# --- writing ---


def test_identifiers_and_provenance(tmp_path: Path) -> None:
    write_identifiers(tmp_path, ["<blank>", "é"])
    assert json.loads((tmp_path / "identifiers.json").read_text()) == ["<blank>", "é"]
    write_provenance(tmp_path, "sudoku", {"num_aug": 7, "source_dir": Path("raw")}, "raw")
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance.pop("hrm_version")
    assert provenance == {"builder": "sudoku", "source": "raw", "arguments": {"num_aug": 7, "source_dir": "raw"}}


def write_whole_pack(folder: Path) -> None:
    for split in ("train", "test"):
        write_split(folder / split, METADATA, {"all": example_set()})
    write_identifiers(folder, ["<blank>", "a", "b", "c"])
    write_provenance(folder, "test", {"seed": 0}, "nowhere")


def test_same_pack_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with replace_pack(tmp_path / name) as folder:
            write_whole_pack(folder)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("existing", ["nothing", "empty folder", "pack", "no parent"])
def test_replace_pack(tmp_path: Path, existing: str) -> None:
    target = tmp_path / ("deep/er/pack" if existing == "no parent" else "pack")
    if existing in ("empty folder", "pack"):
        target.mkdir()
    if existing == "pack":
        write_split(target / "train", METADATA, {"all": example_set()})
        (target / "train" / "stale.npy").touch()
    before = contents(target)
    with replace_pack(target) as folder:
        assert folder.is_dir()
        assert folder.parent.parent == target.parent, "moved within one file system"
        write_whole_pack(folder)
        assert contents(target) == before
    assert sorted(os.listdir(target)) == ["identifiers.json", "provenance.json", "test", "train"]
    assert not (target / "train" / "stale.npy").exists()
    assert os.listdir(target.parent) == ["pack"]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_replace_pack_undone(pack_dir: Path, error: type[BaseException], existing: bool) -> None:
    target = pack_dir if existing else pack_dir.parent / "other"
    before = contents(pack_dir.parent)

    def build() -> None:
        with replace_pack(target) as folder:
            write_whole_pack(folder)
            raise error

    with pytest.raises(error):
        build()
    assert contents(pack_dir.parent) == before
    assert os.listdir(pack_dir.parent) == ["pack"]


def test_old_pack_comes_back_when_the_move_fails(pack_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(pack_dir)
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("disk trouble")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_new)

    def build() -> None:
        with replace_pack(pack_dir) as folder:
            write_whole_pack(folder)

    with pytest.raises(OSError, match="disk trouble"):
        build()
    assert contents(pack_dir) == before
    assert os.listdir(pack_dir.parent) == ["pack"]


def test_replace_pack_follows_links(pack_dir: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pack_dir)
    with replace_pack(link) as folder:
        write_whole_pack(folder)
    assert link.is_symlink()
    assert open_pack(pack_dir, "test").metadata == METADATA


def test_replace_pack_spares_what_is_no_pack(pack_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    # A folder of packs and a single split hold a dataset.json too, but not where a pack has it.
    for target, said in [
        (tmp_path, "holds files but no pack"),
        (pack_dir / "train", "holds files but no pack"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "pack", "cannot be written"),
    ]:
        with pytest.raises(UserError, match=f"^{re.escape(str(target))} {said}.*; give the pack .*\\.$"):
            replace_pack(target).__enter__()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 3000, "a\0b"])
def test_names_that_no_folder_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(.*; give the pack another folder\.$") as told:
        replace_pack(tmp_path / name).__enter__()
    assert len(str(told.value)) < 300
