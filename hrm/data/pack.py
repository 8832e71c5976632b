"""The data pack: puzzles as .npy files that training maps into memory, and the metadata that describe them.

    <pack>/identifiers.json      names of the puzzle identifiers
    <pack>/provenance.json       where it came from and how it was built
    <pack>/<split>/dataset.json  PackMetadata
    <pack>/<split>/<set>__<array>.npy   the arrays of PackSet

A group is one original puzzle with its augmentations, a puzzle is one augmentation with its examples, and an example is
one row of inputs and labels. A pack is checked whole when it is opened, so that what reads it later need not doubt it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from hrm.data.published import local_pack
from hrm.errors import UserError, shortened
from hrm.reading import parse_json, read_array, read_json, read_text, sha256_of
from hrm.version import __version__

IntArray = npt.NDArray[np.integer[Any]]

SPLITS = ("train", "test")

# Of dataset.json and provenance.json, which names each file that a pack was made from.
_MOST_METADATA_BYTES = 1 << 24

# Elements read at once when tokens are checked: enough to hide Python's share, little enough to stay in cache.
_SCAN_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class PackMetadata:
    """The fields of dataset.json.

    `pad_id` fills the inputs and `blank_identifier_id` the identifiers of rows that only pad a batch. Labels equal to
    `ignore_label_id` are not learned (None: all are). `mean_puzzle_examples` is examples per puzzle over all `sets`.
    """

    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    total_groups: int
    mean_puzzle_examples: float
    sets: tuple[str, ...]


@dataclass(frozen=True)
class PackSet:
    """The arrays of one set: N examples of S tokens, in puzzles, in groups; of any integer type."""

    inputs: IntArray  # [N, S]
    labels: IntArray  # [N, S]
    puzzle_identifiers: IntArray  # [puzzles]
    puzzle_indices: IntArray  # [puzzles + 1], offsets into the examples
    group_indices: IntArray  # [groups + 1], offsets into the puzzles


@dataclass(frozen=True)
class Pack:
    """One split of a pack on disk, as `open_pack` returns it: checked, its inputs and labels mapped read-only.

    Pickles as its address: another process maps the same files instead of being sent a copy of them.
    """

    path: Path
    split: str
    metadata: PackMetadata
    sets: dict[str, PackSet]

    def __reduce__(self) -> tuple[Callable[..., "Pack"], tuple[Path, str, PackMetadata]]:
        return _map_pack, (self.path, self.split, self.metadata)


def write_split(folder: Path, metadata: PackMetadata, sets: Mapping[str, PackSet]) -> None:
    """Write one split into `folder` (`<pack>/train`); dataset.json comes last, so a split that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in sets.items():
        for field in fields(PackSet):
            np.save(_array_file(folder, name, field.name), getattr(data, field.name), allow_pickle=False)
    puzzles = sum(len(data.puzzle_identifiers) for data in sets.values())
    _write_json(folder / "dataset.json", asdict(metadata) | {"total_puzzles": puzzles})  # which TRM's loader asks for


def write_examples(folder: Path, inputs: IntArray, labels: IntArray, vocab_size: int) -> None:
    """Write one split of plain puzzles: one example each, no augmentations, no names.

    Args:
        folder: as for `write_split`.
        inputs, labels: tokens [N, S]; token 0 pads, and is not learned in labels.
        vocab_size: number of different tokens, padding among them.
    """
    count, seq_len = inputs.shape
    offsets = np.arange(count + 1, dtype=np.int32)  # every puzzle is one example, every group one puzzle
    examples = PackSet(inputs, labels, np.zeros(count, dtype=np.int32), offsets, offsets)
    metadata = PackMetadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=1,
        total_groups=count,
        mean_puzzle_examples=1.0,
        sets=("all",),
    )
    write_split(folder, metadata, {"all": examples})


def write_identifiers(folder: Path, identifiers: Sequence[str]) -> None:
    """Write `<folder>/identifiers.json`: the name of every puzzle identifier, in order."""
    _write_json(folder / "identifiers.json", list(identifiers))


