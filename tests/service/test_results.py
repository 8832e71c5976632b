"""What a service records of its answers, whatever becomes of it and of the database."""

import hashlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

import hrm
from hrm import cli
from hrm.config import ServeConfig
from hrm.inference.model import TrainedModel
from hrm.reading import sha256_of
from hrm.results import open_store
from hrm.results.records import Answer, AnsweredRequest, RecordError, StoreError, new_id
from hrm.results.store import Store
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.service.recorder import Entry, Recorder
from hrm.service.results import Results
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import untrained
from tests.helpers.servers import postgresql
from tests.helpers.service import served, wait_for

FORM = PuzzleForm("sudoku", 16, 6)
BOARDS = ["1.3..4.2.1..4..1", "..34.4...14.43..", "12..3.......21..", "4..1..........3."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"), FORM)


@pytest.fixture(scope="module")
def model(folder: Path) -> TrainedModel:
    return hrm.from_pretrained(folder, device="cpu")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'results.sqlite'}"


@contextmanager
def client_of(
    model: TrainedModel, url: str, name: str = "small", weights: str = "w", **options: Any
) -> Iterator[TestClient]:
    config = ServeConfig(checkpoint="none", **options)
    results = Results(open_store(url), config.most_unrecorded_bytes, name, weights)
    with TestClient(make_app(Engine(model, 4), config, name, results)) as client:
        yield client


@pytest.fixture
def client(model: TrainedModel, url: str) -> Iterator[TestClient]:
    with client_of(model, url) as client:
        yield client


def ask(client: TestClient | httpx.Client, *boards: str, key: str | None = None, **request: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post("/infer", json={"inputs": boards, **request}, headers=headers)


def answered(client: TestClient | httpx.Client, *boards: str, key: str | None = None, **request: Any) -> Any:
    response = ask(client, *boards, key=key, **request)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"])


def count(client: TestClient | httpx.Client, name: str) -> float:
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0][1])


def recorded(url: str, ids: list[str]) -> list[str]:
    """The texts of all answers that a store has under these ids; it has no others."""
    store = open_store(url)
    with store._reading() as connection:
        counts = [
            connection.exec_driver_sql(f"SELECT count(*) FROM hrm_{name}").scalar() for name in ("requests", "answers")
        ]
    records = [store.request(id) for id in ids]
    store.close()
    assert None not in records
    texts = [answer.text for record in records if record for answer in record.answers]
    assert counts == [len(set(ids)), len(texts)], "each of them once"
    return texts


