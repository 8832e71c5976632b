"""Checkpoints behind URLs: a folder, or a file with those that belong to it, copied into the cache."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from hrm.errors import UserError
from hrm.remote.cache import FileHash, Found, fetched
from hrm.remote.urls import Remote, UnreachableError, last_part, mark_of

_SAFE_NAME = re.compile(r"[^\W_][\w .@+=-]*")


def local_files(url: str, beside: Sequence[str], pick: Callable[[Collection[str]], Collection[str]]) -> Path:
    """A copy of a file behind a URL with the files beside it, or of some files of a folder there.

    They are fetched again when they change there, as far as sizes, times and entity tags tell.

    Args:
        beside: names of files that are fetched with a file, where they are there.
        pick: which of a folder's files are fetched, by their names.

    Returns:
        The file, or the folder.

    Raises:
        UserError: nothing is there, or it cannot be had.
    """
    folder = fetched(url, "checkpoints", lambda: _look(Remote(url), beside, pick))
    file = folder / last_part(url)
    return file if file.is_file() else folder


def _look(remote: Remote, beside: Sequence[str], pick: Callable[[Collection[str]], Collection[str]]) -> Found:
    if remote.is_folder():
        folder, entries = remote, remote.list()
        names = [name for name, entry in entries.items() if entry["type"] == "file" and _SAFE_NAME.fullmatch(name)]
        chosen = {name: entries[name] for name in pick(names)}
    else:
        folder, name = remote.parent(), last_part(remote.url)
        found = {name: folder.entry(name), **{other: _entry_if_readable(folder, other) for other in beside}}
        chosen = {name: entry for name, entry in found.items() if entry is not None}
    if not chosen:
        raise UserError(f"{remote} holds no file of a checkpoint: correct the URL.")
    files = {name: FileHash(_size(folder.url_of(name), entry), None) for name, entry in sorted(chosen.items())}
    # Without a mark, nothing tells whether it changed: then it is fetched each time.
    marks = "".join(f"{name} {mark_of(chosen[name]) or uuid.uuid4()}\n" for name in files)
    content = hashlib.sha256(marks.encode()).hexdigest()
    return Found(
        folder, last_part(folder.url), content, files, f"the list of {folder}", "try again, or put it there anew"
    )


def _entry_if_readable(folder: Remote, name: str) -> dict[str, Any] | None:
    try:
        return folder.entry(name)
    except UnreachableError:
        raise
    except UserError:  # S3 tells of a file that is not there only those who may list what is
        return None


def _size(url: str, entry: dict[str, Any]) -> int:
    if type(size := entry.get("size")) is not int:
        raise UserError(f"{url} is not fetched, as its server does not say how large it is.")
    return size
