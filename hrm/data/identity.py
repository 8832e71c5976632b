"""What a pack is, beyond its path: hashes of its content, to notice that another one lies at the same path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from hrm.caching import kept_sha256
from hrm.data.pack import Pack, PackSet
from hrm.errors import UserError
from hrm.reading import sha256_of


@dataclass(frozen=True)
class PackIdentity:
    """SHA-256 of a pack's parts, in hexadecimal; empty for a file that it does not have."""

    arrays: str  # of the training and the test split, and their dataset.json
    identifiers: str  # identifiers.json: what the rows of a puzzle table stand for
    provenance: str  # provenance.json: how it was built


def pack_identity(*splits: Pack) -> PackIdentity:
    """Hash a pack. Arrays of 64 MiB and more are read once: their hashes are kept in the user's cache folder, by path,
    size, times and inode, and nothing is ever written to the pack."""
    path = splits[0].path
    files = sorted(file for split in splits for file in _files_of(split))
    with ThreadPoolExecutor(4) as threads:  # hashing leaves Python's lock alone
        hashes = list(threads.map(kept_sha256, files))
    arrays = hashlib.sha256()
    for file, digest in zip(files, hashes, strict=True):
        arrays.update(f"{digest}  {file.relative_to(path).as_posix()}\n".encode())
    return PackIdentity(arrays.hexdigest(), identifiers_hash(path), _hash_if_there(path / "provenance.json"))


def identifiers_hash(path: Path) -> str:
    """The part of a pack's identity that says what its puzzle identifiers mean."""
    return _hash_if_there(path / "identifiers.json")


def _files_of(split: Pack) -> Iterable[Path]:
    folder = split.path / split.split
    yield folder / "dataset.json"
    for name in split.metadata.sets:
        yield from (folder / f"{name}__{field.name}.npy" for field in fields(PackSet))


def _hash_if_there(file: Path) -> str:
    try:
        return sha256_of(file) if file.is_file() else ""
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}); build or download the pack again."
        ) from error
