"""Sessions in a real Redis, which several services share, and which others may write to, kill and fill."""

import asyncio
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from starlette.testclient import TestClient

from hrm.config import ServeConfig
from hrm.errors import UserError
from hrm.inference.model import TrainedModel
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.service.memory import Bounds, RedisMemory, check_memory
from hrm.service.sessions import SessionFormat
from hrm.tasks.form import PuzzleForm
from tests.helpers import servers
from tests.helpers.inference import tiny
from tests.helpers.service import held, refused, update, wait_for

FORM = PuzzleForm("sudoku", 16, 6)
BOARD = "1.3..4.2.1..4..1"
PASSWORD = "s3cr@t/:word"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return tiny(tmp_path_factory.mktemp("model"), FORM, H_cycles=2, L_cycles=2)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[servers.Server, str]]:
    with servers.redis(PASSWORD) as started:
        yield started


@pytest.fixture
def place(running: tuple[servers.Server, str]) -> str:
    """The URL of an empty Redis."""
    direct(running[1]).flushall()
    return running[1]


def direct(url: str) -> "redis.Redis[bytes]":
    return redis.Redis.from_url(url)


def app_of(model: TrainedModel, place: str, **options: Any) -> tuple[TestClient, Engine]:
    engine = Engine(model, 4)
    return TestClient(make_app(engine, ServeConfig(checkpoint="none", memory=place, **options), "small")), engine


def test_services_share_sessions(model: TrainedModel, place: str) -> None:
    """Update by update in turn, they make the model's ACT step, to the bit."""
    expected = model.predict([BOARD], act_max_steps=1, latents=True)
    assert expected.latents is not None
    (first, _), (second, _) = app_of(model, place), app_of(model, place)
    with first, second:
        schedule = [each.state.removeprefix("z_") for each in model.model.model.inner.plan.schedule]
        found = update(first, schedule[0], session="a", inputs=[BOARD])
        for number, level in enumerate(schedule[1:]):
            found = update([second, first][number % 2], level, session="a", state=True)
        assert found["answers"] == expected.values
        assert refused(second, 409, session="a", inputs=[BOARD]).startswith("session a is there already")
    content = direct(place).hget("{hrm}:session:a", "content")
    kept = np.load(io.BytesIO(content))
    assert all((kept[name] == states[0, 1]).all() for name, states in expected.latents.items())


def test_of_calls_to_two_services_that_overlap_one_counts(model: TrainedModel, place: str) -> None:
    (first, first_engine), (second, second_engine) = app_of(model, place), app_of(model, place)
    with first, second, ThreadPoolExecutor(4) as pool:
        update(first, "L", session="a", inputs=[BOARD])
        with held(first_engine, second_engine) as event:
            calls = [
                pool.submit(app.post, "/infer/L", json=request)
                for app in (first, second)
                for request in ({"session": "a"}, {"session": "new", "inputs": [BOARD]})
            ]
            wait_for(lambda: [len(engine._besides) for engine in (first_engine, second_engine)] == [2, 2])
            event.set()
            codes = [call.result(60).status_code for call in calls]
        assert sorted(codes[::2]) == sorted(codes[1::2]) == [200, 409]
        assert update(second, "L", session="a")["updates"] == {"L": 3, "H": 0}
        assert update(first, "L", session="new")["updates"] == {"L": 2, "H": 0}


def test_sessions_expire_and_make_room_for_others(model: TrainedModel, place: str) -> None:
    app, _ = app_of(model, place, most_sessions=2, seconds_per_session=1.0)
    with app:
        for name in ("a", "b"):
            update(app, "L", session=name, inputs=[BOARD])
        update(app, "L", session="a")
        update(app, "L", session="c", inputs=[BOARD])
        assert refused(app, 404, session="b").startswith("there is no session b")
        assert update(app, "L", session="a")["updates"] == {"L": 3, "H": 0}
        wait_for(lambda: not direct(place).keys())
        assert refused(app, 404, session="a").startswith("there is no session a")


def test_sessions_of_another_model_are_refused(model: TrainedModel, place: str, tmp_path: Path) -> None:
    other = tiny(tmp_path, FORM, hidden_size=32)
    (ours, _), (theirs, _) = app_of(model, place), app_of(other, place)
    with ours, theirs:
        update(theirs, "L", session="a", inputs=[BOARD])
        assert refused(ours, 409, session="a") == (
            "session a cannot be read (it is of another model, or of another dtype): take another name."
        )
        assert update(theirs, "L", session="a")["updates"] == {"L": 2, "H": 0}


