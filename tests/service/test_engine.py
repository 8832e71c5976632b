"""The engine: slots that are refilled while puzzles of several callers are computed."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import hrm
from hrm.inference.model import TrainedModel
from hrm.service import engine as engine_module
from hrm.service import slots as slots_module
from hrm.service.engine import Closed, Engine, Solved
from hrm.service.slots import Found, Slots
from hrm.tasks.form import Puzzle, PuzzleForm
from tests.helpers.inference import untrained_halting_apart
from tests.helpers.service import held

FORM = PuzzleForm("sudoku", 16, 6)
BOARDS = np.random.default_rng(0).integers(1, 6, (20, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Untrained; its sequences halt after different steps."""
    folder = untrained_halting_apart(tmp_path_factory.mktemp("model"), FORM, BOARDS, halt_max_steps=5)
    return hrm.from_pretrained(folder, device="cpu")


def puzzles() -> list[Puzzle]:
    return [Puzzle(board) for board in BOARDS]


class _AsLateAsCanBe(Slots):
    """A device that computes a step when it is read: the host has written what is for later steps by then."""

    def __init__(self, model: TrainedModel, count: int) -> None:
        super().__init__(model, count)
        self.reads_later = True
        self._put_then: deque[int] = deque()  # when a step was launched

    @property
    def launched(self) -> int:
        return len(self._put_then)

    def launch(self) -> None:
        self._put_then.append(self._put)

    def read(self) -> Found:
        now, self._put = self._put, self._put_then.popleft()
        super().launch()
        self._put = now
        return super().read()


