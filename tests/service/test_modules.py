"""Sessions, whose modules are updated one request at a time."""

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import hrm
from hrm.config import ServeConfig
from hrm.inference.model import TrainedModel
from hrm.models.transformer import TransformerConfig
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.service.memory import Bounds, LocalMemory
from hrm.service.sessions import SessionFormat, begun
from hrm.tasks.form import Puzzle, PuzzleForm
from tests.helpers.inference import tiny, untrained
from tests.helpers.service import client_of, held, refused, update, wait_for

FORM = PuzzleForm("sudoku", 16, 6)
BOARD, OTHER = "1.3..4.2.1..4..1", "..34.4...14.43.."
LARGE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    return tiny(tmp_path_factory.mktemp("model"), FORM, H_cycles=2, L_cycles=2, forward_dtype="bfloat16")


@pytest.fixture
def client(model: TrainedModel) -> Iterator[TestClient]:
    with client_of(model) as client:
        yield client


def arrays(state: str) -> dict[str, Any]:
    return dict(np.load(io.BytesIO(base64.b64decode(state))))


@pytest.mark.parametrize("bundled", [False, True], ids=["HRM", "one module for both levels"])
def test_updates_in_the_order_of_the_schedule_are_the_models_act_steps(model: TrainedModel, bundled: bool) -> None:
    """To the bit, although states travel through the working memory after every update."""
    board = LARGE if bundled else BOARD
    if bundled:
        model = hrm.from_pretrained("sudoku_small", device="cpu")
    steps = 1 if bundled else 2
    expected = model.predict([board], act_max_steps=steps, latents=True, halt=False)
    assert expected.latents is not None
    assert expected.q_halts is not None
    task, puzzle = model.task, model.task.puzzles_of(board, model.form)[0]
    schedule = [each.state.removeprefix("z_") for each in model.model.model.inner.plan.schedule]
    with client_of(model) as client:
        given: dict[str, Any] = {"inputs": [board]}
        for step in range(steps):
            for level in schedule:
                found = update(client, level, session="a", state=True, **given)
                given = {}
            assert found["updates"] == {level: (step + 1) * schedule.count(level) for level in ("L", "H")}
            kept = arrays(found["state"])
            for name, states in expected.latents.items():
                assert (kept[name] == states[0, step + 1]).all(), (step, name)
            answer = expected.trajectory[0, step]  # type: ignore[index]
            assert found["answers"] == [task.answer_value(answer, puzzle, model.form)]
            assert found["texts"] == [task.answer_text(answer, puzzle, model.form)]
            assert found["q_halt"] == [pytest.approx(expected.q_halts[0, step], abs=1e-7)]
        assert client.post("/infer", json={"inputs": [board], "act_max_steps": 1}).json()["answers"]


def test_one_call_may_make_several_updates(model: TrainedModel, client: TestClient) -> None:
    at_once = update(client, "L", session="a", inputs=[BOARD], updates=3, state=True)
    for number in range(3):
        single = update(client, "L", session="b", state=True, **({} if number else {"inputs": [BOARD]}))
    assert (single["updates"], single["state"]) == (at_once["updates"], at_once["state"])
    assert single["updates"] == {"L": 3, "H": 0}
    before = arrays(single["state"])
    after = update(client, "H", session="b", state=True)
    assert (arrays(after["state"])["z_L"] == before["z_L"]).all()
    assert (arrays(after["state"])["z_H"] != before["z_H"]).any()
    assert before["inputs"].tolist() == model.task.puzzles_of(BOARD, model.form)[0].tokens.tolist()
    assert "state" not in update(client, "L", session="b")


def test_a_session_without_a_name_gets_one(client: TestClient) -> None:
    names = {update(client, "L", inputs=[BOARD])["session"] for _ in range(2)}
    assert len(names) == 2
    assert all(update(client, "H", session=name)["updates"] == {"L": 1, "H": 1} for name in names)