def test_what_others_wrote_is_refused(model: TrainedModel, place: str) -> None:
    own, hash_, key = direct(place), SessionFormat(model).model_hash, "{hrm}:session:a"
    app, _ = app_of(model, place)
    with app:
        update(app, "L", session="good", inputs=[BOARD])
        good = own.hget("{hrm}:session:good", "content")
        whole = {"version": "1", "model": hash_, "content": good}
        pickled = io.BytesIO()
        np.savez(pickled, z_H=np.array([print], dtype=object))
        for fields, words in (
            ({"version": "1"}, "it is of another model"),
            ({"version": "1", "model": hash_}, "it is not whole"),
            (whole | {"model": b"\xff" * 64}, "it is of another model"),
            (whole | {"content": b"x" * 10_000_000}, "its content is too long"),
            (whole | {"version": b"x" * 10_000_000}, "its version is too long"),
            (whole | {"content": b"PK\x03\x04 and so on"}, "it is no archive of arrays"),
            (whole | {"content": pickled.getvalue()}, "it holds z_H, not"),
            (whole | {"content": good[:500] + good[400:]}, "it is no archive of arrays"),
        ):
            own.delete(key)
            own.hset(key, mapping=fields)
            sentence = refused(app, 409, session="a")
            assert sentence.startswith(f"session a cannot be read ({words}"), sentence
            assert refused(app, 409, session="a", inputs=[BOARD])
        own.delete(key)
        own.set(key, "text")
        assert refused(app, 409, session="a").startswith("session a cannot be read (it is a string)")
        own.delete(key)
        own.hset(key, mapping=whole | {"version": b"\xff\xfe"})
        assert app.post("/infer/L", json={"session": "a"}).status_code == 409, "no call can name such a version"
        assert update(app, "L", session="good")["updates"] == {"L": 2, "H": 0}
        assert "hrm_memory_up 1.0" in app.get("/metrics").text


