"""`hrm data publish` and `hrm data list`, with a folder behind `file://` and a results store in a file."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hrm.cli import main
from hrm.data.published import local_pack
from hrm.data.registry import read_registry
from hrm.results import open_store
from hrm.version import __version__
from tests.helpers.entry_points import Outcome, make_pack


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "boards"
    make_pack(folder)
    return folder


@pytest.fixture(autouse=True)
def pack(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(built, tmp_path / "boards")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/team"


RESULTS = "results=sqlite:///results.sqlite"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> Outcome:
    capsys.readouterr()
    status = main(["data", *argv])
    return Outcome(status, *capsys.readouterr())


def change(pack: Path) -> None:
    """Make other content of it, which is a pack too."""
    (pack / "provenance.json").write_text(json.dumps({"task": "sudoku", "source": "elsewhere"}))


def test_a_pack_is_entered_and_listed(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    about = ("version=1.10", "licence=CC BY 4.0", "name=four by four", "augmentation=none at all", RESULTS)
    done = run(capsys, "publish", "boards", url, *about)
    assert (done.status, done.err) == (0, "")
    assert f"data_path={url}, or data_path={url}/1.10 for this version only" in done.out
    (entry,) = open_store("sqlite:///results.sqlite").packs()
    assert (entry.name, entry.version, entry.licence, entry.augmentation, entry.place) == (
        *("four by four", "1.10", "CC BY 4.0", "none at all"),
        f"{url}/1.10",
    )
    assert entry.hash in done.out
    assert datetime.now(UTC) - entry.time < timedelta(minutes=5)
    built_by = json.loads((pack / "provenance.json").read_text())
    assert entry.provenance == built_by | {"published_by": f"hrm-torch {__version__}"}
    assert entry.provenance["arguments"]["generate"] == "2x2"
    manifest = json.loads((Path(url.removeprefix("file://")) / "1.10/manifest.json").read_text())
    assert manifest["provenance"] == built_by
    assert manifest["hrm_version"] == __version__

    table = run(capsys, "list", RESULTS).out.splitlines()
    assert table[0].split() == ["name", "version", "licence", "augmentation", "published", "sha256", "url"]
    assert " ".join(table[2].split()[:7]) == "four by four 1.10 CC BY 4.0"
    (listed,) = json.loads(run(capsys, "list", "--results", RESULTS.partition("=")[2], "format=json").out)
    assert listed["place"] == entry.place
    assert listed["provenance"] == entry.provenance
    assert datetime.fromisoformat(listed["time"]) == entry.time


def test_what_nobody_gives(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "publish", str(pack), url)
    assert done.out.startswith("Published boards 1: 14 files, ")
    assert "licence unknown" in done.out
    entry = next(iter(read_registry().values()))
    Path(entry.path).parent.mkdir()
    pack.rename(entry.path)
    done = run(capsys, "publish", entry.path, f"{url}/known", RESULTS)
    assert f"Published {entry.name} 1: " in done.out
    (known,) = open_store("sqlite:///results.sqlite").packs()
    assert (known.licence, known.augmentation) == (entry.licence, entry.augmentation)


def test_twice_is_once(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "publish", "boards", url, RESULTS)
    team = Path(url.removeprefix("file://")) / "1"
    first = {file: file.stat().st_mtime_ns for file in team.rglob("*.npy")}
    again = run(capsys, "publish", "boards", url, RESULTS, "licence=MIT")
    assert again.out.startswith("boards 1 is there already: 14 files, ")
    assert {file: file.stat().st_mtime_ns for file in team.rglob("*.npy")} == first
    (entry,) = open_store("sqlite:///results.sqlite").packs()
    assert entry.licence == "MIT"  # what is told of it may change


def test_what_is_torn_there_is_healed(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "publish", "boards", url)
    team = Path(url.removeprefix("file://")) / "1"
    (team / "train/all__labels.npy").unlink()
    (team / "test/all__labels.npy").write_bytes(b"torn")
    assert run(capsys, "publish", "boards", url).status == 0
    assert (local_pack(url) / "test/all__labels.npy").read_bytes() == (pack / "test/all__labels.npy").read_bytes()


def test_other_content_needs_another_version(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "publish", "boards", url, RESULTS)
    before = (local_pack(url) / "provenance.json").read_text()
    change(pack)
    for there, more in ((f"{url}/1 holds", ""), ("results=sqlite:///results.sqlite has", "/elsewhere")):
        refused = run(capsys, "publish", "boards", url + more, RESULTS)
        assert refused.status == 2
        assert f"{there} boards 1 with other content" in refused.err
        assert "give another version=, or overwrite=true" in refused.err
    assert (local_pack(url) / "provenance.json").read_text() == before
    assert not Path(url.removeprefix("file://"), "elsewhere").exists()
    assert run(capsys, "publish", "boards", url, RESULTS, "version=2").status == 0
    assert [entry.version for entry in open_store("sqlite:///results.sqlite").packs()] == ["1", "2"]
    assert (local_pack(f"{url}/1") / "provenance.json").read_text() == before
    assert (local_pack(url) / "provenance.json").read_text() != before


def test_overwriting(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "publish", "boards", url, RESULTS)
    (pack / "test/all__ratings.npy").unlink(missing_ok=True)
    (pack / "notes.txt").write_text("of mine")
    (pack / "identifiers.json").unlink()
    done = run(capsys, "publish", "boards", url, RESULTS, "overwrite=true")
    assert done.status == 0
    assert "Left out, as no part of a pack: notes.txt." in done.out
    (entry,) = open_store("sqlite:///results.sqlite").packs()
    assert entry.hash in done.out
    team = Path(url.removeprefix("file://"))
    assert not (team / "1/identifiers.json").exists()
    assert not (team / "1/notes.txt").exists()
    assert not (local_pack(url) / "identifiers.json").exists()


def test_an_earlier_version_published_again_does_not_become_the_newest(
    pack: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "publish", "boards", url)
    first = shutil.copytree(pack, "first")
    change(pack)
    run(capsys, "publish", "boards", url, "version=2")
    newest = (pack / "provenance.json").read_text()
    assert run(capsys, "publish", str(first), url, "licence=MIT").status == 0
    assert (local_pack(url) / "provenance.json").read_text() == newest
    assert (local_pack(f"{url}/1") / "provenance.json").read_text() != newest


def test_a_manifest_of_another_make_is_overwritten_on_demand_only(
    pack: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "publish", "boards", url)
    for file in ("manifest.json", "1/manifest.json"):
        Path(url.removeprefix("file://"), file).write_text("{}")
    refused = run(capsys, "publish", "boards", url)
    assert (refused.status, "publish the pack again, with overwrite=true" in refused.err) == (2, True)
    assert run(capsys, "publish", "boards", url, "overwrite=true").status == 0
    assert (local_pack(url) / "provenance.json").read_text() == (pack / "provenance.json").read_text()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["boards", "somewhere"], "somewhere is no URL to publish at: give one such as s3://bucket/packs/boards"),
        (["nothing", "URL"], "nothing does not exist"),
        (["boards", "URL", "version=../up"], "version=../up cannot be a folder"),
        (["boards", "URL", "version=manifest.json"], "version=manifest.json cannot be a folder"),
        (["boards", "URL", "overwrite=perhaps"], "overwrite=perhaps is not a choice"),
        (["boards", "URL", "name=two\nlines"], "name="),
        (["boards", "URL", "results=results.sqlite"], "results=results.sqlite is not a URL"),
        (["boards", "file:///dev/null/x"], "file:///dev/null/x/1"),
    ],
)
def test_mistakes(argv: list[str], sentence: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(capsys, "publish", *(url if argument == "URL" else argument for argument in argv))
    assert done.status == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path(url.removeprefix("file://")).exists()


def test_a_broken_pack_is_not_published(pack: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (pack / "train/all__labels.npy").write_bytes(b"torn")
    done = run(capsys, "publish", "boards", url, RESULTS)
    assert done.status == 2
    assert "all__labels.npy is torn" in done.err
    assert not Path(url.removeprefix("file://")).exists()


def test_lists_without_packs(capsys: pytest.CaptureFixture[str]) -> None:
    empty = run(capsys, "list", RESULTS)
    assert (empty.status, "has no packs" in empty.out) == (0, True)
    assert json.loads(run(capsys, "list", RESULTS, "format=json").out) == []
    known = json.loads(run(capsys, "list", "format=json").out)
    assert [entry["name"] for entry in known] == list(read_registry())
    assert all(entry["built"] == "no" for entry in known)
    refused = run(capsys, "list", "format=xml")
    assert (refused.status, "format=xml is not a choice" in refused.err) == (2, True)
