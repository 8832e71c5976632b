"""Packs behind URLs: copies are whole, checked, and made once; what a stranger's manifest asks for is refused."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from hrm.data.pack import open_pack
from hrm.data.published import Manifest, local_pack
from hrm.data.publishing import About, publish
from hrm.errors import UserError
from hrm.remote.cache import MOST_GB
from hrm.remote.urls import Remote, UnreachableError, is_url, last_part, parts_of_url
from tests.helpers.entry_points import make_pack


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "pack"
    make_pack(folder)
    return folder


@pytest.fixture
def pack(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "pack")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """The folder behind `url`."""
    return tmp_path / "team" / "boards"


@pytest.fixture
def url(team: Path, pack: Path) -> str:
    """Where `pack` is published."""
    publish(pack, f"file://{team}", About())
    return f"file://{team}"


@pytest.fixture
def fetched_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the arrays that are fetched from now on."""
    names: list[str] = []
    chunks = Remote.chunks

    def noted(self: Remote, name: str) -> Iterator[bytes]:
        if name.endswith(".npy"):
            names.append(name)
        return chunks(self, name)

    monkeypatch.setattr(Remote, "chunks", noted)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flip(file: Path) -> None:
    """Change the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def no_network(self: Remote, *_: Any) -> Any:
    raise UnreachableError(f"{self} cannot be read (no network): try again.")


# ---- copies


def test_a_copy_is_made_once(pack: Path, url: str, cache: Path, fetched_files: list[str]) -> None:
    copy = local_pack(url)
    assert contents(copy) == contents(pack)
    assert copy.name == "boards"
    assert cache in copy.parents
    assert len(fetched_files) == 10
    assert local_pack(url) == copy
    opened = open_pack(url, "test")
    assert opened.path == copy
    assert (opened.sets["all"].inputs == open_pack(pack, "test").sets["all"].inputs).all()
    assert len(fetched_files) == 10


def test_a_version_has_a_url_of_its_own(pack: Path, url: str) -> None:
    first = contents(local_pack(f"{url}/1"))
    flip(pack / "train/all__inputs.npy")
    publish(pack, url, About(version="2"))
    assert contents(local_pack(url)) == contents(pack)
    assert contents(local_pack(f"{url}/1")) == first != contents(pack)


def test_what_is_published_anew_leaves_earlier_copies_alone(pack: Path, url: str) -> None:
    copy = local_pack(url)
    before = contents(copy)
    flip(pack / "train/all__inputs.npy")
    publish(pack, url, About(), overwrite=True)
    assert contents(local_pack(url)) == contents(pack)
    assert contents(copy) == before


def test_a_damaged_copy_is_fetched_anew(
    pack: Path, url: str, fetched_files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    copy = local_pack(url)
    flip(copy / "train/all__labels.npy")
    (copy / "test/all__labels.npy").unlink()
    os.symlink(pack / "test/all__labels.npy", copy / "test/all__labels.npy")
    fetched_files.clear()
    assert contents(local_pack(url)) == contents(pack)
    assert sorted(fetched_files) == ["test/all__labels.npy", "train/all__labels.npy"]
    assert not (copy / "test/all__labels.npy").is_symlink()
    assert "train/all__labels.npy is not what was fetched: it is fetched anew." in capsys.readouterr().err


@pytest.mark.parametrize("change", [flip, lambda file: file.write_bytes(b""), lambda file: file.open("ab").write(b"x")])
def test_what_was_changed_there_is_refused(
    change: Callable[[Path], Any], url: str, team: Path, cache: Path, fetched_files: list[str]
) -> None:
    change(team / "1/train/all__labels.npy")
    with pytest.raises(UserError, match=r"1/train/all__labels\.npy is not what .*manifest\.json says"):
        local_pack(url)
    assert fetched_files.count("train/all__labels.npy") == 2
    assert not list(cache.glob("packs/*/*/boards/train/all__labels.npy"))
    assert not (cache / "packs" / "latest.json").exists()


def test_what_broke_off_goes_on(
    pack: Path, url: str, cache: Path, fetched_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        chunks = Remote.chunks

        def torn(self: Remote, name: str) -> Iterator[bytes]:
            if name != "train/all__inputs.npy":
                yield from chunks(self, name)
                return
            yield next(chunks(self, name))[:10]
            raise UnreachableError("the cable was pulled.")

        patch.setattr(Remote, "chunks", torn)
        with pytest.raises(UnreachableError, match="cable"):
            local_pack(url)
    (home,) = (cache / "packs").iterdir()
    assert {path.suffix for path in home.iterdir()} == {".partial", ""}  # no folder that passes for a copy, but .lock
    before = list(fetched_files)
    assert contents(local_pack(url)) == contents(pack)
    assert set(fetched_files[len(before) :]) & set(before) == {"train/all__inputs.npy"}  # the torn one
    assert not list(home.glob("*.partial"))


def _slow_fetch(url: str, log: Path, seconds: float) -> None:
    """In another process: fetch, noting what and when."""
    chunks = Remote.chunks

    def slow(self: Remote, name: str) -> Iterator[bytes]:
        if name.endswith(".npy"):
            with log.open("a") as file:
                file.write(f"{name}\n")
            time.sleep(seconds)
        return chunks(self, name)

    Remote.chunks = slow  # type: ignore[method-assign]
    assert (local_pack(url) / "train/all__labels.npy").is_file()


@pytest.mark.multiprocess
def test_of_several_processes_one_fetches(pack: Path, url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slow_fetch, args=(url, tmp_path / "log", 0.02)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    names = (tmp_path / "log").read_text().split()
    assert len(names) == len(set(names)) == 10
    assert contents(local_pack(url)) == contents(pack)


@pytest.mark.multiprocess
def test_a_process_that_is_killed_leaves_no_half_copy(
    pack: Path, url: str, cache: Path, tmp_path: Path, fetched_files: list[str]
) -> None:
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_slow_fetch, args=(url, log, 0.2))
    process.start()
    while not log.exists() or len(log.read_text().split()) < 3:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not list(cache.glob("packs/*/*.json"))
    assert contents(local_pack(url)) == contents(pack)
    assert 0 < len(fetched_files) <= 8  # the files that were there are not fetched again


# ---- without network, and too large


def test_without_network_the_copy_serves(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = local_pack(url)
    monkeypatch.setattr(Remote, "read", no_network)
    assert local_pack(url) == copy
    err = capsys.readouterr().err
    assert "(no network)" in err
    assert "The copy in the cache is used" in err
    flip(copy / "train/all__labels.npy")
    with pytest.raises(
        UserError, match=r"all__labels\.npy is not what was fetched, and .* cannot be reached to fetch it anew"
    ):
        local_pack(url)


def test_without_network_and_copy_there_is_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Remote, "read", no_network)
    with pytest.raises(UnreachableError, match="no network"):
        local_pack(url)


def test_a_pack_that_is_gone_is_not_taken_from_the_cache(url: str, team: Path) -> None:
    local_pack(url)
    shutil.rmtree(team)
    with pytest.raises(UserError, match="boards does not exist"):
        local_pack(url)


def test_size_is_bounded(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch, fetched_files: list[str]) -> None:
    monkeypatch.setenv(MOST_GB, "1e-6")
    with pytest.raises(UserError, match=r"more than the 0\.0 GB that may be fetched: set HRM_MAX_DOWNLOAD_GB"):
        local_pack(url)
    assert not fetched_files
    monkeypatch.setenv(MOST_GB, "much")
    with pytest.raises(UserError, match="HRM_MAX_DOWNLOAD_GB=much"):
        local_pack(url)


def test_a_cache_that_cannot_be_written_is_told(url: str, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*: set HRM_CACHE"):
        local_pack(url)


# ---- manifests of strangers


def rewritten(team: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest behind a URL, as whoever may write there can."""
    file = team / "manifest.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "name",
    [
        "../../escaped.json",
        "train/../../escaped.json",
        "/tmp/escaped.json",
        "train//escaped.json",
        "other/escaped.json",
        "train\\..\\escaped.json",
        ".hidden.json",
        "train/.npy",
        "train/escaped.py",
        "train/escaped.npy\n",
        "C:escaped.json",
        "",
    ],
)
def test_names_that_leave_the_pack_are_refused(name: str, url: str, team: Path, cache: Path, tmp_path: Path) -> None:
    content = b'{"a": 1}'
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "team" / "escaped.json").write_bytes(content)
    rewritten(team, lambda fields: fields["files"].update({name: entry}))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is not the name of a file of a pack"):
        local_pack(url)
    assert {path for path in set(tmp_path.rglob("*")) - before if cache not in (path, *path.parents)} == set()
    assert not list(cache.rglob("*.npy"))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("folder", "../..", "folder"),
        ("folder", "/tmp", "folder"),
        ("version", "..", "version"),
        ("version", 3, "version"),
        ("format", 2, "format 1"),
        ("files", {}, "no files"),
        ("files", {"train/a.npy": {"bytes": -1, "sha256": "0" * 64}}, "no size"),
        ("files", {"train/a.npy": {"bytes": 10**30, "sha256": "0" * 64}}, "no size"),
        ("files", {"train/a.npy": {"bytes": 1, "sha256": "../" * 20}}, "no SHA-256"),
        ("files", {f"{name}.npy": {"bytes": 1, "sha256": "0" * 64} for name in ("a", "A")}, "capitals"),
        ("provenance", [], "provenance"),
        ("licence", "x" * 10_000, "licence"),
    ],
)
def test_odd_manifests_are_refused(field: str, value: Any, problem: str, url: str, team: Path) -> None:
    rewritten(team, lambda fields: fields.update({field: value}))
    with pytest.raises(UserError, match=rf"manifest\.json is no manifest that this version reads .*{problem}"):
        local_pack(url)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 5000, b"null"])
