"""The service as its clients see it."""

import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

import hrm
from hrm import cli
from hrm.config import ServeConfig
from hrm.errors import UserError
from hrm.inference.model import TrainedModel
from hrm.service import connection
from hrm.service.answering import probability as probability_of
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import tiny, untrained, untrained_halting_apart
from tests.helpers.service import client_of, in_a_thread, served, wait_for

FORM = PuzzleForm("sudoku", 16, 6)
SOLUTION = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])


def drawn(seed: int) -> Any:
    """A board: the solution with digits renamed, half of it blank."""
    generator = np.random.default_rng(seed)
    return (generator.permutation(4) + 1)[SOLUTION - 1] * (generator.random(16) < 0.5)


DIGITS = np.stack([drawn(seed) for seed in range(20)])
BOARDS = ["".join(str(cell) for cell in row) for row in DIGITS]


def halting_apart(folder: Path) -> Path:
    return untrained_halting_apart(folder, FORM, DIGITS + 1, halt_max_steps=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return hrm.from_pretrained(halting_apart(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def client(model: TrainedModel) -> Iterator[TestClient]:
    with client_of(model) as client:
        yield client


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Engines compute nothing until it is set."""
    event, advance = threading.Event(), Engine._advance

    def after_it(self: Engine) -> None:
        event.wait(60)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", after_it)
    yield event
    event.set()


@contextmanager
def listening(model: TrainedModel, **options: Any) -> Iterator[tuple[uvicorn.Server, Engine, tuple[str, int]]]:
    """The service in a thread, with real connections."""
    engine, config = Engine(model, 4), ServeConfig(checkpoint="none", **options)
    with in_a_thread(make_app(engine, config, "small"), config) as (server, address):
        yield server, engine, address


def written(body: bytes, length: int | None = None) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST /infer HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def counted(address: tuple[str, int], status: int) -> bool:
    return f'path="/infer",status="{status}"' in httpx.get(f"http://127.0.0.1:{address[1]}/metrics").text


def infer(client: TestClient, **request: Any) -> dict[str, Any]:
    response = client.post("/infer", json=request)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


@pytest.mark.parametrize("augmentations", [1, 4])
def test_answers_are_those_of_predict(model: TrainedModel, client: TestClient, augmentations: int) -> None:
    expected = model.predict(BOARDS, augmentations=augmentations)
    found = infer(client, inputs=BOARDS, augmentations=augmentations)
    assert found["answers"] == expected.values
    assert found["texts"] == expected.texts
    assert found["steps"] == expected.steps.tolist()
    assert found["q_halt"] == pytest.approx(expected.q_halt.tolist(), abs=1e-5)
    assert found["index"] == list(range(20))
    assert found["model"] == "small"
    assert found["ms"] > 0
    assert "trajectory" not in found


def test_every_step_is_shown(model: TrainedModel, client: TestClient) -> None:
    found = infer(client, inputs=BOARDS[:3], trajectory=True, act_max_steps=2)
    expected = model.predict(BOARDS[:3], act_max_steps=2)
    assert [len(steps) for steps in found["trajectory"]] == found["steps"] == expected.steps.tolist()
    assert [steps[-1]["answer"] for steps in found["trajectory"]] == found["answers"] == expected.values


def test_a_task_of_arc_holds_several_puzzles(tmp_path: Path) -> None:
    form = PuzzleForm("arc", 900, 12, 2, identifiers=("<blank>", "ab12cd34"))
    model = tiny(tmp_path, form, halt_max_steps=1)
    task = {"test": [{"input": [[1]]}, {"input": [[2, 3]]}], "puzzle": "ab12cd34"}
    expected = model.predict([task])
    with client_of(model) as client:
        found = infer(client, inputs=[task])
    assert found["index"] == [0, 0]
    assert found["answers"] == expected.values


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"inputs": ["12"]}, "input 0: No Sudoku board has 2 cells"),
        ({"inputs": [BOARDS[0], 7]}, "input 1:"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": [BOARDS[0]] * 300}, "inputs: 300 are asked for, and this service gives at most 256"),
        ({"inputs": [BOARDS[0]], "augmentations": 65}, "augmentations: 65 are asked for"),
        ({"inputs": [BOARDS[0]], "act_max_steps": 1000}, "act_max_steps: 1000 are asked for"),
        ({"inputs": [BOARDS[0]], "act_max_steps": 10**400}, f"act_max_steps: 1{'0' * 116}... are asked for"),
        ({"inputs": [BOARDS[0]], "act_max_steps": True}, "act_max_steps: Input should be a valid integer"),
        ({"inputs": [BOARDS[0]], "augmentations": 3.0}, "augmentations: Input should be a valid integer"),
        ({"inputs": [BOARDS[0]], "trajectory": "yes"}, "trajectory: Input should be a valid boolean"),
        ({"inputs": [BOARDS[0]], "act_max_steps": 0}, "act_max_steps: Input should be greater than or equal to 1"),
        ({"inputs": [BOARDS[0]], "augmentations": 2, "trajectory": True}, "trajectory cannot be combined"),
        ({"inputs": BOARDS[0]}, "inputs: Input should be a valid list"),
        ({"input": [BOARDS[0]]}, "inputs: Field required"),
        ({"inputs": [BOARDS[0]], "steps": 3}, "steps: Extra inputs are not permitted"),
        ([1], "the body: Input should be a valid dictionary"),
        ("a", "the body: Input should be a valid dictionary"),
        ({"\ud800": 1}, "the body: Input should be a valid string"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, request_: Any, words: str) -> None:
    response = client.post("/infer", content=json.dumps(request_), headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json().keys() == {"error"}
    assert response.json()["error"].startswith(words)
    assert infer(client, inputs=BOARDS[:1])["steps"]


def test_what_is_not_called_json_is_told_so(client: TestClient) -> None:
    response = client.post("/infer", content=json.dumps({"inputs": BOARDS[:1]}))
    assert response.status_code == 422
    assert response.json() == {"error": "the header Content-Type: application/json is missing."}
    broken = client.post("/infer", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.json()["error"].startswith("the body is no JSON: Expecting property name")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"inputs":[' + b"9" * 6_000 + b"]}",
        b'{"inputs": ["' + rb"\ud800" * 16 + b'"]}',
        b'{"inputs": [[' + b"NaN," * 15 + b"1e999]]}",
        b'{"inputs": [' + b"[" * 900 + b"]" * 900 + b"]}",
        rb'{"\ud800": 1, "inputs": []}',
        b'{"inputs": ["1"], "act_max_steps": NaN}',
    ],
)
def test_what_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/infer", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json().keys() == {"error"}


def test_long_bodies_are_refused(model: TrainedModel) -> None:
    with client_of(model, most_body_bytes=100) as client:
        declared = client.post("/infer", content=b"x" * 101)
        parts = client.post("/infer", content=iter([b"x" * 60, b"x" * 60]))
        assert [declared.status_code, parts.status_code] == [413, 413]
        assert declared.json() == parts.json() == {"error": "a request has at most 100 bytes."}
        assert infer(client, inputs=BOARDS[:1])["steps"]


def test_more_than_can_wait_is_refused(model: TrainedModel, held: threading.Event) -> None:
    with client_of(model, most_waiting=2) as client:  # room for 4 slots and 2 that wait
        response = client.post("/infer", json={"inputs": BOARDS[:7]})
        assert response.status_code == 422
        assert response.json() == {
            "error": "7 puzzles and augmentations are asked for at once, and 6 can be: ask in parts."
        }
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(infer, client, inputs=BOARDS[:6])
            wait_for(lambda: "hrm_queue 2.0" in client.get("/metrics").text)
            response = client.post("/infer", json={"inputs": BOARDS[:1]})
            assert response.status_code == 429
            assert response.headers["Retry-After"] == "1"
            assert response.json() == {"error": "6 puzzles wait already; come again in 1 s."}
            held.set()
            assert len(first.result(60)["steps"]) == 6
        assert len(infer(client, inputs=BOARDS[:6])["steps"]) == 6


def test_augmentations_that_are_answered_at_once_count_as_such(tmp_path: Path) -> None:
    """Where no rules tell a right answer, all are wanted."""
    model = tiny(tmp_path, PuzzleForm("arc", 900, 12, 2, identifiers=("<blank>", "ab12cd34")), halt_max_steps=1)
    task = {"input": [[1]], "puzzle": "ab12cd34"}
    with client_of(model, most_waiting=2) as client:
        response = client.post("/infer", json={"inputs": [task, task], "augmentations": 4})
        assert response.status_code == 422
        assert response.json()["error"].startswith("8 puzzles and augmentations are asked for at once, and 6 can be")
        assert len(infer(client, inputs=[task], augmentations=4)["steps"]) == 1


def test_a_huge_trajectory_is_refused(model: TrainedModel) -> None:
    with client_of(model, most_trajectory_tokens=96) as client:
        response = client.post("/infer", json={"inputs": BOARDS[:3], "trajectory": True, "act_max_steps": 3})
        assert response.status_code == 422
        assert response.json()["error"].startswith("trajectory: 144 tokens may be to show")
        assert infer(client, inputs=BOARDS[:3], trajectory=True, act_max_steps=2)["trajectory"]


@pytest.mark.parametrize(("logit", "probability"), [(0, 0.5), (1e9, 1), (-1e9, 0), (math.inf, 1), (math.nan, 0)])
def test_probabilities_are_numbers(logit: float, probability: float) -> None:
    assert probability_of(logit) == probability


def test_a_request_has_its_time(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Engine._advance

    def slow(self: Engine) -> None:
        time.sleep(0.2)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", slow)
    with client_of(model, seconds_per_request=0.1) as client:
        response = client.post("/infer", json={"inputs": BOARDS})
        assert response.status_code == 504
        assert response.json() == {"error": "no answer within 0.1 s; ask for fewer inputs or ACT steps."}
        monkeypatch.setattr(Engine, "_advance", advance)
        time.sleep(0.3)
        assert infer(client, inputs=BOARDS[:1])["steps"], "what was given up holds no slots"


def test_a_model_that_fails_is_not_ready(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, 4)
    with TestClient(make_app(engine, ServeConfig(checkpoint="none"), "small")) as client:
        assert client.get("/readyz").json() == {"status": "ready"}

        def broken(*_: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._slots, "launch", broken)
        failed = client.post("/infer", json={"inputs": BOARDS[:2]})
        assert failed.status_code == 500
        assert failed.json() == {"error": "the service failed (RuntimeError: out of memory)."}
        assert client.post("/infer", json={"inputs": BOARDS[:2]}).status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").json() == {"status": "ok"}
        assert "hrm_errors_total 1.0" in client.get("/metrics").text


def test_what_is_counted(model: TrainedModel) -> None:
    steps = int(model.predict(BOARDS).steps.sum())
    with client_of(model) as client:
        infer(client, inputs=BOARDS)
        client.post("/infer", json={})
        client.get("/nothing")
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'hrm_requests_total{path="/infer",status="200"} 1.0',
        'hrm_requests_total{path="/infer",status="422"} 1.0',
        'hrm_requests_total{path="other",status="404"} 1.0',
        'hrm_request_seconds_count{path="/infer"} 2.0',
        "hrm_puzzles_total 20.0",
        f"hrm_act_steps_total {float(steps)}",
        "hrm_slots 4.0",
        "hrm_slots_in_use 0.0",
        "hrm_queue 0.0",
        "hrm_errors_total 0.0",
    ):
        assert line in lines


def test_it_says_what_there_is(client: TestClient) -> None:
    (shown,) = client.get("/models").json()["models"]
    assert (shown["name"], shown["task"], shown["seq_len"], shown["act_max_steps"]) == ("small", "sudoku", 16, 5)
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/infer",
        "/infer/L",
        "/infer/H",
        "/healthz",
        "/readyz",
        "/models",
        "/metrics",
    }
    assert set(described["paths"]["/infer"]["post"]["responses"]) >= {
        *("200", "400", "408", "413", "422", "429", "503", "504")
    }
    assert described["components"]["schemas"]["InferRequest"]["examples"][0]["inputs"]
    missing = client.get("/docs")
    assert (missing.status_code, missing.json()["error"]) == (404, "Not Found; GET /openapi.json says what there is.")


def test_nobody_is_sent_to_another_host(client: TestClient) -> None:
    found = client.post("/infer/", json={"inputs": BOARDS[:1]}, headers={"Host": "elsewhere"}, follow_redirects=False)
    assert found.status_code == 404


def test_head_answers_as_get_does_without_a_body(model: TrainedModel) -> None:
    with listening(model) as (_, _, address):
        for path in ("/healthz", "/readyz", "/models", "/metrics", "/"):
            found = httpx.head(f"http://127.0.0.1:{address[1]}{path}")
            assert (found.status_code, found.content) == (200, b"")
            assert int(found.headers["Content-Length"]) > 0
        assert httpx.head(f"http://127.0.0.1:{address[1]}/infer").status_code == 405


# ---- its connections


def test_who_leaves_gives_up_the_slots(
    model: TrainedModel,
    held: threading.Event,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with listening(model) as (_, engine, address):
        with socket.create_connection(address) as client:
            client.sendall(written(json.dumps({"inputs": BOARDS}).encode()))
            wait_for(lambda: (engine.work.in_slots, engine.work.waiting) == (4, 16))
        wait_for(lambda: engine.work.waiting == 0)
        assert counted(address, 499)
        held.set()
        wait_for(lambda: engine.work.in_slots == 0)
        assert engine.work.answered == 0
    gc.collect()  # when asyncio tells of errors that nobody has looked at
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_who_leaves_before_all_is_sent_is_no_failure(model: TrainedModel) -> None:
    with listening(model) as (_, _, address):
        with socket.create_connection(address) as client:
            client.sendall(written(b"{", length=100))
        wait_for(lambda: counted(address, 499))
        assert "hrm_errors_total 0.0" in httpx.get(f"http://127.0.0.1:{address[1]}/metrics").text


@pytest.mark.parametrize("sent", [[], [b"POST /infer HT"], [b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", b"GET"]])
def test_requests_that_do_not_arrive_hold_no_connection(model: TrainedModel, sent: list[bytes]) -> None:
    with listening(model, seconds_per_request=0.2) as (server, _, address), socket.create_connection(address) as client:
        client.settimeout(30)
        for part in sent:
            client.sendall(part)
            if part.endswith(b"\r\n"):
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass
        wait_for(lambda: not server.server_state.connections)


def test_a_body_that_does_not_arrive_is_refused(model: TrainedModel) -> None:
    with listening(model, seconds_per_request=0.2) as (_, _, address), socket.create_connection(address) as client:
        client.settimeout(30)
        client.sendall(written(b"{", length=100))
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_answers_that_are_not_read_hold_no_connection(model: TrainedModel) -> None:
    with listening(model, seconds_per_request=0.5) as (server, _, address), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(address)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: h\r\n\r\n"
        client.settimeout(30)
        with pytest.raises(ConnectionError):  # it is ended from the other side
            client.sendall(asked * 1_000_000)
        wait_for(lambda: not server.server_state.connections)


def test_what_is_not_answered_when_the_time_to_drain_is_up_gets_a_sentence(
    model: TrainedModel, held: threading.Event
) -> None:
    with listening(model, seconds_to_drain=0) as (server, engine, address), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            httpx.post, f"http://127.0.0.1:{address[1]}/infer", json={"inputs": BOARDS[:2]}, timeout=60
        )
        wait_for(lambda: engine.work.in_slots == 2)
        server.should_exit = True
        response = waiting.result(60)
        assert (response.status_code, response.json()) == (503, {"error": "the service is ending."})
        held.set()


def test_a_second_ctrl_c_ends_it_at_once_and_in_order(
    model: TrainedModel,
    held: threading.Event,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with listening(model) as (server, engine, address), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            httpx.post, f"http://127.0.0.1:{address[1]}/infer", json={"inputs": BOARDS[:2]}, timeout=60
        )
        wait_for(lambda: engine.work.in_slots == 2)
        server.should_exit = server.force_exit = True
        response = waiting.result(60)
        assert (response.status_code, response.json()) == (503, {"error": "the service is ending."})
        held.set()
        wait_for(lambda: not engine._thread.is_alive())
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def said_to(address: tuple[str, int], sent: bytes) -> bytes:
    """All that comes back until the service closes the connection."""
    with socket.create_connection(address) as client:
        client.settimeout(30)
        client.sendall(sent)
        found = b""
        while part := client.recv(4096):
            found += part
        return found


NO_HTTP = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",  # a browser that tries https
    b"GET / HTTP/9\r\n\r\n",
    b"POST /infer HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
    b"POST /infer HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /nothing HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",  # answered before the rest comes
]


@pytest.mark.parametrize("sent", NO_HTTP[:-1])
def test_what_is_no_http_is_told_so(model: TrainedModel, sent: bytes) -> None:
    with listening(model) as (_, _, address):
        found = said_to(address, sent)
        assert found.startswith(b"HTTP/1.1 400 ")
        assert found.endswith(b'{"error": "what was sent is no HTTP request."}')


def test_what_is_no_http_leaves_no_trace(
    model: TrainedModel, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Who sends garbage could fill the disk that stderr goes to."""
    with listening(model) as (server, _, address):
        for sent in NO_HTTP[:-1]:
            said_to(address, sent)
        with socket.create_connection(address) as client:
            client.settimeout(30)
            client.sendall(NO_HTTP[-1])
            assert client.recv(4096).startswith(b"HTTP/1.1 404")
            client.sendall(b"zz\r\n")
            while client.recv(4096):
                pass
        wait_for(lambda: not server.server_state.connections)
    assert (*capfd.readouterr(), caplog.text) == ("", "", "")


def test_there_are_no_more_connections_than_may_be(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_TOLD_SO", 2)
    monkeypatch.setattr(connection, "_SECONDS_FOR_THAT", 0.2)
    asked = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    with listening(model, most_connections=3) as (server, _, address):
        held = [socket.create_connection(address) for _ in range(3)]
        wait_for(lambda: len(server.server_state.connections) == 3)
        found = said_to(address, asked)
        assert found.startswith(b"HTTP/1.1 503 ")
        assert found.endswith(b'{"error": "3 connections are open already; come again later."}')
        silent = [socket.create_connection(address) for _ in range(20)]
        wait_for(lambda: len(server.server_state.connections) == 3)  # no more than five at any time
        held[0].sendall(asked)  # those that came first have what they came for
        held[0].settimeout(30)
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200")
        held.pop().close()
        wait_for(lambda: len(server.server_state.connections) == 2)
        assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz").status_code == 200
        for client in [*held, *silent]:
            client.close()


CROWD = """
import socket, sys
clients = [socket.socket() for _ in range(800)]
for client in clients:
    client.setblocking(False)
    client.connect_ex(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count open files")
def test_a_crowd_does_not_exhaust_the_files_of_the_process(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who comes at once is accepted before anyone is looked at."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(connection, "_TOLD_SO", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (
        listening(model, most_connections=3) as (server, _, address),
        subprocess.Popen([sys.executable, "-S", "-c", CROWD, str(address[1])], stdin=-1, stdout=-1) as crowd,
    ):
        assert crowd.stdin is not None
        assert crowd.stdout is not None
        files = len(os.listdir("/proc/self/fd")) + 3 + 2 + connection._ACCEPTED_BEFORE_CLOSED + 10
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
        try:
            assert crowd.stdout.readline() == b"\n"
            wait_for(lambda: len(server.server_state.connections) == 3)
            crowd.stdin.close()
            wait_for(lambda: not server.server_state.connections)
            assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz").status_code == 200
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caplog.text == ""


def test_files_that_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = [1000, 2000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    beside = 64 + 4 * 129 + 128
    assert connection.connections_allowed(50) == 50
    assert limits == [1000, 2000], "enough as it is"
    assert connection.connections_allowed(500) == 500
    assert limits == [500 + beside, 2000]
    assert connection.connections_allowed(4096) == 2000 - beside
    assert limits == [2000, 2000]
    limits[:] = [100, 100]
    with pytest.raises(UserError, match="only 100 files open"):
        connection.connections_allowed(4096)


# ---- the process


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with served(halting_apart(tmp_path), "slots=8", "results=none") as process:
        yield process


@pytest.mark.slow
def test_many_clients_and_a_signal(running: tuple[subprocess.Popen[str], str]) -> None:
    """Broken requests do no harm; what is at hand when SIGTERM comes is answered, and the process ends well."""
    process, url = running
    expected: dict[str, str] = {}
    broken = [b"", b"{", b'{"inputs": [1]}', b'{"inputs": ["x"]}', b'{"inputs": 5}', b"\x00" * 1000]

    with httpx.Client(timeout=60) as one:
        for board in BOARDS:
            expected[board] = one.post(f"{url}/infer", json={"inputs": [board]}).json()["texts"][0]

    def client(number: int) -> int:
        answered = 0
        with httpx.Client(timeout=60) as http:
            for turn in range(10):
                bad = http.post(f"{url}/infer", content=broken[(number + turn) % len(broken)])
                assert bad.status_code in (400, 422)
                asked = [BOARDS[(number + turn) % 20], BOARDS[(3 * number + turn) % 20]]
                found = http.post(f"{url}/infer", json={"inputs": asked}).json()
                assert found["texts"] == [expected[board] for board in asked]
                answered += 2
        return answered

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(client, range(16))) == 320
    assert f"hrm_puzzles_total {20 + 320 + 1}.0" in httpx.get(f"{url}/metrics").text  # and the one it warmed up with

    answered_at: list[float] = []
    wrong: list[object] = []

    def asks_until_the_end(_: int) -> None:
        while True:
            try:
                found = httpx.post(f"{url}/infer", json={"inputs": BOARDS * 12}, timeout=60).json()
            except httpx.TransportError:  # nobody listens any more, or what had waited for that was sent away
                return
            if found.get("texts") != [expected[board] for board in BOARDS] * 12:
                wrong.append(found)
            answered_at.append(time.monotonic())

    threads = [threading.Thread(target=asks_until_the_end, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(answered_at) < 4 or "hrm_slots_in_use 0.0" in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    ended_at = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert max(answered_at) > ended_at, "what was at hand is answered"
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["port=99999"], "port=99999"),
        (["host=256.0.0.1"], "cannot listen at host=256.0.0.1"),
        (["slots=0"], "slots=0 is too small"),
        (["checkpoint=nowhere", "port=0"], "nowhere"),
        (["prot=0"], "did you mean port"),
    ],
)
def test_the_command_line(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hrm"])
    folder = untrained(tmp_path / "run", FORM)
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", f"checkpoint={folder}", "device=cpu", "results=none", *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
