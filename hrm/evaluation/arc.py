"""ARC scores: what is answered to all augmentations of a test input is undone and put to the vote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import Pack, read_identifiers
from hrm.errors import UserError
from hrm.tasks.arc import SEQ_LEN, VOCAB_SIZE, Grid, Pair, decode, split_name

PASS_AT = (1, 2, 5, 10, 100, 1000)

# Votes count sigmoid(q_halt) in these units: whole numbers add up to the same in any order, on any number of ranks.
_HALT_UNITS = 1 << 40

Question = tuple[str, bytes]
"""A task's name and the key of a test input."""

Votes = dict[Question, dict[bytes, tuple[int, int]]]
"""By question and key of the answer: votes and their sum of sigmoid(q_halt), in units of 2^-40. Pickles compactly."""


@dataclass(frozen=True)
class Answer:
    """A grid that was answered to a test input, augmentations undone."""

    grid: Grid
    votes: int
    q_halt: float  # mean sigmoid(q_halt) of the votes


@dataclass(frozen=True)
class ArcResult:
    """`pass_at[K]`: the share of tasks with the truths of all test inputs among the first K answers. `submission`: the
    first two answers to every test input, as the competition wants them in submission.json.
    """

    pass_at: dict[int, float]
    submission: dict[str, list[dict[str, list[list[int]]]]]


class ArcScorer:
    """Collects the answers to an ARC pack's test split, in any order and any parts, and scores them.

    Ranks score their own answers; `merge` adds the votes of the others.

    Args:
        pack: the test split, built by this or the published builder. Its examples that are not augmented are the truth.

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
        for data in pack.sets.values():
            for puzzle, identifier in enumerate(data.puzzle_identifiers.tolist()):
                name = self._names[identifier]
                if split_name(name)[0] == name:
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
        """Count a batch of answers; padding (the blank identifier) is passed over.

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
            task, augmentation = split_name(name)
            tallies = self.votes.get((task, _key(augmentation.undo(asked))))
            if tallies is None:
                raise UserError(
                    f"{self._path}/identifiers.json calls a test example {name!r}, but it is none of {task}'s: the "
                    "file belongs to another pack; build this one again."
                )
            _count(tallies, _key(augmentation.undo(answered)), 1, units)

    def merge(self, votes: Votes) -> None:
        """Add the `votes` of another scorer of the same pack."""
        for question, tallies in votes.items():
            for key, tally in tallies.items():
                _count(self.votes[question], key, *tally)

    def ranking(self, task: str, test: int) -> list[Answer]:
        """All answers to a task's test input number `test`, by votes and then by mean sigmoid(q_halt), best first."""
        tallies = self.votes[task, _key(self.tests[task][test].input)]
        return [Answer(_grid(key), votes, units / votes / _HALT_UNITS) for key, (votes, units) in _ranked(tallies)]

    def result(self) -> ArcResult:
        """The scores, and what to submit."""
        needed = []  # by task, the first answers among which the truth of every test input is
        submission = {}
        for task, pairs in self.tests.items():
            ranked = [[key for key, _ in _ranked(self.votes[task, _key(pair.input)])] for pair in pairs]
            needed.append(max(_place(_key(pair.output), keys) for pair, keys in zip(pairs, ranked, strict=True)))
            submission[task] = [_attempts(keys) for keys in ranked]
        return ArcResult({k: float(np.mean(np.array(needed) <= k)) for k in PASS_AT}, submission)


def _key(grid: Grid) -> bytes:
    return bytes(grid.shape) + grid.tobytes()


def _grid(key: bytes) -> Grid:
    return np.frombuffer(key, dtype=np.uint8)[2:].reshape(key[0], key[1])


def _count(tallies: dict[bytes, tuple[int, int]], key: bytes, votes: int, units: int) -> None:
    known = tallies.get(key, (0, 0))
    tallies[key] = (known[0] + votes, known[1] + units)


def _ranked(tallies: Mapping[bytes, tuple[int, int]]) -> list[tuple[bytes, tuple[int, int]]]:
    """Best first. With equal votes the higher mean has the higher sum; what is left of a tie goes by the grids."""
    return sorted(tallies.items(), key=lambda item: (-item[1][0], -item[1][1], item[0]))


def _place(truth: bytes, ranked: list[bytes]) -> float:
    """From 1; infinite if the truth was never answered."""
    return ranked.index(truth) + 1 if truth in ranked else np.inf


def _attempts(ranked: list[bytes]) -> dict[str, list[list[int]]]:
    """The first two grids that are not empty; where there are fewer, a black cell stands in."""
    # Of the first three, at most one is the empty grid.
    grids = [grid.tolist() for grid in map(_grid, ranked[:3]) if grid.size]
    first, second = [*grids, [[0]], [[0]]][:2]
    return {"attempt_1": first, "attempt_2": second}