def test_what_is_no_manifest_is_refused(content: bytes, url: str, team: Path) -> None:
    (team / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="is no manifest"):
        local_pack(url)


def test_an_endless_manifest_is_not_read(url: str, team: Path) -> None:
    with (team / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="more than the 16,777,216 bytes"):
        local_pack(url)


def test_sets_are_names_of_files(pack: Path, built: Path) -> None:
    """Else a fetched dataset.json could name arrays elsewhere on this machine."""
    file = pack / "test/dataset.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"sets": [f"../../../{built.parent.name}/pack/test/all"]})
    )
    with pytest.raises(UserError, match="is not the name of a file"):
        open_pack(pack, "test")


def test_a_folder_that_was_not_published(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no published pack .* by `hrm data publish PACK file://"):
        local_pack(f"file://{pack}")
    with pytest.raises(UserError, match="nothing does not exist"):
        local_pack(f"file://{tmp_path}/nothing")


def test_manifests_come_back(url: str, team: Path) -> None:
    manifest = Manifest.from_json((team / "manifest.json").read_bytes(), url)
    assert Manifest.from_json(manifest.to_json(), url) == manifest
    lines = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in sorted(contents(team / "1").items())
        if name != "manifest.json"
    )
    assert manifest.sha256 == hashlib.sha256(lines.encode()).hexdigest()


# ---- URLs


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://a", "hf://datasets/a/b", "FILE:///a", "abfs+x://a")))
    assert not any(map(is_url, ("data/pack", "C://pack", "owner/name", "s3:/a", "simplecache::s3://a", Path("s3://a"))))
    assert parts_of_url("s3://bucket/../a//b/") == ["bucket", "a", "b"]
    assert parts_of_url("owner/name") == ["owner", "name"]
    assert last_part("https://host/step_5?x=../y") == "y"
    assert last_part("s3://bucket/..") == "bucket"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("bogus://a/b", "fsspec knows no protocol bogus://"),
        ("zip://pack::https://host/pack.zip", "a URL with :: in it is not taken"),
        ("ftp://me:secret@host/pack", "the URL of host holds a password"),
        ("gs://bucket/pack", "needs the package gcsfs: pip install gcsfs"),
        ("s3://bucket/pack", r"needs s3fs: pip install 'hrm-torch\[s3\]'"),
    ],
)
def test_urls_of_no_use(url: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        monkeypatch.delitem(_registry, protocol, raising=False)
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=sentence) as told:
        local_pack(url)
    assert "secret" not in str(told.value)


def test_the_hub_is_reached_through_fsspec(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is played by a folder: no network is needed."""

    class Hub(LocalFileSystem):  # type: ignore[misc]
        protocol = ("hf",)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(tmp_path / "hub" / path.removeprefix("hf://")) if path.startswith("hf://") else path

    monkeypatch.setitem(_registry, "hf", Hub)
    (tmp_path / "hub/datasets/me/boards/1/train").mkdir(parents=True)
    (tmp_path / "hub/datasets/me/boards/1/test").mkdir()  # the hub has no folders to be made
    publish(pack, "hf://datasets/me/boards", About())
    assert contents(local_pack("hf://datasets/me/boards")) == contents(pack)


def test_arrays_of_a_copy_are_mapped(url: str) -> None:
    inputs = open_pack(url, "train").sets["all"].inputs
    assert isinstance(inputs.base, np.memmap)
