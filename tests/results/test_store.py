"""A results store, in a file and in PostgreSQL."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from hrm.errors import UserError, without_secrets
from hrm.results import open_store
from hrm.results.records import (
    Answer,
    AnsweredRequest,
    Artifact,
    Evaluation,
    PublishedPack,
    RecordError,
    StoreError,
    new_id,
)
from hrm.results.store import Store
from tests.helpers.servers import postgresql

ANSWERS = [
    Answer(0, "a" * 64, [[1, 2], [3, 4]], "1234", 0.1 + 0.2, 3),
    Answer(1, "b" * 64, None, "", 1e-300, 16, [{"answer": "é", "q_halt": 0.5}]),
]
REQUEST = AnsweredRequest("sudoku", "w" * 64, "r" * 64, {"augmentations": 8}, 12.345, ANSWERS, "0.2.0")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as (_, url):
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'results.sqlite'}"
    server: str = request.getfixturevalue("server")
    name = f"of_{new_id()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server.rpartition('/')[0]}/{name}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


def another(**changes: Any) -> AnsweredRequest:
    """Another request, with a name of its own."""
    fresh = AnsweredRequest("sudoku", "w" * 64, "r" * 64, {}, 1.0, ANSWERS, "0.2.0")
    return replace(fresh, **changes)


def test_requests_are_read_as_they_were_written(store: Store, url: str) -> None:
    others = [another() for _ in range(300)]
    store.add_requests([REQUEST, *others])
    store.close()
    again = open_store(url)
    for record in (REQUEST, others[0], others[-1]):
        assert again.request(record.id) == record
    assert again.request("0" * 32) is None


def test_nothing_is_recorded_twice(store: Store) -> None:
    records = [another() for _ in range(5)]
    store.add_requests(records[:3])
    store.add_requests([*records, records[4]])
    assert [store.request(record.id) for record in records] == records
    with store._reading() as connection:
        counts = [connection.exec_driver_sql(f"SELECT count(*) FROM hrm_{name}") for name in ("requests", "answers")]
        assert [count.scalar() for count in counts] == [5, 10]


def test_a_key_stands_for_one_request_of_a_model(store: Store) -> None:
    first, second, elsewhere = another(key="k"), another(key="k"), another(key="k", model="maze")
    store.add_requests([first, second])
    store.add_requests([second, elsewhere])
    assert store.request_of_key("sudoku", "k") == first
    assert store.request_of_key("maze", "k") == elsewhere
    assert store.request(second.id) is None
    assert store.request_of_key("sudoku", "other") is None


@pytest.mark.parametrize(
    "answer",
    [
        Answer(0, "a", float("nan"), "", 0.5, 1),
        Answer(0, "a", 1, "\ud800", 0.5, 1),
        Answer(0, "a", 1, "", None, 1),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_kept_is_told_apart_from_a_store_that_fails(store: Store, answer: Answer) -> None:
    with pytest.raises(RecordError, match="cannot hold a record"):
        store.add_requests([REQUEST, another(answers=[answer])])
    assert store.request(REQUEST.id) is None, "all or none"


def test_evaluations(store: Store) -> None:
    artifacts = [Artifact("predictions", "/run/step_1_all_preds.0", "1" * 64), Artifact("report", "/report", "2" * 64)]
    metrics = {"all/exact_accuracy": 0.75, "all/count": 4.0}
    later = datetime.now(UTC) + timedelta(hours=1)
    first = Evaluation("/run/step_1", "w", "/pack", "p", {"act": "full"}, metrics, {"HRM": "0.2.0"}, artifacts)
    second = replace(first, id="2" * 32, time=later, metrics={"loss": float("nan")}, artifacts=[])
    store.add_evaluation(second)
    store.add_evaluation(first)
    assert store.evaluations() == [first, replace(second, metrics={"loss": None})]


def test_packs(store: Store) -> None:
    pack = PublishedPack("sudoku", "1", "MIT", "1000", "h", "s3://bucket/sudoku", {"seed": 0})
    moved = replace(pack, place="s3://elsewhere/sudoku")
    store.add_pack(pack)
    store.add_pack(moved)
    assert store.packs() == [moved]
    with pytest.raises(UserError, match="sudoku version 1 with other content: give another version"):
        store.add_pack(replace(pack, hash="other"))
    assert store.packs() == [moved] == [store.pack("sudoku", "1")]
    assert store.pack("sudoku", "2") is None
    store.add_pack(replace(pack, hash="other"), overwrite=True)
    assert store.packs() == [replace(pack, hash="other")]


def test_processes_make_the_tables_once(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: open_store(url), range(8)))
    stores[0].add_requests([REQUEST])
    assert stores[7].request(REQUEST.id) == REQUEST
    for store in stores:
        store.close()


def test_a_newer_store_is_refused(store: Store, url: str) -> None:
    with store._writing() as connection:
        connection.exec_driver_sql("UPDATE hrm_schema SET version = 2")
    with pytest.raises(UserError, match=r"made by a newer version of HRM .*version 2, this one knows 1.*: update HRM"):
        open_store(url)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("results.sqlite", "results=results.sqlite is not a URL: give sqlite:///FILE"),
        ("postgresql:/me:secret@host/d", r"results=\*\*\*@host/d is not a URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://file", "names no file"),
        ("mysql://me:secret@host/d", r"results=mysql://me:\*\*\*@host/d: this kind of database is not known"),
        (
            "postgresql://me:sec/ret@host/d",
            r"results=postgresql://me:\*\*\*@host/d cannot be read: in a user",
        ),
        ("postgresql://me:secret@host:port/d", r"results=postgresql://me:\*\*\*@host:port/d cannot be read as a URL"),
        ("postgresql://me:secret@127.0.0.1:1/d", "Connection refused"),
        ("postgres://127.0.0.1:1/d?user=me&password=secret", r"&password=\*\*\* cannot be used"),
    ],
)
def test_urls_of_no_use_end_in_a_sentence(given: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        open_store(given)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_secrets_are_not_shown() -> None:
    assert without_secrets("postgresql://me:a@b:c@host/d") == "postgresql://me:***@host/d"
    assert without_secrets("postgresql://host/d?sslpassword=secret&x=1") == "postgresql://host/d?sslpassword=***&x=1"
    assert without_secrets("sqlite:///file") == "sqlite:///file"


def test_files_that_cannot_be_used_end_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    for name, words in (("nowhere/file", "unable to open database file"), ("text", "file is not a database")):
        with pytest.raises(StoreError, match=f"cannot be used .{words}"):
            open_store(f"sqlite:///{tmp_path / name}")


def test_what_may_not_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / "results.sqlite"
    open_store(f"sqlite:///{file}").check_writable()
    read_only = open_store(f"sqlite:///file:{file}?mode=ro&uri=true")
    assert read_only.packs() == []
    with pytest.raises(StoreError, match=r"attempt to write a readonly database\): see that its folder exists"):
        read_only.check_writable()


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'results.sqlite'}")
    with store._reading() as connection:  # the pool has this one, and gives it to the next
        connection.exec_driver_sql("PRAGMA max_page_count=30")
    with pytest.raises(StoreError, match="database or disk is full"):
        store.add_requests([another() for _ in range(300)])
    store.add_requests([REQUEST])
    assert store.request(REQUEST.id) == REQUEST


def test_a_server_that_was_killed_is_found_again() -> None:
    with postgresql() as (server, url):
        store = open_store(url)
        store.add_requests([REQUEST])
        server.kill()
        with pytest.raises(StoreError, match="cannot be used"):
            store.request(REQUEST.id)
        server.start()
        assert eventually(lambda: store.request(REQUEST.id)) == REQUEST
        store.close()


def eventually(read: Callable[[], AnsweredRequest | None]) -> AnsweredRequest | None:
    """What it gives as soon as the database answers."""
    until = time.monotonic() + 30
    while True:
        try:
            return read()
        except StoreError:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.config.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^results=sqlite: needs sqlalchemy: pip install 'hrm-torch\[results\]'\.$"):
        open_store("sqlite:///file")
    with pytest.raises(UserError, match="needs sqlalchemy, psycopg"):
        open_store("postgresql://host/d")