@pytest.fixture(params=["slots in use", "all slots", "all slots, late"])
def as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Engines work as on a CPU, as where code is compiled, for batches of one size, and as on a GPU."""
    name: str = request.param
    if name != "slots in use":
        monkeypatch.setattr(slots_module, "is_one_shape", lambda *_: True)
    if name == "all slots, late":
        monkeypatch.setattr(engine_module, "Slots", _AsLateAsCanBe)
    return name


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize("slots", [1, 3, 32])
def test_answers_are_those_of_predict(model: TrainedModel, slots: int) -> None:
    expected = model.predict(BOARDS, tokens=True)
    assert len(set(expected.steps)) > 1, "the weights make sequences halt at different steps"
    engine = Engine(model, slots)
    futures: dict[int, Any] = {}

    def ask(part: int) -> None:
        for number in range(part, len(BOARDS), 4):
            futures[number] = engine.submit(puzzles()[number])

    threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, future in futures.items():
        solved = future.result(60)
        assert (solved.last.tokens == expected.answers[number]).all()
        assert solved.steps == expected.steps[number]
        assert 1 / (1 + np.exp(-solved.last.q_halt)) == pytest.approx(expected.q_halt[number], abs=1e-6)
        assert solved.trajectory == []
    work = engine.work
    assert (work.answered, work.act_steps) == (20, expected.steps.sum())
    assert (work.in_slots, work.waiting) == (0, 0)
    engine.close()


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize("slots", [3, 32])
def test_event_loops_are_woken_once_for_all_that_a_step_answers(
    model: TrainedModel, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.predict(BOARDS, tokens=True)
    engine = Engine(model, slots)
    steps = woken = 0
    advance, give_all = Engine._advance, engine_module._give_all

    def counted(self: Engine) -> None:
        nonlocal steps
        steps += 1
        advance(self)

    def counted_too(outcomes: Any) -> None:
        nonlocal woken
        woken += 1
        give_all(outcomes)

    monkeypatch.setattr(Engine, "_advance", counted)
    monkeypatch.setattr(engine_module, "_give_all", counted_too)

    async def ask() -> list[Solved]:
        parts = [engine.ask(puzzles()[part::4]) for part in range(4)]
        return [solved for part in parts for solved in await part]

    solved = asyncio.run(ask())
    order = [number for part in range(4) for number in range(part, len(BOARDS), 4)]
    for number, each in zip(order, solved, strict=True):
        assert (each.last.tokens == expected.answers[number]).all()
    assert [each.steps for each in solved] == expected.steps[order].tolist()
    assert woken <= steps
    engine.close()
    assert engine.work.answered == len(BOARDS)


def test_what_an_event_loop_does_not_wait_for_gives_up_its_place(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, 1)
    hold = threading.Event()
    advance = Engine._advance

    def slow(self: Engine) -> None:
        hold.wait(60)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", slow)

    async def ask() -> Solved:
        given_up = engine.ask(puzzles()[:2])
        last = engine.ask(puzzles()[2:3])
        given_up.cancel()
        await asyncio.sleep(0)
        assert engine.work.waiting <= 1
        hold.set()
        (solved,) = await last
        return solved

    expected = model.predict(BOARDS[2:3], tokens=True)
    assert (asyncio.run(ask()).last.tokens == expected.answers[0]).all()
    assert engine.work.answered == 1

    async def ask_nothing() -> list[Solved]:
        return await engine.ask([])

    assert asyncio.run(ask_nothing()) == []

    async def leave() -> None:  # the loop ends before the answer is there
        engine.ask(puzzles()[:1])

    asyncio.run(leave())
    assert (engine.submit(puzzles()[2]).result(60).last.tokens == expected.answers[0]).all()
    engine.close()
    assert engine.failure is None


@pytest.mark.usefixtures("as_on")
@pytest.mark.parametrize("slots", [2, 7])
def test_answers_stay_right_while_others_are_given_up(model: TrainedModel, slots: int) -> None:
    expected = model.predict(BOARDS, tokens=True)
    engine, generator = Engine(model, slots), np.random.default_rng(slots)

    async def client() -> int:
        """How many puzzles were answered, of requests of which every third is given up sooner or later."""
        answered = 0
        for _ in range(12):
            numbers = generator.integers(0, len(BOARDS), generator.integers(1, 6))
            asked = engine.ask([puzzles()[number] for number in numbers])
            if generator.random() < 1 / 3:
                await asyncio.sleep(generator.random() * 0.01)
                asked.cancel()
                continue
            for number, solved in zip(numbers, await asked, strict=True):
                assert (solved.last.tokens == expected.answers[number]).all()
                assert solved.steps == expected.steps[number]
                answered += 1
        return answered

    async def clients() -> int:
        return sum(await asyncio.gather(*(client() for _ in range(8))))

    answered = asyncio.run(clients())
    engine.close()
    assert engine.failure is None
    work = engine.work
    assert (work.in_slots, work.waiting) == (0, 0)
    assert answered <= work.answered < 8 * 12 * 5


def test_the_device_is_ahead_of_the_host_only_where_puzzles_wait(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch, as_on: str
) -> None:
    engine = Engine(model, 4)
    launch = engine._slots.launch
    unread: list[int] = []

    def noted() -> None:
        unread.append(engine._slots.launched)
        launch()

    monkeypatch.setattr(engine._slots, "launch", noted)

    async def ask(count: int) -> None:
        unread.clear()
        await engine.ask(puzzles()[:count])

    asyncio.run(ask(4))
    assert set(unread) == {0}, "one more step would only delay those that come meanwhile"
    asyncio.run(ask(20))
    assert set(unread) == ({0, 1} if as_on == "all slots, late" else {0})
    engine.close()


@pytest.mark.usefixtures("as_on")
def test_every_step_is_kept_where_it_is_asked_for(model: TrainedModel) -> None:
    expected = model.predict(BOARDS, tokens=True, trajectory=True, act_max_steps=4)
    assert expected.trajectory is not None
    engine = Engine(model, 4)
    futures = [engine.submit(puzzle, 4, keeps_steps=True) for puzzle in puzzles()]
    for number, future in enumerate(futures):
        solved = future.result(60)
        assert len(solved.trajectory) == solved.steps
        for step, kept in enumerate(solved.trajectory):
            assert (kept.tokens == expected.trajectory[number, step]).all()
    engine.close()


def test_what_nobody_waits_for_gives_up_its_place(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = model.predict(BOARDS, tokens=True)
    long, other, short = np.argsort(expected.steps)[[-1, -2, 0]]
    assert expected.steps[long] > 1
    engine = Engine(model, 1)
    hold, entered = threading.Event(), threading.Event()
    advance = Engine._advance

    def slow(self: Engine) -> None:
        entered.set()
        hold.wait(60)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", slow)
    in_slot, in_line, last = (engine.submit(puzzles()[number]) for number in (long, other, short))
    assert entered.wait(60)
    assert engine.work.in_slots == 1
    assert engine.work.waiting == 2
    assert in_slot.cancel()
    assert in_line.cancel()
    assert engine.work.waiting == 1, "what is taken out of the line takes no memory until its turn comes"
    hold.set()
    assert (last.result(60).last.tokens == expected.answers[short]).all()
    with pytest.raises(CancelledError):
        in_line.result()
    assert engine.work.answered == 1
    assert engine.work.act_steps == 1 + expected.steps[short], "it leaves its slot after the step that was held"
    engine.close()


def test_requests_take_turns(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two requests that wait, the second and small one does not wait for all of the first."""
    engine = Engine(model, 1)
    hold = threading.Event()
    advance = Engine._advance

    def slow(self: Engine) -> None:
        hold.wait(60)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", slow)
    order: list[str] = []

    def note(request: str, _: object) -> None:
        order.append(request)

    for request, numbers in (("large", range(6)), ("small", range(6, 8))):
        for number in numbers:
            future = engine.submit(puzzles()[number], request=request)
            future.add_done_callback(partial(note, request))
    hold.set()
    engine.close()
    # The first was in its slot, or not yet, when the second request came.
    assert order in (
        ["large", "large", "small", "large", "small", *["large"] * 3],
        ["large", "small", "large", "small", *["large"] * 4],
    )


