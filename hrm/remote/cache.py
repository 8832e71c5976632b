"""Copies of remote folders in the user's cache: fetched once, checked by their hashes at every use, never half.

    <cache>/<kind>/<hash of the URL>/
        .lock              held by the one process that looks or fetches
        latest.json        `Record` of what was there when it was last looked at
        <content>.json     `Record` of each folder
        <content>/<name>/  the files; `content` is a hash of what was behind the URL
        <content>.partial  files of a fetch that is not through

A folder gets its name when all of its files are there and are what they should be. A changed remote becomes another
folder, so that what a process reads stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from hrm.caching import cache_folder, keep_sha256, kept_sha256
from hrm.errors import UserError, printable
from hrm.output import bar_interval
from hrm.reading import read_json
from hrm.remote.urls import Remote, UnreachableError

MOST_GB = "HRM_MAX_DOWNLOAD_GB"
_DEFAULT_MOST_GB = 50.0
_MOST_RECORD_BYTES = 1 << 26
_LATEST = "latest"
_WITH_A_BAR_FROM = 1 << 26  # bytes


@dataclass(frozen=True)
class FileHash:
    """Of a file: its size, and its SHA-256 in hexadecimal where it is known."""

    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Found:
    """What lies behind a URL: a folder to be fetched as it is."""

    folder: Remote
    name: str  # of the folder, as it is called here
    content: str  # a hash that changes with the content
    files: Mapping[str, FileHash]  # by names below the folder, which are safe to be names here
    listed_in: str  # what says so, for errors
    remedy: str  # where a file is not what that says, for errors


@dataclass(frozen=True)
class Record:
    """What was fetched."""

    url: str
    name: str  # of the folder here
    content: str  # and of the one above it
    looked: str  # when it was there, in local time
    files: dict[str, FileHash]

    @classmethod
    def read(cls, file: Path) -> Record | None:
        """None where there is none, or it cannot be read."""
        try:
            fields = read_json(file, _MOST_RECORD_BYTES)
            files = {name: FileHash(int(about["bytes"]), about["sha256"]) for name, about in fields["files"].items()}
            return cls(fields["url"], fields["name"], fields["content"], fields["looked"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, file: Path) -> None:
        temporary = file.with_name(f"{file.name}.new")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)


def fetched(url: str, kind: str, look: Callable[[], Found]) -> Path:
    """A folder here with what lies behind a URL, as it is now.

    Processes that ask for one URL wait for one another, so that one of them fetches. Where nothing can be reached, the
    last copy is taken, with a warning.

    Args:
        kind: of what lies there, the folder in the cache.
        look: says what lies there.

    Raises:
        UserError: it cannot be had, is too large, or is not what it says to be.
    """
    url = url.rstrip("/")
    home = cache_folder() / kind / _short_hash(url)
    with _locked(home):
        try:
            found = look()
        except UnreachableError as error:
            if (record := Record.read(home / f"{_LATEST}.json")) is None:
                raise
            _warn(f"{error} The copy in the cache is used, of {record.looked}.")
            return _checked_copy(home, record, None)
        content, name = _short_hash(found.content), found.name
        record = Record.read(home / f"{content}.json")
        if record is not None and (home / content / record.name).is_dir():
            record = replace(record, looked=_now())
            folder = _checked_copy(home, record, found)
        else:
            record = Record(url, name, content, _now(), {})
            folder = home / content / name
            record.files.update(_fetch_all(found, home / f"{content}.partial", home))
            with _writing(home):
                if (home / content).exists():  # of a fetch that ended before its record was written
                    shutil.rmtree(home / content)
                (home / f"{content}.partial").rename(home / content)
                record.write(home / f"{content}.json")
            for file, about in record.files.items():
                if about.sha256 is not None:
                    keep_sha256(folder / file, about.sha256)
        with _writing(home):
            record.write(home / f"{_LATEST}.json")
        return folder


def _checked_copy(home: Path, record: Record, found: Found | None) -> Path:
    """A folder in the cache whose files are what was fetched, those that are not fetched anew."""
    folder = home / record.content / record.name
    damaged = [name for name, about in record.files.items() if not _is_whole(folder / name, about)]
    if damaged and found is None:
        raise UserError(
            f"{folder / damaged[0]} is not what was fetched, and {record.url} cannot be reached to fetch it anew: try "
            "again when it can be."
        )
    for name in damaged:
        assert found is not None
        _warn(f"{folder / name} is not what was fetched: it is fetched anew.")
        _fetch(found, name, record.files[name], folder / name)
    return folder


def _fetch_all(found: Found, partial: Path, home: Path) -> dict[str, FileHash]:
    """Fetch all files that are not there from an earlier attempt."""
    total = sum(about.bytes for about in found.files.values())
    if total > (most := most_bytes()):
        raise UserError(
            f"{found.folder} holds {total / 1e9:,.1f} GB, more than the {most / 1e9:,.1f} GB that may be fetched: set "
            f"{MOST_GB} in the environment."
        )
    for other in home.glob("*.partial"):  # of content that is there no more
        if other != partial:
            shutil.rmtree(other, ignore_errors=True)
    with _writing(home):
        (partial / found.name).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial).free + sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if total > free:
        raise UserError(
            f"{found.folder} holds {total / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free in {home}: set HRM_CACHE "
            "in the environment to a folder on a larger disk."
        )
    results = {}
    with tqdm(
        desc=found.name,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=bar_interval(),
        disable=total < _WITH_A_BAR_FROM,
    ) as bar:
        for file, about in found.files.items():
            target = partial / found.name / file
            if about.sha256 is not None and _is_whole(target, about):
                results[file] = about
                bar.update(about.bytes)
            else:
                results[file] = _fetch(found, file, about, target, bar.update)
    return results


def _fetch(
    found: Found, name: str, expected: FileHash, target: Path, came: Callable[[int], object] = lambda _: None
) -> FileHash:
    """Fetch a file, twice if what came first is not what it should be.

    Args:
        came: is told how many bytes came.

    Raises:
        UserError: nor is what came then.
    """
    for _ in range(2):
        got = _download(found.folder.chunks(name), expected.bytes, target, came)
        if got is not None and expected.sha256 in (None, got.sha256):
            with _writing(target.parent):
                _temporary(target).replace(target)
            return got
        _temporary(target).unlink(missing_ok=True)
    raise UserError(
        f"{found.folder.url_of(name)} is not what {found.listed_in} says (another size, or another SHA-256): it is "
        f"torn or was changed, and is not used; {found.remedy}."
    )


def _download(chunks: Iterator[bytes], expected: int, target: Path, came: Callable[[int], object]) -> FileHash | None:
    """Write what comes beside a file; None where it is larger or smaller than expected."""
    digest, count = hashlib.sha256(), 0
    with _writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        stream = _temporary(target).open("wb")
    with stream:
        for chunk in chunks:
            count += len(chunk)
            if count > expected:
                return None
            digest.update(chunk)
            with _writing(target.parent):
                stream.write(chunk)
            came(len(chunk))
    return FileHash(count, digest.hexdigest()) if count == expected else None


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _is_whole(file: Path, about: FileHash) -> bool:
    try:
        found = os.lstat(file)
        return stat.S_ISREG(found.st_mode) and found.st_size == about.bytes and kept_sha256(file) == about.sha256
    except OSError:
        return False


def most_bytes() -> int:
    """How much may be fetched for one URL.

    Raises:
        UserError: the environment says something that is no number.
    """
    text = os.environ.get(MOST_GB) or str(_DEFAULT_MOST_GB)
    try:
        if (most := float(text)) > 0:
            return int(min(most, 1e9) * 1e9)
    except ValueError:
        pass
    raise UserError(f"{MOST_GB}={text} in the environment is no number of gigabytes above 0: correct it.")


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """A context that one process is in at a time, for one URL."""
    with _writing(home):
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print("Another process fetches the same: waiting for it.", file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter of file systems without locks
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the cache {folder} cannot be written ({reason}): set HRM_CACHE in the environment to another folder."
        ) from error


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
