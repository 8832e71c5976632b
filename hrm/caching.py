"""The user's cache folder, and hashes of large files that are kept in it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from hrm.reading import sha256_of

_KEPT_FROM_BYTES = 1 << 26  # smaller files are hashed faster than keeping their hashes is worth


def cache_folder() -> Path:
    """The folder `$HRM_CACHE`, or else `hrm` in `$XDG_CACHE_HOME`, which is `~/.cache` where it is not set."""
    if own := os.environ.get("HRM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hrm"


def kept_sha256(file: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal, which is read only once if it has 64 MiB or more.

    It is kept by path, size, times and inode, in the cache folder: nothing is written beside the file.

    Raises:
        OSError: the file cannot be read, or is almost all holes.
    """
    about = file.stat()
    if about.st_size < _KEPT_FROM_BYTES:
        return sha256_of(file)
    key = _key(file, about)
    try:
        had = json.loads(_kept_in(key).read_text(encoding="utf-8"))
        if had["key"] == key and len(bytes.fromhex(had["sha256"])) == 32:
            return str(had["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = sha256_of(file)
    keep_sha256(file, digest)
    return digest


def keep_sha256(file: Path, digest: str) -> None:
    """Keep the hash of a file that is as large as `kept_sha256` asks for, and is known."""
    about = file.stat()
    if about.st_size < _KEPT_FROM_BYTES:
        return
    key = _key(file, about)
    target = _kept_in(key)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as temporary:
            json.dump({"key": key, "sha256": digest}, temporary)
        Path(temporary.name).replace(target)
    except OSError:  # then it is hashed again next time
        pass


def _key(file: Path, about: os.stat_result) -> list[Any]:
    # The time of a change of the inode cannot be set, so that no copy with its times kept passes for the former file.
    return [str(file.resolve()), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _kept_in(key: list[Any]) -> Path:
    return cache_folder() / "pack-hashes" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
