"""From what a request holds to answers: inputs are read and checked, given to the engine, and written as JSON."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hrm.inference.inputs import in_chunks
from hrm.inference.predictor import vote_of
from hrm.service.engine import Engine, Step
from hrm.tasks.base import PuzzleSize, Rules
from hrm.tasks.form import Puzzle

_WRITTEN_AT_ONCE = 16  # answers, before others get their turn in the event loop


@dataclass(frozen=True)
class Answer:
    """What a service gives for one puzzle."""

    value: Any  # as JSON would have it
    text: str  # on one line
    q_halt: float  # the probability that it is right, as the model estimates it
    steps: int  # ACT steps, over all augmentations
    puzzle: Puzzle
    given: Sequence[Step]  # after every ACT step where that is asked for, else the last
    trajectory: list[dict[str, Any]] | None = None  # value, q_halt and how it keeps the rules, after every ACT step

    def tokens(self) -> dict[str, Any]:
        """The puzzle and what was answered to it, as the model's own tokens."""
        return {"input": self.puzzle.tokens.tolist(), "answers": [step.tokens.tolist() for step in self.given]}


def read_inputs(inputs: Sequence[Any], engine: Engine) -> tuple[list[Puzzle], list[int]]:
    """The puzzles of a request, and which input each is of.

    Raises:
        UserError: an input is no puzzle; the sentence begins with its number.
    """
    return next(in_chunks(inputs, sys.maxsize, engine.model.task, engine.model.form), ([], []))


async def answer(
    puzzles: Sequence[Puzzle],
    engine: Engine,
    max_steps: int | None,
    *,
    augmentations: int = 1,
    trajectory: bool = False,
    request: object = None,
) -> list[Answer]:
    """Answer puzzles, as `TrainedModel.predict` does on a CPU: augmentations are tried one after the other.

    Args:
        request: what the puzzles are of, as for `Engine.submit`.

    Raises:
        UserError: the task has fewer augmentations.
        Closed: the engine takes no more.
    """
    if augmentations > 1:
        return await _all(_of_several(puzzle, engine, max_steps, augmentations, request) for puzzle in puzzles)
    answers = []
    all_solved = await engine.ask(puzzles, max_steps, keeps_steps=trajectory, request=request)
    for number, (puzzle, solved) in enumerate(zip(puzzles, all_solved, strict=True), start=1):
        if trajectory:  # in a thread: there is much to write, and rules to check
            written = await asyncio.to_thread(_written, engine, puzzle, solved.last, solved.steps, solved.trajectory)
        else:
            written = _written(engine, puzzle, solved.last, solved.steps)
        answers.append(written)
        if number % _WRITTEN_AT_ONCE == 0:
            await asyncio.sleep(0)
    return answers


async def _all(works: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """What all of them answer; none goes on after this."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _of_several(
    puzzle: Puzzle, engine: Engine, max_steps: int | None, augmentations: int, request: object
) -> Answer:
    """The first of the augmentations' answers that keeps the task's rules, else the vote of all."""
    task, form = engine.model.task, engine.model.form
    # In threads, here and below: those of many puzzles would hold up the event loop.
    copies = await asyncio.to_thread(task.augmented, puzzle, augmentations, form)
    rules = _rules(engine)
    given: list[Step] = []
    steps = 0
    # Where nothing tells a right answer all are wanted, so they are asked for at once.
    for turn in [[each] for each in copies] if rules else [copies]:
        all_solved = await engine.ask([copy for copy, _ in turn], max_steps, request=request)
        for (_, undo), solved in zip(turn, all_solved, strict=True):
            given.append(Step(undo(solved.last.tokens).astype(np.int64), solved.last.q_halt))
            steps += solved.steps
        if rules and rules.keeps(puzzle.tokens[None], given[-1].tokens[None])[0]:
            return _written(engine, puzzle, given[-1], steps)
    voted = await asyncio.to_thread(vote_of, [(step.tokens, step.q_halt) for step in given])
    return _written(engine, puzzle, Step(*voted), steps)


def places(engine: Engine, augmentations: int) -> int:
    """Slots, or places in line for them, that a puzzle takes at once."""
    return 1 if _rules(engine) else augmentations


def _rules(engine: Engine) -> Rules | None:
    form = engine.model.form
    return engine.model.task.rules(PuzzleSize(form.seq_len, form.vocab_size))


def _written(
    engine: Engine, puzzle: Puzzle, last: Step, steps: int, trajectory: Sequence[Step] | None = None
) -> Answer:
    task, form = engine.model.task, engine.model.form
    return Answer(
        task.answer_value(last.tokens, puzzle, form),
        task.answer_text(last.tokens, puzzle, form),
        probability(last.q_halt),
        steps,
        puzzle,
        trajectory or [last],
        None if trajectory is None else _described(engine, puzzle, trajectory),
    )


def _described(engine: Engine, puzzle: Puzzle, trajectory: Sequence[Step]) -> list[dict[str, Any]]:
    """What there is to say of every ACT step."""
    task, form, rules = engine.model.task, engine.model.form, _rules(engine)
    shown: list[dict[str, Any]] = [
        {"answer": task.answer_value(step.tokens, puzzle, form), "q_halt": probability(step.q_halt)}
        for step in trajectory
    ]
    if rules is not None:
        answers = np.stack([step.tokens for step in trajectory])
        inputs = np.broadcast_to(puzzle.tokens, answers.shape)
        for step, keeps in zip(shown, rules.keeps(inputs, answers).tolist(), strict=True):
            step["keeps_rules"] = keeps
        if rules.broken_at is not None:
            for step, broken in zip(shown, rules.broken_at(inputs, answers), strict=True):
                step["broken"] = np.flatnonzero(broken).tolist()
    return shown


def probability(logit: float) -> float:
    """The sigmoid of a logit, 0 for what is no number: JSON has none for that."""
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
