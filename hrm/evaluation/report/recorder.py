"""A model's answers after every ACT step: recorded during evaluation, scored for all examples, kept for a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID, Batch
from hrm.errors import UserError
from hrm.evaluation.runner import StepOutputs

# Token 255 is free to stand for "no label".
MAX_VOCAB_SIZE = 255


def check_vocabulary(vocab_size: int) -> None:
    """UserError if answers over so many tokens do not fit a byte."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"report= shows answers of at most {MAX_VOCAB_SIZE} different tokens, but this model has a vocabulary of "
            f"{vocab_size}: leave it out."
        )


@dataclass(frozen=True)
class Scores:
    """How N examples went over T ACT steps."""

    index: NDArray[np.int64]  # [N], indices in the split
    right: NDArray[np.float32]  # [T, N], share of the labelled tokens that are right
    settled: NDArray[np.int64]  # [N], the last step, from 1, that changed a labelled token of the answer
    q_halt: NDArray[np.float32]  # [T, N], logits
    q_continue: NDArray[np.float32]  # [T, N], logits

    @property
    def exact(self) -> NDArray[np.bool_]:
        """[T, N]: the answer is right in every labelled token."""
        exact: NDArray[np.bool_] = self.right == 1
        return exact

    def halting_step(self) -> NDArray[np.int64]:
        """[N]: the step, from 1, after which q_halt > q_continue for the first time; T + 1 where that never was."""
        halts = self.q_halt > self.q_continue
        return np.where(halts.any(0), halts.argmax(0), len(halts)) + 1

    def take(self, columns: NDArray[np.integer[Any]]) -> Scores:
        return Scores(*(getattr(self, name)[..., columns] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Trajectories:
    """M puzzles of S tokens, and a model's answers to them after each of T ACT steps."""

    scores: Scores
    inputs: NDArray[np.uint8]  # [M, S]
    labels: NDArray[np.int32]  # [M, S], IGNORE_LABEL_ID where there is none
    puzzle_identifiers: NDArray[np.int32]  # [M]
    answers: NDArray[np.uint8]  # [T, M, S]

    def take(self, rows: NDArray[np.integer[Any]]) -> Trajectories:
        return Trajectories(
            self.scores.take(rows),
            self.inputs[rows],
            self.labels[rows],
            self.puzzle_identifiers[rows],
            self.answers[:, rows],
        )


@dataclass(frozen=True)
class Recording:
    """The scores of all examples, and the trajectories chosen to be shown."""

    scores: Scores
    shown: Trajectories


def score(batch: Batch, steps: StepOutputs, index: NDArray[np.int64]) -> Trajectories:
    """The trajectories of the first `len(index)` sequences of a batch, which have these indices in the split."""
    count = len(index)
    labels = batch["labels"][:count].cpu().numpy()
    answers = steps.answers[:, :count].cpu().numpy()
    labelled = labels != IGNORE_LABEL_ID
    right = ((answers == labels) & labelled).sum(-1) / np.maximum(labelled.sum(-1), 1)
    changes = ((answers[1:] != answers[:-1]) & labelled).any(-1)
    first = np.ones((1, count), dtype=bool)  # the first step gives an answer where there was none
    settled = len(answers) - np.concatenate([first, changes])[::-1].argmax(0)
    scores = Scores(
        index,
        right.astype(np.float32),
        settled,
        steps.q_halt[:, :count].cpu().numpy(),
        steps.q_continue[:, :count].cpu().numpy(),
    )
    return Trajectories(
        scores,
        batch["inputs"][:count].cpu().numpy().astype(np.uint8),
        labels,
        batch["puzzle_identifiers"][:count].cpu().numpy(),
        answers,
    )


class Recorder:
    """Collects a `Recording` batch by batch, in memory for the scores and a handful of trajectories.

    Args:
        per_kind: how many puzzles to show of those answered right, of those answered wrong, and of those answered
            right whose answer settled last.
        may_show: bool [puzzle identifiers], which puzzles may be chosen (None: all): of ARC's augmentations the
            originals, say.
    """

    def __init__(self, per_kind: int, may_show: NDArray[np.bool_] | None = None) -> None:
        self._per_kind = per_kind
        self._may_show = may_show
        self._scores: list[Scores] = []
        self._shown: Trajectories | None = None

    def add(self, batch: Batch, steps: StepOutputs, index: NDArray[np.int64]) -> None:
        """Take a batch's first `len(index)` sequences, of these indices in the split; those without label are left out.

        Waits for the device.
        """
        new = score(batch, steps, index)
        new = new.take(np.flatnonzero((new.labels != IGNORE_LABEL_ID).any(1)))
        self._scores.append(new.scores)
        if self._may_show is not None:
            new = new.take(np.flatnonzero(self._may_show[new.puzzle_identifiers]))
        pool = new if self._shown is None else _join_trajectories([self._shown, new])
        self._shown = pool.take(_choose(pool.scores, self._per_kind))

    def recording(self) -> Recording:
        """All that was added, once something was; there may be nothing to show in it."""
        assert self._shown is not None
        return _in_order(_join_scores(self._scores), self._shown)

    def merge(self, recordings: Sequence[Recording]) -> Recording:
        """One recording of all ranks' recordings."""
        pool = _join_trajectories([part.shown for part in recordings])
        shown = pool.take(_choose(pool.scores, self._per_kind))
        return _in_order(_join_scores([part.scores for part in recordings]), shown)


def kinds(scores: Scores, per_kind: int) -> dict[str, NDArray[np.intp]]:
    """Up to `per_kind` columns of each kind, the same whatever else the scores hold beside the examples chosen."""
    # Multiplying by the golden ratio scatters indices evenly over the split, whose neighbours may be alike.
    scatter = np.argsort(scores.index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15), kind="stable")
    right = scores.exact[-1][scatter]
    late = scatter[right][np.argsort(-scores.settled[scatter[right]], kind="stable")]
    chosen = {"slow": late[scores.settled[late] > 1], "right": scatter[right], "wrong": scatter[~right]}
    return {kind: columns[:per_kind] for kind, columns in chosen.items()}


def _choose(scores: Scores, per_kind: int) -> NDArray[np.intp]:
    return np.unique(np.concatenate(list(kinds(scores, per_kind).values())))


def _join_scores(parts: Sequence[Scores]) -> Scores:
    names = Scores.__dataclass_fields__
    return Scores(*(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names))


def _join_trajectories(parts: Sequence[Trajectories]) -> Trajectories:
    return Trajectories(
        _join_scores([part.scores for part in parts]),
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.puzzle_identifiers for part in parts]),
        np.concatenate([part.answers for part in parts], axis=1),
    )


def _in_order(scores: Scores, shown: Trajectories) -> Recording:
    return Recording(scores.take(np.argsort(scores.index)), shown.take(np.argsort(shown.scores.index)))
