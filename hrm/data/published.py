"""Packs behind URLs: what is published with them, and getting them here.

    <url>/manifest.json            `Manifest` of the version published last
    <url>/<version>/manifest.json  of each version
    <url>/<version>/...            the files of the pack

A manifest is written when all files that it names are there. Nothing in it is believed: files have plain names below
the pack, sizes that may be fetched, and the hashes that it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hrm.errors import UserError, shortened
from hrm.reading import parse_json
from hrm.remote.cache import FileHash, Found, fetched
from hrm.remote.urls import MissingError, Remote, is_url, last_part

MANIFEST_FILE = "manifest.json"
FORMAT = 1

_MOST_MANIFEST_BYTES = 1 << 24
_MOST_FILES = 10_000
_MOST_TEXT = 1_000  # characters of a field

# What packs consist of. A name starts with a letter or a digit: no "..", no absolute path, nothing hidden.
PACK_FILE = re.compile(r"(?:(?:train|test)/)?[^\W_][\w .@+=-]*\.(?:npy|json)")
VERSION = re.compile(r"(?!manifest\.json$)[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """What is published with a pack."""

    name: str
    version: str
    licence: str
    augmentation: str
    published: str  # when, in UTC
    hrm_version: str  # that published it
    files: dict[str, FileHash]
    provenance: dict[str, Any] = field(default_factory=dict)  # the pack's provenance.json: how it was built
    folder: str = ""  # below the manifest, where the files are
    format: int = FORMAT

    @property
    def sha256(self) -> str:
        """Of the content: the hashes and names of all files, as `sha256sum` prints them, in order of their names."""
        lines = "".join(f"{about.sha256}  {name}\n" for name, about in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(about.bytes for about in self.files.values())

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, url: str) -> Manifest:
        """Read what lies at a URL.

        Raises:
            UserError: it is no manifest, or asks for what it must not.
        """
        try:
            fields = parse_json(content.decode("utf-8"))
            if not isinstance(fields, dict) or fields.get("format") != FORMAT:
                raise ValueError(f"it has not the format {FORMAT} of manifests")
            texts = ("name", "version", "licence", "augmentation", "published", "hrm_version", "folder")
            for name in texts:
                if not isinstance(fields.get(name), str) or len(fields[name]) > _MOST_TEXT:
                    raise ValueError(f"its {name} is no text")
            if not VERSION.fullmatch(fields["version"]):
                raise ValueError(f"its version is {shortened(fields['version'])}")
            if fields["folder"] not in ("", fields["version"]):
                raise ValueError(f"its folder is {shortened(fields['folder'])}")
            if not isinstance(fields.get("provenance"), dict):
                raise ValueError("its provenance is no object")
            files = _read_files(fields.get("files"))
        except ValueError as error:
            raise UserError(
                f"{url} is no manifest that this version reads ({error}), and nothing of it is fetched: publish the "
                "pack again, with overwrite=true."
            ) from error
        return cls(**{name: fields[name] for name in (*texts, "provenance")}, files=files)


def _read_files(listed: object) -> dict[str, FileHash]:
    if not isinstance(listed, Mapping) or not 0 < len(listed) <= _MOST_FILES:
        raise ValueError("it lists no files, or too many")
    files = {}
    for name, about in listed.items():
        if not isinstance(name, str) or not PACK_FILE.fullmatch(name):
            raise ValueError(f"it lists {shortened(str(name))}, which is not the name of a file of a pack")
        size, sha256 = (about.get("bytes"), about.get("sha256")) if isinstance(about, Mapping) else (None, None)
        if type(size) is not int or not 0 <= size < 2**50:
            raise ValueError(f"{name} has no size")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{name} has no SHA-256")
        files[name] = FileHash(size, sha256)
    if len({name.casefold() for name in files}) < len(files):
        raise ValueError("it lists files whose names differ by capitals only")
    return files


def read_manifest(remote: Remote, folder: str = "") -> Manifest | None:
    """The manifest at a URL, or in a folder below it; None where there is none."""
    name = f"{folder}/{MANIFEST_FILE}" if folder else MANIFEST_FILE
    try:
        content = remote.read(name, _MOST_MANIFEST_BYTES)
    except MissingError:
        return None
    return Manifest.from_json(content, remote.url_of(name))


def local_pack(data_path: Path | str) -> Path:
    """Where a pack lies here: its path, or a checked copy of what lies behind its URL.

    Raises:
        UserError: there is no published pack behind the URL, it cannot be had, or it is not what its manifest says.
    """
    if not is_url(data_path):
        return Path(data_path)
    return fetched(str(data_path), "packs", lambda: _look(str(data_path)))


def _look(url: str) -> Found:
    remote = Remote(url)
    if (manifest := read_manifest(remote)) is None:
        remote.list()  # which says it if there is no such bucket, or it may not be read
        raise UserError(
            f"{url} holds no published pack ({MANIFEST_FILE} is missing there): publish it, by `hrm data publish PACK "
            f"{url}`, or correct the URL."
        )
    folder = Remote(remote.url_of(manifest.folder)) if manifest.folder else remote
    remedy = "publish the pack again, with overwrite=true"
    return Found(folder, last_part(url), manifest.sha256, manifest.files, remote.url_of(MANIFEST_FILE), remedy)
