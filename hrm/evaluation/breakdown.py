"""Exact accuracy by difficulty rating and by source, in the terminal and as bars of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.data.columns import read_column
from hrm.data.pack import IntArray, Pack, PackSet
from hrm.tasks import task_of
from hrm.tasks.base import Evaluator, Tokens

# Bars of puzzles by rating: enough to see a trend, few enough to hold many puzzles each.
_MOST_BARS = 8


class Bar(TypedDict):
    """Puzzles that have something in common, and how many of them were answered right."""

    label: str
    count: int
    right: int


@dataclass(frozen=True)
class Rating:
    """A number `values` [N] for every example of a split, in its order, that says how hard it is."""

    name: str  # as in "accuracy by <name>"
    values: NDArray[np.floating[Any]] | NDArray[np.integer[Any]]

    @classmethod
    def of_pack(cls, pack: Pack) -> Rating | None:
        """The ratings that are stored in a pack, else those that its task can tell; None where there are none, or all
        puzzles are alike.

        Raises:
            UserError: as `read_column`.
        """
        values = read_column(pack, "ratings")
        if values is not None:
            return cls("difficulty rating", values)
        difficulty = task_of(pack).difficulty()
        if difficulty is None:
            return None
        of_sets = [difficulty.of(data.inputs, data.labels) for data in pack.sets.values()]
        rating = cls(difficulty.name, np.concatenate(of_sets))
        return rating if len(np.unique(rating.values)) > 1 else None


def by_rating(values: NDArray[Any], right: NDArray[np.bool_]) -> list[Bar]:
    """Bars of about equally many puzzles, or one for each rating where there are few.

    Args:
        values: ratings [N], N at least 1.
        right: [N], which puzzles were answered right.
    """
    starts = np.unique(values)
    if len(starts) > _MOST_BARS:
        starts = np.unique(np.quantile(values, np.arange(_MOST_BARS) / _MOST_BARS, method="lower"))
    bar = np.searchsorted(starts, values, side="right") - 1
    labels = []
    for number in range(len(starts)):
        inside = bar == number
        low, high = (f"{value:.4g}" for value in (values[inside].min(), values[inside].max()))
        labels.append(low if low == high else f"{low}–{high}")
    return _bars(labels, bar, right)


def by_source(names: NDArray[np.str_], right: NDArray[np.bool_]) -> list[Bar]:
    """A bar for each source, the largest first; where they are many, the smallest share the last one.

    Args:
        names: of the sources [N], N at least 1.
        right: [N], which puzzles were answered right.
    """
    sources, source, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    labels = [name or "not named" for name in sources[order].tolist()]
    if len(labels) > _MOST_BARS:
        labels[_MOST_BARS - 1 :] = [f"{len(labels) - _MOST_BARS + 1} others"]
    return _bars(labels, np.minimum(np.argsort(order)[source], len(labels) - 1), right)


def _bars(labels: Sequence[str], bar: NDArray[np.int64], right: NDArray[np.bool_]) -> list[Bar]:
    """From the bar that each puzzle belongs to [N]."""
    counts, rights = (np.bincount(of, minlength=len(labels)).tolist() for of in (bar, bar[right]))
    return [Bar(label=label, count=n, right=m) for label, n, m in zip(labels, counts, rights, strict=True)]


class BreakdownEvaluator(Evaluator):
    """Counts exact answers by the difficulty ratings and sources that are stored in a pack, where there are any.

    Raises:
        UserError: as `read_column`.
    """

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        known = [
            ("difficulty rating", read_column(pack, "ratings"), by_rating),
            ("source", read_column(pack, "sources"), by_source),
        ]
        self.breakdowns = [(name, values, bars) for name, values, bars in known if values is not None]
        self._keys: list[NDArray[np.uint64]] = []
        self._exact: list[NDArray[np.bool_]] = []  # [2, N]: there is a label, the answer is it

    def add(self, set_name: str, puzzles: Mapping[str, NDArray[Any]], answers: Tokens, q_halt: NDArray[Any]) -> None:
        labelled = puzzles["labels"] != IGNORE_LABEL_ID
        exact = ((puzzles["labels"] == answers) | ~labelled).all(-1)
        self._keys.append(_keys(puzzles["inputs"], puzzles["puzzle_identifiers"]))
        self._exact.append(np.stack([labelled.any(-1), exact]))

    def state(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        return np.concatenate(self._keys), np.concatenate(self._exact, axis=1)

    def summary(self, states: Sequence[tuple[NDArray[np.uint64], NDArray[np.bool_]]], folder: Path) -> str:
        # The ranks took turns, so the answers come in another order than the puzzles. Sorted by key they agree; puzzles
        # with the same key are one and the same, and so are their answers.
        keys, both = (np.concatenate(parts, axis=-1) for parts in zip(*states, strict=True))
        counted, exact = both[:, np.argsort(keys, kind="stable")]
        in_split = np.argsort(np.concatenate([_keys_of_set(data) for data in self._pack.sets.values()]), kind="stable")
        lines = []
        for name, values, bars in self.breakdowns if counted.any() else ():
            lines += [f"  Exact answers by {name}:", *_bar_rows(bars(values[in_split][counted], exact[counted]))]
        return "\n".join(lines)


def _keys(inputs: IntArray, identifiers: IntArray) -> NDArray[np.uint64]:
    """A number [N] for each puzzle, by its tokens [N, S] and identifier [N], that no other one has."""
    rows = np.column_stack([inputs, identifiers]).astype(np.int32)
    return np.array([int.from_bytes(blake2b(row, digest_size=8).digest()) for row in rows], dtype=np.uint64)


def _keys_of_set(data: PackSet) -> NDArray[np.uint64]:
    return _keys(data.inputs, np.repeat(data.puzzle_identifiers, np.diff(data.puzzle_indices)))


def _bar_rows(bars: Sequence[Bar]) -> list[str]:
    width = max(len(bar["label"]) for bar in bars)
    shares = [100 * bar["right"] / bar["count"] for bar in bars]
    return [
        f"    {bar['label']:<{width}}  {share:6.2f} % of {bar['count']:>7,}"
        for bar, share in zip(bars, shares, strict=True)
    ]
