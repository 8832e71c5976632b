"""ARC scores: what is answered to all augmentations of a test input is undone and put to the vote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import Pack, read_identifiers
from hrm.errors import UserError
from hrm.reading import read_json
from hrm.tasks.arc import SEQ_LEN, VOCAB_SIZE, ArcTask, Augmentation, Grid, Pair, decode, split_name
from hrm.tasks.base import Evaluator, Tokens
from hrm.writing import new_file

PASS_AT = (1, 2, 5, 10, 100, 1000)

# Votes count sigmoid(q_halt) in these units: whole numbers add up to the same in any order, on any number of ranks.
_HALT_UNITS = 1 << 40

Question = tuple[str, bytes]
"""A task's name and the key of a test input."""

Tally = tuple[int, int, int]
"""Of an answer: its votes, their sum of sigmoid(q_halt) in units of 2^-40, and the first puzzle that has it."""

Votes = dict[Question, dict[bytes, Tally]]
"""By question and key of the answer. Pickles compactly."""


@dataclass(frozen=True)
class Answer:
    """A grid that was answered to a test input, augmentations undone."""

    grid: Grid
    votes: int
    q_halt: float  # mean sigmoid(q_halt) of the votes


@dataclass(frozen=True)
class ArcResult:
    """How many tasks are solved with K answers allowed, counted in two ways, and what to submit.

    `pass_at[K]` is the share of tasks with the truths of all test inputs among the first K answers, the paper's figure.
    `share_at[K]` is the mean over tasks of the share of their test inputs of which this is true, TRM's figure; it is
    the larger one where tasks have several test inputs. Both are over the `scored` tasks and test inputs, whose truths
    are known, and empty where there are none. `submission` holds the first two answers to every test input, known or
    not, as the competition wants them in submission.json.
    """

    scored: tuple[int, int]  # tasks, and their test inputs
    pass_at: dict[int, float]
    share_at: dict[int, float]
    submission: dict[str, list[dict[str, list[list[int]]]]]


class ArcScorer:
    """Collects the answers to an ARC pack's test split, in any order and any parts, and scores them.

    Ranks score their own answers; `merge` adds the votes of the others.

    Args:
        pack: the test split, built by this or the published builder. Its examples that are not augmented are the truth,
            as far as they have labels.

    Raises:
        UserError: the pack holds no ARC tasks, or its identifiers.json does not fit.
    """

    def __init__(self, pack: Pack) -> None:
        meta = pack.metadata
        if (meta.seq_len, meta.vocab_size) != (SEQ_LEN, VOCAB_SIZE):
            raise UserError(
                f"{pack.path} is no ARC pack: it has {meta.seq_len} cells and {meta.vocab_size} tokens, not {SEQ_LEN} "
                f"and {VOCAB_SIZE}; correct data_path."
            )
        self._path = pack.path
        self._blank = meta.blank_identifier_id
        self._names = read_identifiers(pack.path, meta.num_puzzle_identifiers)
        self.tests: dict[str, list[Pair]] = {}
        self._order: dict[int, int] = {}  # of identifiers among the puzzles of the split
        for data in pack.sets.values():
            for puzzle, identifier in enumerate(data.puzzle_identifiers.tolist()):
                name = self._names[identifier]
                self._order.setdefault(identifier, len(self._order))
                if self._split_name(name)[0] == name:
                    rows = slice(data.puzzle_indices[puzzle], data.puzzle_indices[puzzle + 1])
                    self.tests[name] = [*map(Pair, decode(data.inputs[rows]), decode(data.labels[rows]))]
        self.votes: Votes = {(task, _key(pair.input)): {} for task, pairs in self.tests.items() for pair in pairs}

    def add(
        self,
        puzzle_identifiers: NDArray[np.integer[Any]],
        inputs: NDArray[np.integer[Any]],
        predictions: NDArray[np.integer[Any]],
        q_halt: NDArray[np.floating[Any]],
    ) -> None:
        """Count a batch of answers; padding (the blank identifier) is left out.

        Args:
            puzzle_identifiers: [B].
            inputs: tokens [B, 900].
            predictions: the likeliest tokens [B, 900].
            q_halt: logits [B].

        Raises:
            UserError: an input is not among its task's test inputs.
        """
        real = puzzle_identifiers != self._blank
        # sigmoid, so written that nothing overflows
        halt = np.rint(_HALT_UNITS * 0.5 * (1 + np.tanh(0.5 * q_halt[real].astype(np.float64)))).astype(np.int64)
        identifiers = puzzle_identifiers[real].tolist()
        grids = zip(decode(inputs[real]), decode(predictions[real]), strict=True)
        for identifier, (asked, answered), units in zip(identifiers, grids, halt.tolist(), strict=True):
            name = self._names[identifier]
            task, augmentation = self._split_name(name)
            tallies = self.votes.get((task, _key(augmentation.undo(asked))))
            if tallies is None:
                raise UserError(
                    f"{self._path}/identifiers.json calls a test example {name!r}, but it is none of {task}'s: the "
                    "file belongs to another pack; build this one again."
                )
            _count(tallies, _key(augmentation.undo(answered)), (1, units, self._order[identifier]))

    def merge(self, votes: Votes) -> None:
        """Add the `votes` of another scorer of the same pack."""
        for question, tallies in votes.items():
            for key, tally in tallies.items():
                _count(self.votes[question], key, tally)

    def ranking(self, task: str, test: int) -> list[Answer]:
        """All answers to a task's test input number `test`, by votes and then by mean sigmoid(q_halt), best first."""
        tallies = self.votes[task, _key(self.tests[task][test].input)]
        return [Answer(_grid(key), votes, units / votes / _HALT_UNITS) for key, (votes, units, _) in _ranked(tallies)]

    def _split_name(self, identifier: str) -> tuple[str, Augmentation]:
        try:
            return split_name(identifier)
        except UserError as error:
            raise UserError(f"{self._path}/identifiers.json: {error}") from error

    def result(self) -> ArcResult:
        """The scores, and what to submit."""
        needed = []  # by task and test input, the first answers among which the truth is
        submission = {}
        for task, pairs in self.tests.items():
            ranked = [[key for key, _ in _ranked(self.votes[task, _key(pair.input)])] for pair in pairs]
            answered = zip(pairs, ranked, strict=True)
            if known := [_rank(_key(pair.output), keys) for pair, keys in answered if pair.is_solved]:
                needed.append(np.array(known))
            submission[task] = [_attempts(keys) for keys in ranked]
        counts = PASS_AT if needed else ()
        return ArcResult(
            (len(needed), sum(map(len, needed))),
            {k: float(np.mean([(ranks <= k).all() for ranks in needed])) for k in counts},
            {k: float(np.mean([(ranks <= k).mean() for ranks in needed])) for k in counts},
            submission,
        )