def read_identifiers(folder: Path, count: int) -> list[str]:
    """The names of `count` puzzle identifiers, from `<folder>/identifiers.json`.

    Those that TRM's builder leaves unused, which it calls <blank>, too, get names of their own.

    Raises:
        UserError: the file is missing, broken or too short.
    """
    file = folder / "identifiers.json"
    try:
        names = read_json(file)
    except (OSError, ValueError) as error:
        raise _broken(file, f"cannot be read ({error})") from error
    if isinstance(names, list):
        names = [f"<unused {row}>" if row and name == "<blank>" else name for row, name in enumerate(names)]
    if not _is_name_list(names) or len(names) < count:
        raise _broken(file, f"is no list of the {count} names that its dataset.json calls for")
    return list(names)


def write_provenance(
    folder: Path,
    builder: str,
    arguments: Mapping[str, object],
    source: str,
    files: Mapping[str, Path] | None = None,
    *,
    task: str | None = None,
) -> None:
    """Write `<folder>/provenance.json`: where the puzzles came from, and what to run to build the same pack again.

    It names the SHA-256 of each of the `files` that the puzzles were read from and counts what the splits hold, so it
    is written after them. It has no date, so that the same build gives the same bytes. `task` is the name of one of
    `hrm.tasks`, which says what the tokens mean.
    """
    provenance: dict[str, Any] = {} if task is None else {"task": task}
    provenance |= {"builder": builder, "hrm_version": __version__, "source": source, "arguments": dict(arguments)}
    if files:
        provenance["sha256"] = {name: sha256_of(file) for name, file in files.items()}
    if splits := _splits_in(folder):
        provenance["counts"] = {split: _counts(folder, split) for split in splits}
    _write_json(folder / "provenance.json", provenance)


def read_provenance(data_path: Path | str) -> dict[str, Any]:
    """What `<data_path>/provenance.json` holds; empty for packs without one, such as those of the published code.

    Raises:
        UserError: it is not valid JSON.
    """
    file = Path(data_path) / "provenance.json"
    if not file.is_file():
        return {}
    return _read_object(file, "an object")


@contextmanager
def replace_pack(output_dir: Path) -> Iterator[Path]:
    """Build a pack in a temporary folder beside `output_dir`, moved to `output_dir` once the body is through.

    Whatever ends the body early, an interrupt included, leaves `output_dir` as it was and removes the temporary folder.

    Raises:
        UserError: `output_dir` holds something that is not a pack, or cannot be written.
    """
    try:
        target = output_dir.resolve()  # a link to a pack elsewhere stays a link
        target.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{shortened(output_dir)} cannot be written ({reason}); give the pack another folder."
        ) from error
    if target.exists() and not target.is_dir():
        raise UserError(f"{output_dir} is a file; give the pack a folder of its own.")
    if target.exists() and any(target.iterdir()) and not _splits_in(target):
        raise UserError(f"{output_dir} holds files but no pack, and is not overwritten; give the pack another folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{output_dir} cannot be written ({error.strerror}); give the pack another folder.") from error
    new, old = workspace / "new", workspace / "old"
    try:
        new.mkdir()  # one level down, since mkdtemp's own folder is closed to other users
        yield new
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def open_pack(data_path: Path | str, split: str) -> Pack:
    """Check `<data_path>/<split>` and map it into memory.

    Args:
        data_path: a folder, or the URL of a published pack, of which a copy is fetched.

    Raises:
        UserError: a file is missing, torn or at odds with the others; names the file, the value and the way out.
    """
    path = local_pack(data_path)
    folder = path / split
    # os.path, for pathlib raises errors about names that are too long or hold a NUL.
    if os.path.isfile(path):
        raise UserError(f"{path} is a file, not the folder of a data pack; correct data_path.")
    if not os.path.isdir(path):
        raise UserError(f"Data pack {shortened(path)} does not exist; build it, or correct data_path.")
    if not (folder / "dataset.json").is_file():
        found = ", ".join(_splits_in(path)) or "none"
        raise UserError(
            f"{folder / 'dataset.json'} is missing (complete splits there: {found}); "
            "build the pack again, or correct data_path."
        )
    metadata = _read_metadata(folder / "dataset.json")
    mapped = {name: _map_set(folder, name) for name in metadata.sets}
    for name, data in mapped.items():
        _check_set(folder, name, data, metadata)
    pack = Pack(path, split, metadata, {name: _in_memory(data) for name, data in mapped.items()})
    _check_totals(folder / "dataset.json", pack)
    return pack


def _splits_in(path: Path) -> list[str]:
    return [split for split in SPLITS if (path / split / "dataset.json").is_file()]


