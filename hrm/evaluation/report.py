"""A report that people can look at: one HTML file with a model's answers step by step, and totals over a whole split.

The file needs no network and nothing beside it. What it shows is recorded by `hrm.evaluation.trajectory`.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.data.pack import Pack, read_provenance
from hrm.errors import UserError
from hrm.evaluation.arc import Answer, ArcScorer
from hrm.evaluation.trajectory import Recording, Scores, Trajectories, kinds
from hrm.reading import read_array, read_json
from hrm.tasks.arc import GRID_SIDE, NUM_COLORS, SEQ_LEN, Grid, Pair, Task, decode, split_name
from hrm.tasks.arc import VOCAB_SIZE as ARC_VOCAB_SIZE
from hrm.tasks.maze import CHARSET, FREE, PATH, is_shortest_path
from hrm.tasks.maze import VOCAB_SIZE as MAZE_VOCAB_SIZE
from hrm.tasks.sudoku import BoxShape
from hrm.tasks.tokens import VOCABULARY_FILE, read_vocabulary

REPORT_FILE = "report.html"

NO_LABEL = 255

# Bars of puzzles by rating: enough to see a trend, few enough to hold many puzzles each.
_MOST_BARS = 8


@dataclass(frozen=True)
class View:
    """How the tokens of a pack are drawn.

    `kind` is sudoku, maze, arc or tokens. In a row stand `columns` tokens, None where a sequence is no grid. `symbols`
    says what each token is written as. Where an input leaves the token `blank` to be filled in, answers are
    drawn over their inputs, elsewhere beside them.
    """

    kind: str
    symbols: tuple[str, ...]
    columns: int | None
    blank: int | None = None
    box: BoxShape | None = None  # of Sudoku

    @classmethod
    def sudoku(cls, box: BoxShape) -> View:
        symbols = ("", "", *(str(digit) for digit in range(1, box.side + 1)))
        return cls("sudoku", symbols, box.side, blank=1, box=box)

    @classmethod
    def maze(cls, columns: int) -> View:
        return cls("maze", ("", *CHARSET), columns, blank=FREE)

    @classmethod
    def arc(cls) -> View:
        return cls("arc", ("", "", *map(str, range(NUM_COLORS))), GRID_SIDE)

    @classmethod
    def tokens(cls, vocab_size: int, names: Sequence[str] | None = None, columns: int | None = None) -> View:
        """Anything else; `names` [vocab_size] are what the tokens mean, if that is known."""
        return cls("tokens", tuple(names or map(str, range(vocab_size))), columns)

    @classmethod
    def of_pack(cls, pack: Pack) -> View:
        """The view that fits a pack: of your own data by its vocabulary and shape, of the known tasks by its sizes."""
        length, vocab_size = pack.metadata.seq_len, pack.metadata.vocab_size
        if (vocabulary := pack.path / VOCABULARY_FILE).is_file():
            return cls.tokens(vocab_size, ["", *map(str, read_vocabulary(vocabulary).symbols)], _columns(pack))
        for box in BoxShape.supported():
            if (length, vocab_size) == (box.cells, box.vocab_size):
                return cls.sudoku(box)
        if (length, vocab_size) == (SEQ_LEN, ARC_VOCAB_SIZE):
            return cls.arc()
        side = math.isqrt(length)
        return cls.maze(side) if (length, vocab_size) == (side**2, MAZE_VOCAB_SIZE) else cls.tokens(vocab_size)


def _columns(pack: Pack) -> int | None:
    """Of the grids in a pack of your own data, by the shape (such as 9x9) that its builder put on record."""
    try:
        rows, columns = map(int, read_provenance(pack.path)["arguments"]["shape"].split("x"))
    except (UserError, ValueError, KeyError, TypeError, AttributeError):  # lists of symbols, or no record
        return None
    return columns if min(rows, columns) > 0 and rows * columns == pack.metadata.seq_len else None


@dataclass(frozen=True)
class Rating:
    """A number `values` [N] for every example of a split, in its order, that says how hard it is."""

    name: str  # as in "accuracy by <name>"
    values: NDArray[np.floating[Any]] | NDArray[np.integer[Any]]

    @classmethod
    def of_pack(cls, pack: Pack, view: View) -> Rating | None:
        """What can be told of a pack: the ratings that are stored in it; else the length of a maze's path, or the
        blanks of a Sudoku. None for other tasks, or where all puzzles are alike.

        Raises:
            UserError: as `stored`.
        """
        values = stored(pack, "ratings")
        if values is not None:
            rating = cls("difficulty rating", values)
        elif view.kind == "maze":
            moves = [(data.labels == PATH).sum(1) + 1 for data in pack.sets.values()]
            rating = cls("length of the path", np.concatenate(moves))
        elif view.kind == "sudoku":
            blanks = [(data.inputs == view.blank).sum(1) for data in pack.sets.values()]
            rating = cls("blanks to fill", np.concatenate(blanks))
        else:
            return None
        return rating if len(np.unique(rating.values)) > 1 else None


def _is_text(column: NDArray[Any]) -> bool:
    """Whether every code in an array of text is a character's; of others Python makes no string."""
    codes = np.ascontiguousarray(column.astype(column.dtype.newbyteorder("="))).view(np.uint32)
    return bool(((codes < 0xD800) | ((codes > 0xDFFF) & (codes < 0x110000))).all())