def _key(grid: Grid) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


def _grid(key: bytes) -> Grid:
    return np.frombuffer(key, dtype=np.uint8)[2:].reshape(key[0], key[1])


def _count(tallies: dict[bytes, Tally], key: bytes, new: Tally) -> None:
    known = tallies.get(key, (0, 0, new[2]))
    tallies[key] = (known[0] + new[0], known[1] + new[1], min(known[2], new[2]))


def _ranked(tallies: Mapping[bytes, Tally]) -> list[tuple[bytes, Tally]]:
    """Best first. With equal votes the higher mean has the higher sum; a tie goes to the answer that came first in the
    split, as in the published scoring; and where several models answered one puzzle, to the first grid."""
    return sorted(tallies.items(), key=lambda item: (-item[1][0], -item[1][1], item[1][2], item[0]))


def _rank(truth: bytes, ranked: list[bytes]) -> float:
    """From 1; infinite if the truth was never answered."""
    return ranked.index(truth) + 1 if truth in ranked else np.inf


def _attempts(ranked: list[bytes]) -> dict[str, list[list[int]]]:
    """The first two grids that are not empty; where there are fewer, a black cell stands in."""
    # Of the first three, at most one is the empty grid.
    grids = [grid.tolist() for grid in map(_grid, ranked[:3]) if grid.size]
    first, second = [*grids, [[0]], [[0]]][:2]
    return {"attempt_1": first, "attempt_2": second}


class ArcEvaluator(Evaluator):
    """Lets the augmentations of each test input vote, and writes what to submit."""

    wants_all_votes = True

    def __init__(self, pack: Pack) -> None:
        self.scorer = ArcScorer(pack)
        self._demonstrations = demonstrations(pack)

    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        self.scorer.add(puzzles["puzzle_identifiers"], puzzles["inputs"], answers, q_halt)

    def state(self) -> Votes:
        return self.scorer.votes

    def summary(self, states: Sequence[Votes], folder: Path) -> str:
        for votes in states[1:]:
            self.scorer.merge(votes)
        result = self.scorer.result()
        file = folder / "submission.json"
        with new_file(file):
            file.write_text(json.dumps(result.submission) + "\n")
        asked = sum(map(len, result.submission.values()))
        saved = f"  Saved the first two answers to all {asked:,} test inputs in {file}."
        tasks, inputs = result.scored
        if not tasks:
            return saved
        passed, shares = (
            ", ".join(f"{100 * share:.2f} % at {count}" for count, share in counted.items())
            for counted in (result.pass_at, result.share_at)
        )
        lines = [
            f"  Tasks solved, by answers allowed: {passed}.",
            f"  Mean share of a task's test inputs solved (TRM's figure): {shares}.",
            saved,
        ]
        if inputs < asked:
            lines.insert(
                0,
                f"  The outputs of {inputs:,} of {asked:,} test inputs are known, in {tasks:,} of "
                f"{len(result.submission):,} tasks; only these are scored.",
            )
        return "\n".join(lines)

    def details(self, name: str, inputs: Tokens) -> dict[str, Any]:
        """The task's demonstrations, and the first two of the grids that its augmentations voted for."""
        (grid,) = decode(inputs[None])
        test = next(n for n, pair in enumerate(self.scorer.tests[name]) if np.array_equal(pair.input, grid))
        ranking = self.scorer.ranking(name, test)
        return {
            "demonstrations": [[_rows(pair.input), _rows(pair.output)] for pair in self._demonstrations.get(name, ())],
            "votes": [{"grid": _rows(a.grid), "votes": a.votes, "q": round(a.q_halt, 4)} for a in ranking[:2]],
            "allVotes": sum(answer.votes for answer in ranking),
        }


def demonstrations(pack: Pack) -> dict[str, list[Pair]]:
    """By task name, from the pack's test_puzzles.json; packs of the published builder have none."""
    file = pack.path / "test_puzzles.json"
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not tasks by name")
        return {name: ArcTask.parse(name, task, evaluated=True).train for name, task in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{file} cannot be read ({str(error).rstrip('.')}): build the pack again.") from error


def _rows(grid: Grid) -> list[str]:
    return ["".join(map(str, line)) for line in grid.tolist()]