def _counts(folder: Path, split: str) -> dict[str, int]:
    pack = _map_pack(folder, split, _read_metadata(folder / split / "dataset.json"))
    return {
        "groups": pack.metadata.total_groups,
        "puzzles": sum(len(data.puzzle_identifiers) for data in pack.sets.values()),
        "examples": sum(len(data.inputs) for data in pack.sets.values()),
    }


def _array_file(folder: Path, set_name: str, array: str) -> Path:
    return folder / f"{set_name}__{array}.npy"


def _write_json(file: Path, value: object) -> None:
    # Builders' arguments hold paths, which JSON writes as strings.
    file.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def _broken(file: Path, problem: str) -> UserError:
    return UserError(f"{file} {problem}; build or download the pack again.")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name_list(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) for name in value)
        and 0 < len(value) == len(set(value))  # strings by now, so hashable
    )


# What JSON must hold for a field of PackMetadata, by the field's type.
_JSON_KINDS: dict[object, tuple[str, Callable[[object], bool]]] = {
    int: ("an integer", _is_integer),
    int | None: ("an integer or null", lambda value: value is None or _is_integer(value)),
    float: (
        "a number",
        lambda value: isinstance(value, float) or (_is_integer(value) and abs(value) < 2**63),
    ),
    tuple[str, ...]: ("a list of at least one set name, none of them twice", _is_name_list),
}