class Failing:
    """Makes a store fail while it is set, before or after it has written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before = self.after = False
        for name in ("add_requests", "request", "request_of_key", "check_writable"):
            monkeypatch.setattr(Store, name, self._wrapped(getattr(Store, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(store: Store, *arguments: Any) -> Any:
            if self.before:
                raise StoreError("results=file cannot be used (it is gone)", "bring it back")
            found = function(store, *arguments)
            if self.after:
                raise StoreError("results=file cannot be used (the connection was lost)", "bring it back")
            return found

        return wrapped


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


# ---- what is recorded


def test_an_answer_can_be_asked_for_again(model: TrainedModel, client: TestClient, url: str) -> None:
    expected = model.predict(BOARDS)
    given = ask(client, *BOARDS, trajectory=True)
    content = given.json()
    again = client.get(f"/results/{content['id']}")
    assert again.content == given.content
    assert content["answers"] == expected.values
    wait_for(lambda: count(client, "hrm_results_recorded_total") == 1)
    record = open_store(url).request(content["id"])
    assert record is not None
    assert (record.model, record.weights_hash, record.key, record.ms) == ("small", "w", None, content["ms"])
    assert record.options == {"act_max_steps": None, "augmentations": 1, "trajectory": True, "tokens": False}
    tokens = np.array([0 if cell == "." else int(cell) for cell in BOARDS[0]]) + 1
    hashed = hashlib.sha256(np.append(tokens, 0).astype("<i8").tobytes()).hexdigest()
    first = record.answers[0]
    assert (first.input_hash, first.text, first.steps) == (hashed, expected.texts[0], expected.steps[0])
    assert [len(answer.trajectory or []) for answer in record.answers] == expected.steps.tolist()


def test_answers_outlive_the_service(model: TrainedModel, url: str) -> None:
    with client_of(model, url) as client:
        given = [ask(client, board) for board in BOARDS]
    with client_of(model, url) as client:
        for each in given:
            assert client.get(f"/results/{each.json()['id']}").content == each.content


@pytest.mark.parametrize("id", ["x", "0123456789abcdef" * 2, "%00" * 32, "é" * 32])
def test_what_is_not_recorded_is_not_found(client: TestClient, id: str) -> None:
    assert error_of(client.get(f"/results/{id}"), 404).startswith("no answer of this id is recorded")


def test_without_a_store_nothing_is_recorded_or_repeated(model: TrainedModel) -> None:
    with TestClient(make_app(Engine(model, 4), ServeConfig(checkpoint="none"), "small")) as client:
        assert "id" not in answered(client, BOARDS[0])
        assert client.get(f"/results/{new_id()}").status_code == 404
        assert "results=none" in error_of(ask(client, BOARDS[0], key="k"), 422)


def test_it_is_described(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/results/{id}"]["get"]["responses"]) >= {"200", "404", "503"}
    (header,) = paths["/infer"]["post"]["parameters"]
    assert (header["name"], header["in"], header["required"]) == ("Idempotency-Key", "header", False)
    assert "409" in paths["/infer"]["post"]["responses"]


# ---- keys


def test_a_key_is_not_answered_by_other_weights(model: TrainedModel, url: str) -> None:
    """Two models of one name may share a database: the answer of one is not given for the other's."""
    with client_of(model, url) as client:
        first = ask(client, BOARDS[0], key="k")
    with client_of(model, url, weights="others") as client:
        assert "answered by other weights of the name small" in error_of(ask(client, BOARDS[0], key="k"), 422)
    with client_of(model, url) as client:
        assert ask(client, BOARDS[0], key="k").content == first.content


def test_a_key_is_answered_once(model: TrainedModel, url: str) -> None:
    with client_of(model, url) as client:
        first = ask(client, *BOARDS[:2], key="k", augmentations=2)
        computed = count(client, "hrm_act_steps_total")
        grids = [[list(map(int, board[row : row + 4].replace(".", "0"))) for row in (0, 4, 8, 12)] for board in BOARDS]
        response = client.post(
            "/infer", json={"inputs": grids[:2], "augmentations": 2}, headers={"Idempotency-Key": "k"}
        )
        assert response.content == first.content, "the same boards, written otherwise"
        assert count(client, "hrm_act_steps_total") == computed
        for others in ({"augmentations": 1}, {"augmentations": 2, "act_max_steps": 2}):
            assert "is of a request with other inputs" in error_of(ask(client, *BOARDS[:2], key="k", **others), 422)
        assert "is of a request with other inputs" in error_of(ask(client, BOARDS[1], BOARDS[0], key="k"), 422)
        assert answered(client, *BOARDS[:2], augmentations=2)["id"] != first.json()["id"]
    with client_of(model, url) as client:
        assert ask(client, *BOARDS[:2], key="k", augmentations=2).content == first.content
    with client_of(model, url, name="other") as client:
        assert answered(client, *BOARDS[:2], key="k")["model"] == "other", "each model has keys of its own"


@pytest.mark.parametrize("key", ["", "a" * 256, "\x7f"])
def test_keys_of_no_use_are_refused(client: TestClient, key: str) -> None:
    assert error_of(ask(client, BOARDS[0], key=key), 422).startswith("Idempotency-Key has 1 to 255 printable")


def test_two_keys_are_refused(client: TestClient) -> None:
    response = client.post("/infer", json={"inputs": BOARDS[:1]}, headers=[("Idempotency-Key", key) for key in "ab"])
    assert error_of(response, 422) == "Idempotency-Key is given more than once."


def test_sessions_know_no_keys(client: TestClient) -> None:
    response = client.post("/infer/L", json={"inputs": BOARDS[:1]}, headers={"Idempotency-Key": "k"})
    assert error_of(response, 422).startswith("Idempotency-Key: /infer/L knows none")


