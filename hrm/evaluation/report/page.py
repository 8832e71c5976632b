"""A report that people can look at: one HTML file with a model's answers step by step, and totals over a whole split.

The file needs no network and nothing beside it. What it shows is recorded by `hrm.evaluation.report.recorder`.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.batch import IGNORE_LABEL_ID
from hrm.errors import UserError
from hrm.evaluation.breakdown import Rating, by_rating, by_source
from hrm.evaluation.report.recorder import Recording, Scores, Trajectories, kinds
from hrm.tasks.base import Rules, View
from hrm.writing import new_file

REPORT_FILE = "report.html"

NO_LABEL = 255


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
    rules: Rules | None = None,
    details: Sequence[Mapping[str, Any]] | None = None,
    inside: Mapping[str, Any] | None = None,
) -> Path:
    """Write `<folder>/report.html`.

    Args:
        title: what was evaluated, in a few words.
        subtitle: on what, and which checkpoint.
        per_kind: as the recorder's.
        sources: of every example of the split [N], if that is known.
        rules: of the task, so that another right answer than the label's is not called wrong.
        details: more for the page's script, for each puzzle shown.
        inside: the section on what happens inside the model, as `hrm.evaluation.report.inside` makes it.

    Returns:
        The file.

    Raises:
        UserError: there is nothing to show, or the folder or the file cannot be written.
    """
    if not len(recording.shown.inputs):
        raise UserError("No test puzzle has a label to compare answers with: leave out report=.")
    content = _content(recording, view, per_kind, rules, details)
    content |= {"title": title, "subtitle": subtitle, "totals": _totals(recording.scores, rating, sources)}
    content["inside"] = inside
    # "<" could end the script element it stands in; JSON has another way to write it.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = files("hrm.evaluation.report")
    page = (parts / "template.html").read_text(encoding="utf-8")
    style, script = (
        "\n".join((parts / f"{name}.{ending}").read_text(encoding="utf-8") for name in ("drawing", "template"))
        for ending in ("css", "js")
    )
    slots = {"title": html.escape(title), "style": style, "data": data, "script": script}
    page = re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], page)
    file = folder / REPORT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"report={folder} cannot be written ({error.strerror}): choose another folder.") from error
    with new_file(file):
        file.write_text(page, encoding="utf-8")
    return file


def _content(
    recording: Recording,
    view: View,
    per_kind: int,
    rules: Rules | None,
    details: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """What the page's script reads of the puzzles shown."""
    shown, scores = recording.shown, recording.shown.scores
    tags: dict[int, list[str]] = {}
    for kind, columns in kinds(scores, per_kind).items():
        for column in columns.tolist():
            tags.setdefault(column, []).append(kind)
    keeps_rules = rules.keeps(shown.inputs, shown.answers[-1]) if rules else np.zeros(len(shown.inputs), dtype=np.bool_)
    puzzles = []
    for row, index in enumerate(scores.index.tolist()):
        puzzle = {
            "index": index,
            "name": "",
            "tags": tags.get(row, []),
            "qHalt": _rounded(scores.q_halt[:, row]),
            "qContinue": _rounded(scores.q_continue[:, row]),
        }
        if rules and keeps_rules[row]:
            puzzle["keepsRules"] = rules.result
        if view.grid_sizes:
            puzzle |= _grid_sizes(shown, row, view.grid_sizes)
        puzzles.append(puzzle | dict(details[row] if details else {}))
    return {
        "view": view.as_json(),
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


def _grid_sizes(
    shown: Trajectories, row: int, grid_sizes: Callable[[NDArray[Any]], NDArray[np.int64]]
) -> dict[str, Any]:
    """Rows and columns of the grids that input, label and answers show."""
    of_input, of_label, *of_answers = grid_sizes(
        np.concatenate([shown.inputs[row][None], shown.labels[row][None], shown.answers[:, row]]).astype(np.int64)
    ).tolist()
    return {"inputShape": of_input, "labelShape": of_label, "shapes": of_answers}


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


def _rounded(values: NDArray[np.floating[Any]]) -> list[float]:
    """For JSON, which has no NaN: those of a model that diverged become 0."""
    return [round(value, 4) for value in np.nan_to_num(values).tolist()]