def _read_object(file: Path, wanted: str) -> dict[str, Any]:
    try:
        content = parse_json(read_text(file, _MOST_METADATA_BYTES))
    except (OSError, ValueError) as error:
        raise _broken(file, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _broken(file, f"holds a {type(content).__name__} where {wanted} belongs")
    return content


def _read_metadata(file: Path) -> PackMetadata:
    content = _read_object(file, "an object of metadata fields")
    for field in fields(PackMetadata):
        if field.name not in content:
            raise _broken(file, f"lacks the field {field.name}")
        wanted, accepts = _JSON_KINDS[field.type]
        if not accepts(content[field.name]):
            raise _broken(file, f"has {field.name} {shortened(repr(content[field.name]))}, which is not {wanted}")
    values = {field.name: content[field.name] for field in fields(PackMetadata)}
    metadata = PackMetadata(**(values | {"sets": tuple(values["sets"])}))

    if metadata.seq_len < 1:
        raise _broken(file, f"has seq_len {metadata.seq_len}, which is not positive")
    for name in ("vocab_size", "num_puzzle_identifiers"):
        if values[name] > np.iinfo(np.int32).max:
            raise _broken(file, f"has {name} {values[name]}, more than tokens and identifiers of 32 bits can count")
    for name in metadata.sets:
        if "/" in name or "\\" in name:
            raise _broken(file, f"has the set {shortened(repr(name))}, which is not the name of a file")
    for name, limit_name in (("pad_id", "vocab_size"), ("blank_identifier_id", "num_puzzle_identifiers")):
        value, limit = values[name], values[limit_name]
        if not 0 <= value < limit:
            raise _broken(file, f"has {name} {value}, outside 0 to {limit - 1} ({limit_name} {limit})")
    return metadata


def _map_pack(path: Path, split: str, metadata: PackMetadata) -> Pack:
    sets = {name: _in_memory(_map_set(path / split, name)) for name in metadata.sets}
    return Pack(path, split, metadata, sets)


def _map_set(folder: Path, name: str) -> PackSet:
    return PackSet(**{field.name: _map_array(_array_file(folder, name, field.name)) for field in fields(PackSet)})


def _map_array(file: Path) -> IntArray:
    try:
        return read_array(file, "iu", "integers")
    except FileNotFoundError as error:
        raise _broken(file, "is missing") from error
    except (ValueError, OSError) as error:
        raise _broken(file, f"is torn or is not a plain .npy file ({error})") from error


def _in_memory(data: PackSet) -> PackSet:
    """With offsets and identifiers, which are few beside the tokens, as int64: they add and subtract without wrapping
    around."""
    small = ("puzzle_identifiers", "puzzle_indices", "group_indices")
    return replace(data, **{name: np.array(getattr(data, name), np.int64) for name in small})


def _check_set(folder: Path, name: str, data: PackSet, metadata: PackMetadata) -> None:
    files = {field.name: _array_file(folder, name, field.name) for field in fields(PackSet)}
    for array, file in files.items():
        shape, ndim = getattr(data, array).shape, 2 if array in ("inputs", "labels") else 1
        if len(shape) != ndim:
            raise _broken(file, f"has shape {shape}, not {ndim} dimension{'s' * (ndim > 1)}")
    if data.inputs.shape != data.labels.shape:
        raise _broken(files["labels"], f"has shape {data.labels.shape}, but the inputs have {data.inputs.shape}")
    examples, width = data.inputs.shape
    if width != metadata.seq_len:
        raise _broken(files["inputs"], f"has rows of {width} tokens, but dataset.json has seq_len {metadata.seq_len}")

    puzzles = len(data.puzzle_identifiers)
    _check_offsets(files["puzzle_indices"], data.puzzle_indices, "puzzle", examples, "examples")
    if len(data.puzzle_indices) != puzzles + 1:
        raise _broken(
            files["puzzle_indices"],
            f"has {len(data.puzzle_indices)} offsets, but {puzzles} puzzle identifiers need {puzzles + 1}",
        )
    _check_offsets(files["group_indices"], data.group_indices, "group", puzzles, "puzzles")

    identifiers = metadata.num_puzzle_identifiers
    _check_values(files["puzzle_identifiers"], data.puzzle_identifiers, "num_puzzle_identifiers", identifiers, None)
    _check_values(files["inputs"], data.inputs, "vocab_size", metadata.vocab_size, None)
    _check_values(files["labels"], data.labels, "vocab_size", metadata.vocab_size, metadata.ignore_label_id)


def _check_offsets(file: Path, offsets: IntArray, owner: str, end: int, parts: str) -> None:
    """Offsets cut `end` parts into owners: from 0 to `end`, with at least one part for each owner."""
    if len(offsets) < 2:
        raise _broken(file, f"has {len(offsets)} offset{'s' * (len(offsets) != 1)}, too few for a single {owner}")
    if offsets[0] != 0:
        raise _broken(file, f"starts at {offsets[0]}, not at 0")
    for start in range(0, len(offsets) - 1, _SCAN_ELEMENTS):
        part = offsets[start : start + _SCAN_ELEMENTS + 1].astype(np.int64)
        steps = np.diff(part)
        if steps.min() < 1:
            at = int(np.argmax(steps < 1))
            problem = "leaves {} empty" if steps[at] == 0 else "runs backwards at {}"
            problem = problem.format(f"{owner} {start + at}")
            raise _broken(file, f"{problem} (from {part[at]} to {part[at + 1]})")
    if offsets[-1] != end:
        raise _broken(file, f"ends at {offsets[-1]}, but there are {end} {parts}")


def _check_values(file: Path, array: IntArray, limit_name: str, limit: int, also: int | None) -> None:
    """All values are at least 0 and below `limit`, or equal to `also`."""
    rows = max(1, _SCAN_ELEMENTS // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        chunk = array[start : start + rows]
        if chunk.min() >= 0 and chunk.max() < limit:
            continue
        bad = (chunk < 0) | (chunk >= limit)
        if also is not None:
            bad &= chunk != also
        if bad.any():
            at = np.unravel_index(np.argmax(bad), bad.shape)
            row = f"row {start + at[0]}"
            place = row if array.ndim == 1 else f"{row}, column {at[1]}"
            but = "" if also is None else f" and not ignore_label_id {also}"
            raise _broken(file, f"holds {chunk[at]} at {place}, outside 0 to {limit - 1} ({limit_name} {limit}){but}")


def _check_totals(file: Path, pack: Pack) -> None:
    metadata, sets = pack.metadata, pack.sets.values()
    groups = sum(len(data.group_indices) - 1 for data in sets)
    if metadata.total_groups != groups:
        raise _broken(file, f"has total_groups {metadata.total_groups}, but the sets hold {groups} groups")
    mean = sum(len(data.inputs) for data in sets) / sum(len(data.puzzle_identifiers) for data in sets)
    # Some builders round it. It only sets the number of steps.
    if not abs(metadata.mean_puzzle_examples - mean) <= 0.01 * mean:  # so written, NaN fails too
        raise _broken(
            file,
            f"has mean_puzzle_examples {metadata.mean_puzzle_examples}, "
            f"but the sets hold {mean:.6g} examples for each puzzle",
        )