def test_what_is_not_recorded_cannot_be_repeated(client: TestClient) -> None:
    assert "tokens" in answered(client, BOARDS[0], tokens=True)
    assert error_of(ask(client, BOARDS[0], key="k", tokens=True), 422).startswith("tokens cannot be combined")


def test_of_two_requests_of_a_key_one_is_answered(
    model: TrainedModel, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one service the other is told so, in two that share a store both get the answer of the first."""
    may_compute, advance = threading.Event(), Engine._advance

    def held(engine: Engine) -> None:
        may_compute.wait(60)
        advance(engine)

    monkeypatch.setattr(Engine, "_advance", held)
    with client_of(model, url) as one, client_of(model, url) as two, ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(ask, client, BOARDS[0], key="k") for client in (one, two)]
        wait_for(lambda: count(one, "hrm_slots_in_use") == count(two, "hrm_slots_in_use") == 1)
        third = ask(one, BOARDS[0], key="k")
        assert "is being answered" in error_of(third, 409)
        assert third.headers["Retry-After"] == "1"
        may_compute.set()
        first, second = (future.result(60) for future in futures)
    assert first.status_code == 200
    assert first.content == second.content
    recorded(url, [first.json()["id"]])


# ---- a store that fails


def test_no_answer_waits_for_the_store(model: TrainedModel, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), Store.add_requests

    def slow(store: Store, records: Any) -> None:
        may_write.wait(60)
        write(store, records)

    monkeypatch.setattr(Store, "add_requests", slow)
    with client_of(model, url) as client:
        ids = [answered(client, board)["id"] for board in BOARDS]
        assert count(client, "hrm_results_waiting") == 4
        assert count(client, "hrm_results_recorded_total") == 0
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(client.get, f"/results/{ids[0]}")
            time.sleep(0.05)
            assert not reading.done(), "it is recorded soon"
            may_write.set()
            assert reading.result(30).status_code == 200
    recorded(url, ids)


def test_a_store_that_fails_ends_no_service_and_loses_nothing(
    model: TrainedModel, url: str, failing: Failing, capfd: pytest.CaptureFixture[str]
) -> None:
    with client_of(model, url) as client:
        ids = [answered(client, BOARDS[0])["id"]]
        repeated = ask(client, BOARDS[0], key="k")
        ids.append(repeated.json()["id"])
        failing.before = True
        ids += [answered(client, board)["id"] for board in BOARDS]
        wait_for(lambda: count(client, "hrm_results_up") == 0)
        assert client.get("/readyz").status_code == 200
        for response in (
            ask(client, BOARDS[0], key="k"),
            ask(client, BOARDS[0], key="another"),
            client.get(f"/results/{ids[0]}"),
            client.get(f"/results/{ids[-1]}"),
        ):
            assert error_of(response, 503) == "the results store cannot be used now: come again later."
            assert response.headers["Retry-After"] == "2"
        failing.before = False
        wait_for(lambda: count(client, "hrm_results_up") == 1)
        assert ask(client, BOARDS[0], key="k").content == repeated.content
        assert count(client, "hrm_results_waiting") == count(client, "hrm_results_dropped_total") == 0
    recorded(url, ids)
    said = capfd.readouterr()
    assert said.err == (
        "warning: results=file cannot be used (it is gone): answers go on, and up to 64 MB of them are kept until they "
        "can be recorded.\n"
    )
    assert said.out.endswith("works again.\n")


def test_what_was_written_before_the_connection_was_lost_is_not_written_twice(
    model: TrainedModel, url: str, failing: Failing
) -> None:
    with client_of(model, url) as client:
        failing.after = True
        ids = [answered(client, board)["id"] for board in BOARDS]
        assert error_of(ask(client, BOARDS[0], key="k"), 503)
        wait_for(lambda: count(client, "hrm_results_up") == 0)
        failing.after = False
        wait_for(lambda: count(client, "hrm_results_waiting") == 0)
        ids.append(answered(client, BOARDS[0], key="k")["id"])
    recorded(url, ids)


def test_more_than_can_be_kept_is_dropped_and_counted(model: TrainedModel, url: str, failing: Failing) -> None:
    with client_of(model, url, most_unrecorded_bytes=5000) as client:
        failing.before = True
        ids = [answered(client, BOARDS[0])["id"] for _ in range(10)]
        kept = int(count(client, "hrm_results_waiting"))
        assert 0 < kept < 5
        assert count(client, "hrm_results_dropped_total") == 10 - kept
        failing.before = False
        wait_for(lambda: count(client, "hrm_results_recorded_total") == kept)
        ids = [*ids[:kept], answered(client, BOARDS[0])["id"]]
    recorded(url, ids)


def test_what_cannot_be_recorded_holds_up_no_others(
    url: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does it end the thread that writes."""
    may_write, write = threading.Event(), Store.add_requests

    def slow(store: Store, records: Any) -> None:
        may_write.wait(60)
        write(store, records)

    def entry(value: object) -> Entry:
        record = AnsweredRequest("small", "w", "r", {}, 1.0, [Answer(0, "a", value, "text", 0.5, 1)], "0")
        return Entry(record.id, 100, lambda: record)

    def broken() -> AnsweredRequest:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Store, "add_requests", slow)
    recorder = Recorder(open_store(url), 10_000)
    good = [entry(1) for _ in range(5)]
    for each in (good[0], good[1], entry(math.nan), good[2], Entry("b" * 32, 100, broken), good[3]):
        recorder.put(each)
    at_once = [recorder.put_at_once(good[4]), recorder.put_at_once(entry(math.inf))]
    may_write.set()
    assert at_once[0].result(30) is None
    with pytest.raises(RecordError, match="cannot hold a record"):
        at_once[1].result(30)
    assert recorder.close(5) == 0
    assert (recorder.recorded, recorder.dropped, recorder.kept, recorder.is_failing) == (5, 3, 0, False)
    recorded(url, [each.id for each in good])
    lines = capfd.readouterr().err.splitlines()
    assert [line.startswith("warning: one answer is not recorded: ") for line in lines] == [True] * 3
    assert "ZeroDivisionError: a bug" in lines[1]