@pytest.mark.parametrize(
    ("status", "request_", "words"),
    [
        (422, {}, "session is missing: name one, or give the inputs to begin one."),
        (422, {"session": "a", "inputs": ["12"]}, "input 0: No Sudoku board has 2 cells"),
        (422, {"session": "a", "inputs": [BOARD, OTHER]}, "inputs: 2 puzzles are given, and a session has one."),
        (422, {"session": "a", "inputs": []}, "inputs: 0 puzzles are given"),
        (422, {"session": "a", "inputs": [BOARD], "updates": 0}, "updates: Input should be greater than or equal to 1"),
        (
            422,
            {"session": "a", "inputs": [BOARD], "updates": 257},
            "updates: 257 are asked for, and this service makes",
        ),
        (422, {"session": "a b", "inputs": [BOARD]}, "session: String should match pattern"),
        (422, {"session": "a" * 101, "inputs": [BOARD]}, "session: String should match pattern"),
        (422, {"session": "a", "steps": 3}, "steps: Extra inputs are not permitted"),
        (404, {"session": "a"}, "there is no session a: it was not begun, was not used for 3600 s, or made room"),
        (409, {"session": "there", "inputs": [OTHER]}, "session there is there already: leave out the inputs"),
    ],
)
def test_what_is_wrong_is_named(client: TestClient, status: int, request_: Any, words: str) -> None:
    update(client, "L", session="there", inputs=[BOARD])
    assert refused(client, status, **request_).startswith(words)
    assert update(client, "L", session="there")["updates"] == {"L": 2, "H": 0}


def test_a_model_without_levels_says_so(tmp_path: Path) -> None:
    config = TransformerConfig(hidden_size=16, num_heads=2, num_layers=1, forward_dtype="float32")
    model = hrm.from_pretrained(untrained(tmp_path, FORM, config), device="cpu")
    with client_of(model) as client:
        for level in ("L", "H"):
            sentence = refused(client, 422, level, inputs=[BOARD])
            assert sentence == "transformer has no levels to update apart: POST /infer answers its puzzles."
        assert client.post("/infer", json={"inputs": [BOARD]}).status_code == 200


def test_of_calls_that_overlap_one_counts(model: TrainedModel) -> None:
    engine = Engine(model, 4)
    with TestClient(make_app(engine, ServeConfig(checkpoint="none"), "small")) as client:
        update(client, "L", session="a", inputs=[BOARD])
        with held(engine) as event, ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(client.post, "/infer/L", json={"session": "a"}) for _ in range(2)]
            wait_for(lambda: len(engine._besides) == 2)
            event.set()
            answers = sorted((call.result(60) for call in calls), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [200, 409]
        assert answers[1].json()["error"].startswith("session a was changed by another call meanwhile")
        assert answers[0].json()["updates"] == {"L": 2, "H": 0}
        assert update(client, "L", session="a")["updates"] == {"L": 3, "H": 0}


def test_a_call_has_its_time_and_leaves_the_session_as_it_was(model: TrainedModel) -> None:
    engine = Engine(model, 4)
    with TestClient(make_app(engine, ServeConfig(checkpoint="none", seconds_per_request=0.2), "small")) as client:
        update(client, "L", session="a", inputs=[BOARD])
        with held(engine):
            assert refused(client, 504, session="a") == "no answer within 0.2 s; ask for fewer updates."
        wait_for(lambda: not engine._besides)
        assert update(client, "L", session="a")["updates"] == {"L": 2, "H": 0}


def test_more_calls_than_can_wait_are_refused(model: TrainedModel) -> None:
    engine = Engine(model, 4)
    with (
        TestClient(make_app(engine, ServeConfig(checkpoint="none", most_waiting=1), "small")) as client,
        ThreadPoolExecutor(1) as pool,
        held(engine) as event,
    ):
        first = pool.submit(update, client, "L", inputs=[BOARD])
        wait_for(lambda: len(engine._besides) == 1)
        response = client.post("/infer/L", json={"inputs": [BOARD]})
        assert (response.status_code, response.headers["Retry-After"]) == (429, "1")
        event.set()
        assert first.result(60)["updates"] == {"L": 1, "H": 0}


def test_puzzles_and_sessions_share_the_engine(model: TrainedModel) -> None:
    expected = model.predict([BOARD, OTHER])
    with client_of(model) as client, ThreadPoolExecutor(4) as pool:
        puzzles = [pool.submit(client.post, "/infer", json={"inputs": [BOARD, OTHER]}) for _ in range(8)]
        sessions = [pool.submit(update, client, "L", inputs=[BOARD], updates=20, state=True) for _ in range(8)]
        alone = update(client, "L", session="alone", inputs=[BOARD], updates=20, state=True)
        assert all(call.result(60).json()["answers"] == expected.values for call in puzzles)
        assert {call.result(60)["state"] for call in sessions} == {alone["state"]}
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'hrm_module_updates_total{level="L"} 180.0',
        'hrm_module_updates_total{level="H"} 0.0',
        'hrm_requests_total{path="/infer/L",status="200"} 9.0',
        "hrm_memory_up 1.0",
        "hrm_sessions 9.0",
        "hrm_memory_failures_total 0.0",
    ):
        assert line in lines