def test_a_full_redis_is_told_of_once(
    model: TrainedModel, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although it answers what it is asked."""
    monkeypatch.setattr("hrm.service.memory.SECONDS_UNTIL_UP", 0.01)
    app, _ = app_of(model, place)
    with app:
        update(app, "L", session="a", inputs=[BOARD])
        direct(place).config_set("maxmemory", 1)
        try:
            for _ in range(3):
                response = app.post("/infer/L", json={"session": "a"})
                assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
                time.sleep(0.05)
        finally:
            direct(place).config_set("maxmemory", 0)
        assert update(app, "L", session="a")["updates"] == {"L": 2, "H": 0}
        assert "hrm_memory_up 1.0" in app.get("/metrics").text
    first, second = capfd.readouterr().err.splitlines()
    assert "does not work (command not allowed when used memory" in first
    assert second.endswith("works again.")


def test_a_redis_that_is_killed_is_told_of_once_and_comes_back(
    model: TrainedModel, running: tuple[servers.Server, str], place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server, _ = running
    app, _ = app_of(model, place)
    with app:
        update(app, "L", session="a", inputs=[BOARD])
        server.kill()
        try:
            for _ in range(2):
                response = app.post("/infer/L", json={"session": "a"})
                assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
                assert response.json() == {"error": "the working memory does not answer; come again later."}
            assert app.post("/infer", json={"inputs": [BOARD]}).status_code == 200
            assert app.get("/readyz").status_code == 200
            lines = app.get("/metrics").text.splitlines()
            assert {"hrm_memory_up 0.0", "hrm_memory_failures_total 2.0"} <= set(lines)
        finally:
            server.start()
        assert update(app, "L", session="a")["updates"] == {"L": 2, "H": 0}
        assert "hrm_memory_up 1.0" in app.get("/metrics").text
        server.kill()  # and where it was killed between two calls, nobody notices
        server.start()
        assert update(app, "L", session="a")["updates"] == {"L": 3, "H": 0}
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 2
    assert f"Redis at 127.0.0.1:{server.port} does not work (" in printed
    assert f"Redis at 127.0.0.1:{server.port} works again." in printed
    assert "s3cr" not in printed


def test_a_redis_that_hangs_holds_up_one_call(
    model: TrainedModel, place: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hrm.service.memory._SECONDS_FOR_REDIS", 0.2)
    monkeypatch.setattr("hrm.service.memory.SECONDS_UNTIL_UP", 60)
    app, _ = app_of(model, place)
    with app:
        update(app, "L", session="a", inputs=[BOARD])
        direct(place).client_pause(700)
        began = time.monotonic()
        assert app.post("/infer/L", json={"session": "a"}).status_code == 503
        assert time.monotonic() - began >= 0.2
        answers = [app.post("/infer/L", json={"session": "a"}).status_code for _ in range(20)]
        assert answers == [503] * 20
        assert "hrm_memory_failures_total 1.0" in app.get("/metrics").text, "these did not ask it"
    assert "does not work (Timeout reading from 127.0.0.1" in capfd.readouterr().err


def test_a_call_that_is_given_up_leaves_the_others_their_answers(model: TrainedModel, place: str) -> None:
    """Its connection, on which an answer may still come, is not used again."""
    app, _ = app_of(model, place, seconds_per_request=0.3)
    with app:
        update(app, "L", session="a", inputs=[BOARD], updates=5)
        update(app, "L", session="b", inputs=[BOARD])
        direct(place).client_pause(600)
        assert refused(app, 504, session="a") == "no answer within 0.3 s; ask for fewer updates."
        wait_for(lambda: app.post("/infer/L", json={"session": "b"}).status_code == 200)
        for count in range(6, 9):
            assert update(app, "L", session="a")["updates"] == {"L": count, "H": 0}


def test_a_redis_that_comes_back_is_noticed_without_a_request(
    model: TrainedModel, running: tuple[servers.Server, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hrm.service.memory.SECONDS_UNTIL_UP", 0.1)
    server, _ = running
    server.kill()
    try:
        app, _ = app_of(model, place)
        with app:
            lines = app.get("/metrics").text.splitlines()
            assert {"hrm_memory_up 0.0", "hrm_memory_failures_total 1.0"} <= set(lines), "it is asked at the start"
            server.start()
            wait_for(lambda: "hrm_memory_up 1.0" in app.get("/metrics").text)
    finally:
        server.start()


def test_a_service_starts_without_its_redis(model: TrainedModel, capfd: pytest.CaptureFixture[str]) -> None:
    app, _ = app_of(model, f"redis://:s3cret@127.0.0.1:{servers.free_port()}/0")
    with app:
        assert app.post("/infer", json={"inputs": [BOARD]}).status_code == 200
        assert "hrm_memory_up 0.0" in app.get("/metrics").text
    printed = capfd.readouterr().err
    assert len(printed.splitlines()) == 1
    assert "s3cr" not in printed


def test_a_wrong_password_is_told_of(
    model: TrainedModel, running: tuple[servers.Server, str], capfd: pytest.CaptureFixture[str]
) -> None:
    app, _ = app_of(model, f"redis://:wr0ng@127.0.0.1:{running[0].port}/0")
    with app:
        assert app.post("/infer/L", json={"inputs": [BOARD]}).status_code == 503
    printed = capfd.readouterr().err
    assert "invalid username-password pair" in printed
    assert "wr0ng" not in printed


def test_a_call_that_is_sent_again_counts_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client does when a connection ends before the answer comes: the version that it writes stays the same."""
    monkeypatch.setattr("hrm.service.memory.secrets.token_hex", lambda _: "new")

    async def check() -> None:
        memory = RedisMemory(place, Bounds("model", sessions=9, bytes_each=99, seconds=60))
        for _ in range(2):
            assert await memory.store("a", None, b"1")
        monkeypatch.setattr("hrm.service.memory.secrets.token_hex", lambda _: "newer")
        assert not await memory.store("a", None, b"2")
        for _ in range(2):
            assert await memory.store("a", "new", b"2")
        assert await memory.load("a") == ("newer", b"2")
        await memory.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    "rest", [f"//:{PASSWORD}@h:1", "//h:port", "//h?nothing=1", "//:s3cr@h?db=x", "//:s3cr#t@h", "//h/name", "//[::1"]
)
def test_what_is_no_url_is_told_of_without_it(rest: str) -> None:
    with pytest.raises(UserError) as caught:
        check_memory(f"redis:{rest}")
    assert str(caught.value).startswith("memory=redis://... is no URL of a Redis: give redis://USER:PASSWORD@HOST")
    assert "s3cr" not in str(caught.value)
    with pytest.raises(UserError, match=r"^memory is neither local nor redis://"):
        ServeConfig(checkpoint="none", memory=f"http:{rest}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.config.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"memory=redis://... needs redis: pip install 'hrm-torch\[serve\]'."):
        check_memory("redis://h")