@pytest.mark.usefixtures("as_on")
def test_it_answers_all_before_it_ends(model: TrainedModel) -> None:
    engine = Engine(model, 2)
    futures = [engine.submit(puzzle) for puzzle in puzzles()]
    engine.close()
    assert all(future.done() for future in futures)
    with pytest.raises(Closed, match="the service is ending"):
        engine.submit(puzzles()[0])
    assert engine.failure is None


def test_a_failure_reaches_all_who_wait(
    model: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, other = Engine(model, 2), Engine(model, 2)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._slots, "launch", broken)
    monkeypatch.setattr(other._slots, "launch", broken)
    futures = [engine.submit(puzzle) for puzzle in puzzles()[:5]]
    for future in futures:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    engine.close()
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert isinstance(engine.failure, RuntimeError)
    with pytest.raises(Closed, match="the model cannot compute any more"):
        engine.submit(puzzles()[0])

    async def ask() -> list[object]:
        return await asyncio.gather(*(other.ask([puzzle]) for puzzle in puzzles()[:5]), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["out of memory"] * 5
    with pytest.raises(Closed, match="the model cannot compute any more"):
        asyncio.run(ask())


# ---- other work with the model


def pieces(done: list[str], name: str, count: int) -> Generator[None, None, str]:
    for _ in range(count):
        done.append(name)
        yield
    return name


def test_other_work_is_done_in_pieces_between_act_steps(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    advance = Engine._advance

    def noted(self: Engine) -> None:
        done.append("ACT step")
        advance(self)

    monkeypatch.setattr(Engine, "_advance", noted)
    monkeypatch.setattr("hrm.service.engine.time.perf_counter", lambda: 0.0)  # no time passes: a piece a step
    engine = Engine(model, 1)
    with held(engine) as event:
        puzzle = engine.submit(puzzles()[0], 3)
        works = [engine.run(pieces(done, name, 3)) for name in ("a", "b")]
        event.set()
    assert [work.result(60) for work in works] == ["a", "b"]
    steps = puzzle.result(60).steps
    assert done[: 2 * steps] == ["ACT step", "a", "ACT step", "b", "ACT step", "a"][: 2 * steps]
    assert [name for name in done if name != "ACT step"] == ["a", "b"] * 3
    engine.close()


def test_other_work_gets_as_much_time_as_puzzles(model: TrainedModel) -> None:
    engine, done = Engine(model, 1), list[str]()
    engine.run(pieces(done, "a", 1000))
    until = time.monotonic() + 30
    while len(done) < 1000:
        engine.submit(puzzles()[0], 1).result(60)
        assert time.monotonic() < until
    engine.close()
    # A piece takes a small part of an ACT step here.
    assert engine.work.answered < 500


def test_other_work_that_fails_or_that_nobody_waits_for_ends_alone(model: TrainedModel) -> None:
    engine, done = Engine(model, 1), list[str]()

    def failing() -> Generator[None, None, None]:
        yield
        raise RuntimeError("out of memory")

    with held(engine) as event:
        failed, given_up, last = engine.run(failing()), engine.run(pieces(done, "a", 3)), engine.run(pieces([], "b", 3))
        given_up.cancel()
        event.set()
        with pytest.raises(RuntimeError, match="out of memory"):
            failed.result(60)
    assert (last.result(60), done) == ("b", [])
    assert engine.failure is None
    assert engine.submit(puzzles()[0]).result(60).steps
    last = engine.run(pieces(done, "a", 3))
    engine.close()
    assert (last.result(0), done) == ("a", ["a"] * 3), "it does all before it ends"
    with pytest.raises(Closed, match="the service is ending"):
        engine.run(pieces(done, "a", 1))


def test_a_failure_reaches_other_work(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, 1)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._slots, "launch", broken)
    with held(engine) as event:
        engine.submit(puzzles()[0])
        work = engine.run(pieces([], "a", 10**9))
        event.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        work.result(60)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_recorded_steps_answer_as_predict_does(tmp_path: Any) -> None:
    model = hrm.from_pretrained(untrained_halting_apart(tmp_path, FORM, BOARDS, halt_max_steps=5), device="cuda")
    expected = model.predict(BOARDS, tokens=True)
    engine = Engine(model, 8)
    engine.warm_up()
    futures = [engine.submit(puzzle) for _ in range(10) for puzzle in puzzles()]
    for future in futures[2::3]:
        future.cancel()
    for number, future in enumerate(futures):
        if not future.cancelled():
            solved = future.result(120)
            assert solved.steps == expected.steps[number % len(BOARDS)]
            assert (solved.last.tokens == expected.answers[number % len(BOARDS)]).all()
    engine.close()
    assert (engine.failure, engine.work.in_slots) == (None, 0)