def test_little_room_forgets_what_was_not_used_for_longest(model: TrainedModel) -> None:
    with client_of(model, most_sessions=2) as client:
        for name in ("a", "b"):
            update(client, "L", session=name, inputs=[BOARD])
        update(client, "L", session="a")
        update(client, "L", session="c", inputs=[BOARD])
        assert refused(client, 404, session="b").startswith("there is no session b")
        assert update(client, "L", session="a")["updates"] == {"L": 3, "H": 0}
    with client_of(model, most_session_bytes=1) as client:  # room for one at least
        update(client, "L", session="a", inputs=[BOARD])
        update(client, "L", session="b", inputs=[BOARD])
        assert refused(client, 404, session="a").startswith("there is no session a")


def test_it_says_how_to_ask(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    schema = described["components"]["schemas"]["UpdateRequest"]
    assert [set(example) for example in schema["examples"]] == [
        {"session", "inputs", "updates"},
        {"session", "updates", "state"},
    ]
    for level in ("L", "H"):
        assert set(described["paths"][f"/infer/{level}"]["post"]["responses"]) >= {"200", "404", "409", "422", "503"}
    shown = described["components"]["schemas"]["UpdateResponse"]["examples"][0]
    given = update(client, "L", inputs=[BOARD], state=True)
    assert given.keys() - shown.keys() == {"state"}


# ---- local working memory


def test_local_sessions_expire() -> None:
    async def check() -> None:
        now = 0.0
        memory = LocalMemory(Bounds("model", sessions=9, bytes_each=9, seconds=10), clock=lambda: now)
        assert await memory.store("a", None, b"1")
        now = 6
        assert await memory.store("b", None, b"1")
        first = await memory.load("a")
        assert first is not None
        assert await memory.store("a", first.version, b"2"), "used: it is kept for as long again"
        assert not await memory.store("a", first.version, b"3"), "that version is no longer there"
        assert not await memory.store("a", None, b"3"), "there is one"
        assert not await memory.store("x", first.version, b"3"), "there is none"
        now = 15.9
        assert [await memory.load(name) is None for name in ("a", "b")] == [False, False]
        now = 16
        assert [await memory.load(name) is None for name in ("a", "b")] == [True, True]

    asyncio.run(check())


# ---- sessions as bytes


def test_archives_of_others_are_refused(model: TrainedModel) -> None:
    format_ = SessionFormat(model)
    session = begun(model, Puzzle(model.task.puzzles_of(BOARD, model.form)[0].tokens))
    content = format_.pack(session)
    assert format_.unpack(content).puzzle.tokens.tolist() == session.puzzle.tokens.tolist()
    kept = dict(np.load(io.BytesIO(content)))

    def forged(**changed: Any) -> bytes:
        file = io.BytesIO()
        np.savez(file, **(kept | changed))
        return file.getvalue()

    def packed() -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, **kept)
        return file.getvalue()

    state = kept["z_H"]
    for wrong, words in (
        (content + b"x" * format_.most_bytes, "a session has at most"),
        (content[:-30], "it is no archive of arrays"),
        (b"", "it is no archive of arrays"),
        (packed(), "its z_H is compressed"),
        (forged(z_H=state.astype(np.float64)), "its z_H is float64"),
        (forged(z_H=state[:-1]), "its z_H is float32"),
        (forged(z_H=state.T.copy().T), "its z_H is float32"),
        (forged(updates=np.array([1], dtype=np.int64)), "its updates is int64"),
        (forged(z_H=np.array([print], dtype=object)), "its z_H is object"),
        (forged(more=np.zeros(1)), "it holds inputs, more"),
        (forged(inputs=kept["inputs"] + 100), "its puzzle is none"),
        (forged(inputs=kept["inputs"] - 100), "its puzzle is none"),
        (forged(puzzle_identifier=np.int32(7)), "its puzzle_identifier is 7"),
        (forged(updates=np.array([-1, 0])), "its updates are"),
        (forged(updates=np.array([2**63 - 1, 0])), "its updates are"),
    ):
        with pytest.raises(ValueError, match=words):
            format_.unpack(wrong)


def test_models_differ_by_weights_and_by_dtype(model: TrainedModel, tmp_path: Path) -> None:
    folder = model.checkpoint.folder
    same, wider = (hrm.from_pretrained(folder, device="cpu", dtype=dtype) for dtype in ("auto", "float32"))
    other = tiny(tmp_path, FORM, H_cycles=2, L_cycles=2, forward_dtype="bfloat16", L_layers=2)
    hashes = [SessionFormat(each).model_hash for each in (model, same, wider, other)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