# What a builder may tell of each puzzle, in files beside the inputs: what it is, the kinds of arrays that hold it, and
# whether the values are such.
_STORED: dict[str, tuple[str, str, Callable[[NDArray[Any]], bool]]] = {
    "ratings": ("numbers", "iuf", lambda column: bool(np.isfinite(column).all())),
    "sources": ("text", "U", _is_text),
}


def stored(pack: Pack, column: str) -> NDArray[Any] | None:
    """What the arrays `<set>__<column>.npy` beside the inputs tell of every example of a split [N], in its order; None
    where a set has none, or all examples are alike.

    Args:
        column: ratings (numbers) or sources (text).

    Raises:
        UserError: such an array cannot be read, or has another length than its set.
    """
    kind, letters, is_sound = _STORED[column]
    files = {name: pack.path / pack.split / f"{name}__{column}.npy" for name in pack.sets}
    if not all(file.is_file() for file in files.values()):
        return None
    parts = []
    for name, file in files.items():
        count = len(pack.sets[name].inputs)
        try:
            part = read_array(file, letters, kind)
        except (ValueError, OSError) as error:
            raise UserError(f"{file} is torn or is not a plain .npy file ({error}); build the pack again.") from error
        if part.shape != (count,):
            raise UserError(
                f"{file} has shape {part.shape} of {part.dtype}, but its set has {count} examples; write {kind}, one "
                "for each."
            )
        if not is_sound(part):
            raise UserError(f"{file} holds values that are not {kind}; build the pack again.")
        parts.append(part)
    values = np.concatenate(parts)
    return values if len(np.unique(values)) > 1 else None


class Bar(TypedDict):
    """Puzzles that have something in common, and how many of them were answered right."""

    label: str
    count: int
    right: int


@dataclass(frozen=True)
class ArcTask:
    """What an ARC example is shown with: its task's demonstrations, and the answers that augmentations voted for."""

    demonstrations: Sequence[Pair] = ()
    ranking: Sequence[Answer] = ()


def originals(names: Sequence[str]) -> NDArray[np.bool_]:
    """Which puzzle identifiers of an ARC pack, by their names, are not augmented: for `Recorder(may_show=...)`."""
    return np.array([split_name(name)[0] == name for name in names])


def arc_demonstrations(pack: Pack) -> dict[str, list[Pair]]:
    """By task name, from the pack's test_puzzles.json; packs of the published builder have none."""
    file = pack.path / "test_puzzles.json"
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not tasks by name")
        return {name: Task.parse(name, task, evaluated=True).train for name, task in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{file} cannot be read ({str(error).rstrip('.')}): build the pack again.") from error


def arc_tasks(
    shown: Trajectories, names: Sequence[str], scorer: ArcScorer, demonstrations: Mapping[str, Sequence[Pair]]
) -> dict[int, ArcTask]:
    """By place in the split, what goes with the examples shown; all must be originals.

    Args:
        names: of the puzzle identifiers.
        scorer: with all votes counted.
        demonstrations: by task name; tasks may be missing.
    """
    tasks = {}
    for index, identifier, grid in zip(shown.scores.index, shown.puzzle_identifiers, decode(shown.inputs), strict=True):
        name = names[identifier]
        test = next(n for n, pair in enumerate(scorer.tests[name]) if np.array_equal(pair.input, grid))
        tasks[int(index)] = ArcTask(demonstrations.get(name, ()), scorer.ranking(name, test))
    return tasks


def write_report(
    folder: Path,
    recording: Recording,
    view: View,
    *,
    title: str,
    subtitle: str = "",
    per_kind: int = 8,
    rating: Rating | None = None,
    sources: NDArray[np.str_] | None = None,
    names: Sequence[str] | None = None,
    tasks: Mapping[int, ArcTask] | None = None,
) -> Path:
    """Write `<folder>/report.html`.

    Args:
        title: what was evaluated, in a few words.
        subtitle: on what, and which checkpoint.
        per_kind: as the recorder's.
        sources: of every example of the split [N], if that is known.
        names: of the puzzle identifiers, where puzzles have any.
        tasks: for ARC, by place in the split.

    Returns:
        The file.

    Raises:
        UserError: there is nothing to show, or the folder or the file cannot be written.
    """
    if not len(recording.shown.inputs):
        raise UserError("No test puzzle has a label to compare answers with: leave out report=.")
    content = _content(recording, view, per_kind, names, tasks or {})
    content |= {"title": title, "subtitle": subtitle, "totals": _totals(recording.scores, rating, sources)}
    # "<" could end the script element it stands in; JSON has another way to write it.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = files("hrm.evaluation")
    page = (parts / "report_template.html").read_text(encoding="utf-8")
    style, script = ((parts / f"report_template.{ending}").read_text(encoding="utf-8") for ending in ("css", "js"))
    slots = {"title": html.escape(title), "style": style, "data": data, "script": script}
    page = re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], page)
    file = folder / REPORT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report={folder} cannot be written ({error.strerror}): choose another folder.") from error
    return file


