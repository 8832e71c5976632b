"""The engine: slots that are refilled while puzzles of several callers are computed."""

import threading
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import hrm
from hrm.inference.model import TrainedModel
from hrm.service.engine import Closed, Engine
from hrm.tasks.form import Puzzle, PuzzleForm
from tests.helpers.inference import untrained_halting_apart

FORM = PuzzleForm("sudoku", 16, 6)
BOARDS = np.random.default_rng(0).integers(1, 6, (20, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Untrained; its sequences halt after different steps."""
    folder = untrained_halting_apart(tmp_path_factory.mktemp("model"), FORM, BOARDS, halt_max_steps=5)
    return hrm.from_pretrained(folder, device="cpu")


def puzzles() -> list[Puzzle]:
    return [Puzzle(board) for board in BOARDS]


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
    engine = Engine(model, 1)
    hold, entered = threading.Event(), threading.Event()
    advance = Engine._advance

    def slow(self: Engine) -> None:
        entered.set()
        hold.wait(60)
        advance(self)

    monkeypatch.setattr(Engine, "_advance", slow)
    in_slot, in_line, last = (engine.submit(puzzle) for puzzle in puzzles()[:3])
    assert entered.wait(60)
    assert engine.work.in_slots == 1
    assert engine.work.waiting == 2
    assert in_slot.cancel()
    assert in_line.cancel()
    assert engine.work.waiting == 1, "what is taken out of the line takes no memory until its turn comes"
    hold.set()
    expected = model.predict(BOARDS[2:3], tokens=True)
    assert (last.result(60).last.tokens == expected.answers[0]).all()
    with pytest.raises(CancelledError):
        in_line.result()
    assert engine.work.answered == 1
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


def test_it_answers_all_before_it_ends(model: TrainedModel) -> None:
    engine = Engine(model, 2)
    futures = [engine.submit(puzzle) for puzzle in puzzles()]
    engine.close()
    assert all(future.done() for future in futures)
    with pytest.raises(Closed, match="the service is ending"):
        engine.submit(puzzles()[0])
    assert engine.failure is None


def test_a_failure_reaches_all_who_wait(model: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, 2)

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_computed", broken)
    futures = [engine.submit(puzzle) for puzzle in puzzles()[:5]]
    for future in futures:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(60)
    assert isinstance(engine.failure, RuntimeError)
    with pytest.raises(Closed, match="the model cannot compute any more"):
        engine.submit(puzzles()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_recorded_steps_answer_as_predict_does(tmp_path: Any) -> None:
    model = hrm.from_pretrained(untrained_halting_apart(tmp_path, FORM, BOARDS, halt_max_steps=5), device="cuda")
    expected = model.predict(BOARDS, tokens=True)
    engine = Engine(model, 8)
    engine.warm_up()
    for number, future in enumerate([engine.submit(puzzle) for puzzle in puzzles()]):
        solved = future.result(120)
        assert solved.steps == expected.steps[number]
        assert (torch.from_numpy(solved.last.tokens) == torch.from_numpy(expected.answers[number])).all()
    engine.close()