def test_a_store_that_fails_at_the_end_is_told(url: str, failing: Failing) -> None:
    recorder = Recorder(open_store(url), 10_000)
    failing.before = True
    for number in range(3):
        recorder.put(Entry(str(number), 100, empty))
    began = time.monotonic()
    assert recorder.close(0.3) == 3
    assert 0.2 < time.monotonic() - began < 5
    assert recorder.dropped == 3


def empty() -> AnsweredRequest:
    return AnsweredRequest("small", "w", "r", {}, 1.0, [], "0")


def test_who_waits_for_a_database_that_does_not_even_fail_is_told(
    model: TrainedModel, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm.service.results._SECONDS_TO_READ", 0.05)
    hangs = threading.Event()
    monkeypatch.setattr(Store, "request_of_key", lambda *_: hangs.wait(60))
    with client_of(model, url) as client:
        with ThreadPoolExecutor(20) as pool:
            for response in pool.map(lambda number: ask(client, BOARDS[0], key=str(number)), range(20)):
                assert error_of(response, 503).startswith("the results store cannot be used")
        assert sum(thread.name == "hrm-results" for thread in threading.enumerate()) == 8
        assert answered(client, BOARDS[0])["id"]
        hangs.set()


def test_postgresql_is_killed_under_load(model: TrainedModel) -> None:
    """Every answer that was given is in the store once, and is the one that was given."""
    texts: dict[str, str] = {}
    expected = dict(zip(BOARDS, model.predict(BOARDS).texts, strict=True))
    ended = threading.Event()
    refused: list[int] = []

    def load(client: TestClient, number: int) -> None:
        turn = 0
        while not ended.is_set():
            board, turn = BOARDS[(number + turn) % 4], turn + 1
            key = f"{number}-{turn}" if number == 0 else None
            while (response := ask(client, board, key=key)).status_code == 503 and not ended.is_set():
                refused.append(turn)
                time.sleep(0.01)
            if response.status_code == 200:
                texts[response.json()["id"]] = expected[board]
                assert response.json()["texts"] == [expected[board]]

    def wait_for_more() -> None:
        before = len(texts)
        wait_for(lambda: len(texts) > before + 30)

    with postgresql() as (server, url), client_of(model, url) as client, ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(load, client, number) for number in range(3)]
        try:
            for _ in range(2):
                wait_for_more()
                server.kill()
                wait_for(lambda: count(client, "hrm_results_up") == 0)
                wait_for_more()
                server.start()
                wait_for(lambda: count(client, "hrm_results_up") == 1)
        finally:
            ended.set()
        for each in clients:
            each.result(60)
        wait_for(lambda: count(client, "hrm_results_waiting") == 0)
        assert count(client, "hrm_results_dropped_total") == 0
        assert refused, "requests with keys wait for the store"
        assert recorded(url, list(texts)) == list(texts.values())