def _content(
    recording: Recording,
    view: View,
    per_kind: int,
    names: Sequence[str] | None,
    tasks: Mapping[int, ArcTask],
) -> dict[str, Any]:
    """What the page's script reads of the puzzles shown."""
    shown, scores = recording.shown, recording.shown.scores
    tags: dict[int, list[str]] = {}
    for kind, columns in kinds(scores, per_kind).items():
        for column in columns.tolist():
            tags.setdefault(column, []).append(kind)
    puzzles = []
    for row, index in enumerate(scores.index.tolist()):
        puzzle = {
            "index": index,
            "name": names[shown.puzzle_identifiers[row]] if names and view.kind == "arc" else "",
            "tags": tags.get(row, []),
            "qHalt": _rounded(scores.q_halt[:, row]),
            "qContinue": _rounded(scores.q_continue[:, row]),
        }
        if view.kind == "arc":
            puzzle |= _arc_content(shown, row, tasks.get(index, ArcTask()))
        elif view.kind == "maze":
            puzzle["shortest"] = bool(
                is_shortest_path(shown.inputs[row : row + 1], shown.answers[-1, row : row + 1])[0]
            )
        puzzles.append(puzzle)
    return {
        "view": {
            "kind": view.kind,
            "symbols": view.symbols,
            "columns": view.columns,
            "blank": view.blank,
            "box": [view.box.rows, view.box.cols] if view.box else None,
        },
        "steps": len(shown.answers),
        "length": shown.inputs.shape[1],
        "puzzles": puzzles,
        "tokens": _packed(shown),
    }


def _packed(shown: Trajectories) -> str:
    """Input, label and answers of every puzzle, uint8 [M, 2 + T, S], compressed: an answer as its difference to the one
    before, modulo 256, which is mostly zeros.
    """
    labels = np.where(shown.labels == IGNORE_LABEL_ID, NO_LABEL, shown.labels).astype(np.uint8)
    answers = np.diff(shown.answers, axis=0, prepend=np.uint8(0)).transpose(1, 0, 2)
    rows = np.concatenate([shown.inputs[:, None], labels[:, None], answers], axis=1)
    return base64.b64encode(zlib.compress(rows.tobytes(), 9)).decode("ascii")


def _arc_content(shown: Trajectories, row: int, task: ArcTask) -> dict[str, Any]:
    def shape(tokens: NDArray[Any]) -> list[int]:
        return list(decode(tokens)[0].shape)

    def rows(grid: Grid) -> list[str]:
        return ["".join(map(str, line)) for line in grid.tolist()]

    return {
        "inputShape": shape(shown.inputs[row]),
        "labelShape": shape(shown.labels[row]),
        "shapes": [list(grid.shape) for grid in decode(shown.answers[:, row])],
        "demonstrations": [[rows(pair.input), rows(pair.output)] for pair in task.demonstrations],
        "votes": [{"grid": rows(a.grid), "votes": a.votes, "q": round(a.q_halt, 4)} for a in task.ranking[:2]],
        "allVotes": sum(answer.votes for answer in task.ranking),
    }


def _totals(scores: Scores, rating: Rating | None, sources: NDArray[np.str_] | None) -> dict[str, Any]:
    exact, halting = scores.exact, scores.halting_step()
    last = len(exact)
    used = np.minimum(halting, last)
    at_halt = exact[used - 1, np.arange(exact.shape[1])]
    by_used = [
        {"label": str(step) if step <= last else "never", "count": int(at.sum()), "right": int(at_halt[at].sum())}
        for step in range(1, last + 2)
        if (at := halting == step).any()
    ]
    totals = {
        "count": exact.shape[1],
        "exact": _rounded(exact.mean(1)),
        "cells": _rounded(scores.right.mean(1, dtype=np.float64)),
        "halt": {"exact": round(float(at_halt.mean()), 4), "steps": round(float(used.mean()), 2)},
        "byUsed": by_used,
        "byRating": None,
        "bySource": None,
    }
    if rating is not None:
        totals["byRating"] = {"name": rating.name, "bars": by_rating(rating.values[scores.index], exact[-1])}
    if sources is not None:
        totals["bySource"] = {"name": "source", "bars": by_source(sources[scores.index], exact[-1])}
    return totals


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


def _rounded(values: NDArray[np.floating[Any]]) -> list[float]:
    """For JSON, which has no NaN: those of a model that diverged become 0."""
    return [round(value, 4) for value in np.nan_to_num(values).tolist()]
