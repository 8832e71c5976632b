"""Putting a pack where others fetch it: its files, then a manifest of them, then an entry in a results store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hrm.caching import kept_sha256
from hrm.data.pack import SPLITS, open_pack, read_provenance
from hrm.data.published import MANIFEST_FILE, PACK_FILE, VERSION, Manifest, read_manifest
from hrm.data.registry import read_registry
from hrm.errors import UserError, shortened
from hrm.remote.cache import FileHash
from hrm.remote.urls import Remote, UnreachableError, is_url, last_part
from hrm.results import open_store
from hrm.results.records import PublishedPack
from hrm.version import __version__

if TYPE_CHECKING:
    from hrm.results.store import Store

UNKNOWN = "unknown"


@dataclass(frozen=True)
class About:
    """What is published of a pack beside its content. What is None is looked up, or is unknown."""

    name: str | None = None
    version: str = "1"
    licence: str | None = None
    augmentation: str | None = None


@dataclass(frozen=True)
class Published:
    """What was done."""

    manifest: Manifest
    url: str  # of this version
    uploaded: int  # files; none where all was there
    left_out: list[str]  # files of the folder that are no part of a pack


def publish(pack: Path, url: str, about: About, results: str | None = None, *, overwrite: bool = False) -> Published:
    """Publish a pack at `<url>/<version>`, and at `url` as the newest.

    Args:
        results: URL of a results store in which it is entered.
        overwrite: replace other content of the same version.

    Raises:
        UserError: the pack is broken, another one has this version, or the URL or the store is of no use.
    """
    manifest, left_out = manifest_of(pack, about)
    if not is_url(url):
        raise UserError(
            f"{shortened(url)} is no URL to publish at: give one such as s3://bucket/packs/{manifest.name}."
        )
    remote = Remote(url)
    below = Remote(remote.url_of(manifest.version))
    with closing(open_store(results)) if results is not None else nullcontext() as store:
        before, newest = (_read_manifest(place, overwrite) for place in (below, remote))
        if not overwrite:
            _check_free(manifest, below, before, store)
        is_there = before is not None and before.sha256 == manifest.sha256
        if before is not None and is_there:
            manifest = replace(manifest, published=before.published)
        elif newest is not None and newest.version == manifest.version:
            remote.remove(MANIFEST_FILE)  # nobody is to fetch what is about to change
        uploaded = _upload(pack, manifest, below, before, all_of_it=overwrite)
        if not is_there or newest is None or newest.version == manifest.version:
            remote.write(MANIFEST_FILE, replace(manifest, folder=manifest.version).to_json())
        if store is not None:
            store.add_pack(_entry(manifest, str(below)), overwrite=overwrite)
    return Published(manifest, str(below), uploaded, left_out)


def _read_manifest(remote: Remote, overwrite: bool) -> Manifest | None:
    """What is published there; what cannot be read counts as nothing where it may be overwritten."""
    try:
        return read_manifest(remote)
    except UnreachableError:
        raise
    except UserError:
        if not overwrite:
            raise
        return None


def _check_free(manifest: Manifest, below: Remote, before: Manifest | None, store: Store | None) -> None:
    """UserError where the version has other content, at its URL or in the store."""
    entry = store.pack(manifest.name, manifest.version) if store is not None else None
    for had, there in ((before and before.sha256, f"{below} holds"), (entry and entry.hash, f"{store} has")):
        if had and had != manifest.sha256:
            raise UserError(
                f"{there} {manifest.name} {manifest.version} with other content (SHA-256 {had[:12]}, this one "
                f"{manifest.sha256[:12]}): give another version=, or overwrite=true to replace it."
            )


def _upload(pack: Path, manifest: Manifest, below: Remote, before: Manifest | None, *, all_of_it: bool) -> int:
    """Upload what is not there yet, and the manifest last; returns the number of files."""
    names = list(manifest.files)
    if before is not None and before.sha256 == manifest.sha256 and not all_of_it:
        sizes = {name: (below.entry(name) or {}).get("size") for name in names}
        names = [name for name in names if sizes[name] != manifest.files[name].bytes]
    elif before is not None:
        below.remove(MANIFEST_FILE)
        for name in before.files.keys() - manifest.files.keys():
            below.remove(name)
    for name in names:
        below.upload(pack / name, name)
    below.write(MANIFEST_FILE, manifest.to_json())
    return len(names)


def _entry(manifest: Manifest, url: str) -> PublishedPack:
    return PublishedPack(
        manifest.name,
        manifest.version,
        manifest.licence,
        manifest.augmentation,
        manifest.sha256,
        url,
        {**manifest.provenance, "published_by": f"hrm-torch {manifest.hrm_version}"},
        datetime.fromisoformat(manifest.published),
    )


def manifest_of(pack: Path, about: About) -> tuple[Manifest, list[str]]:
    """What is to be published of a pack, and the files of its folder that are not.

    Raises:
        UserError: it is broken, or a name or a version cannot be used.
    """
    splits = [split for split in SPLITS if (pack / split / "dataset.json").is_file()]
    for split in splits or SPLITS[:1]:
        open_pack(pack, split)  # what is broken is not published
    known, provenance = _known(pack), read_provenance(pack)
    texts = {
        "name": about.name or known.get("name") or last_part(str(pack.resolve())),
        "licence": about.licence or known.get("licence") or UNKNOWN,
        "augmentation": about.augmentation or known.get("augmentation") or _augmentation(provenance),
    }
    for option, value in texts.items():
        _check_text(option, value)
    if not VERSION.fullmatch(about.version):
        raise UserError(
            f"version={shortened(about.version)} cannot be a folder: give letters, digits and . _ + - only, such as "
            "1.2."
        )
    files = {file.relative_to(pack).as_posix(): file for file in sorted(pack.rglob("*")) if file.is_file()}
    parts = {name: file for name, file in files.items() if PACK_FILE.fullmatch(name) and name != MANIFEST_FILE}
    try:
        hashes = {name: FileHash(file.stat().st_size, kept_sha256(file)) for name, file in parts.items()}
    except OSError as error:
        raise UserError(f"{pack} cannot be read ({error.strerror or error}).") from error
    manifest = Manifest(
        name=texts["name"],
        version=about.version,
        licence=texts["licence"],
        augmentation=texts["augmentation"],
        published=datetime.now(UTC).isoformat(timespec="seconds"),
        hrm_version=__version__,
        files=hashes,
        provenance=provenance,
    )
    return manifest, sorted(files.keys() - parts.keys() - {MANIFEST_FILE})


def _known(pack: Path) -> Mapping[str, str]:
    """What `config/data/` says of a pack that lies where it names one."""
    found = (entry for entry in read_registry().values() if Path(entry.path).resolve() == pack.resolve())
    return {str(name): str(value) for name, value in next(found, {}).items() if value}


def _augmentation(provenance: Mapping[str, object]) -> str:
    """As far as the builder's options tell."""
    options = provenance.get("arguments")
    number = options.get("num_aug") if isinstance(options, Mapping) else None
    return f"{number} of each puzzle" if type(number) is int else UNKNOWN


def _check_text(option: str, value: str) -> None:
    if not 0 < len(value) <= 250 or not value.isprintable() or re.search(r"^\s|\s$", value):
        raise UserError(f"{option}={shortened(value)} cannot be used: give a line of at most 250 characters.")