# ---- the process


@pytest.mark.slow
def test_a_service_that_is_killed_and_one_that_ends(model: TrainedModel, folder: Path, url: str) -> None:
    """By SIGKILL it loses no answer whose key was answered, by SIGTERM none at all."""
    expected = dict(zip(BOARDS, model.predict(BOARDS).texts, strict=True))
    given: dict[str, tuple[str, str, str | None]] = {}  # id: board, content, key

    def load(address: str, number: int) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            for turn in range(100_000):
                board, key = BOARDS[(number + turn) % 4], f"{address}-{number}-{turn}" if number % 2 else None
                try:
                    response = ask(client, board, key=key)
                except httpx.TransportError:
                    return
                if response.status_code == 503:
                    return
                content = response.json()
                assert content["texts"] == [expected[board]]
                given[content["id"]] = board, response.text, key

    def ended_by(number: signal.Signals) -> None:
        with served(folder, f"results={url}") as (process, address), ThreadPoolExecutor(4) as pool:
            before = len(given)
            clients = [pool.submit(load, address, each) for each in range(4)]
            wait_for(lambda: len(given) > before + 100, 60)
            process.send_signal(number)
            for each in clients:
                each.result(60)
            status = process.wait(60)
            assert process.stderr is not None
            assert (status, process.stderr.read()) == ((0, "") if number == signal.SIGTERM else (-signal.SIGKILL, ""))

    ended_by(signal.SIGKILL)
    store = open_store(url)
    lost = [id for id in given if store.request(id) is None]
    assert all(given[id][2] is None for id in lost), "those of a key were recorded before they were given"
    assert len(lost) < 100
    for id in lost:
        del given[id]
    ended_by(signal.SIGTERM)
    with store._reading() as connection:
        written = connection.exec_driver_sql("SELECT id FROM hrm_requests").scalars().all()
    assert set(written) >= set(given)
    for id in written:
        record = store.request(id)
        assert record is not None
        assert record.answers[0].text in expected.values()
        if id in given:
            assert record.answers[0].text == expected[given[id][0]]
    with client_of(model, url, name=folder.name, weights=sha256_of(model.checkpoint.weights_file)) as client:
        some_id, (board, content, key) = next(item for item in reversed(given.items()) if item[1][2])
        assert client.get(f"/results/{some_id}").text == content
        assert ask(client, board, key=key).text == content


def test_help_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["serve", "results=postgresql://me:secret@host/d", "--help"])
    said = capsys.readouterr().out
    assert "results=postgresql://me:***@host/d" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("mysql://me:secret@host/d", "results=mysql://me:***@host/d: this kind of database is not known"),
        ("sqlite:///nowhere/file", "results=sqlite:///nowhere/file cannot be used (unable to open database file)"),
        ("postgresql://me:secret@127.0.0.1:1/d", "give another, or results=none to record nothing."),
    ],
)
def test_a_store_of_no_use_is_told_at_once(
    results: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hrm"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", f"checkpoint={folder}", "device=cpu", "port=0", f"results={results}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert "secret" not in said
    assert len(said.strip().splitlines()) == 1
