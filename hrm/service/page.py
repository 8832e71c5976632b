"""The page in the browser: its files, and what it must know of the model's task.

It draws with the report's script and style, loads nothing from other hosts, and may run nothing that stands in itself.
"""

from __future__ import annotations

from importlib.resources import files
from itertools import compress, islice
from typing import Any

from fastapi import APIRouter, HTTPException, Response

from hrm.tasks.base import PuzzleSize, Task
from hrm.tasks.form import PuzzleForm

_MOST_NAMES = 1000
_HERE, _REPORT = "hrm.service", "hrm.evaluation.report"
_FILES = {  # by name: the package, and what it is
    "page.html": (_HERE, "text/html"),
    "page.css": (_HERE, "text/css"),
    "page.js": (_HERE, "text/javascript"),
    "icon.svg": (_HERE, "image/svg+xml"),
    "drawing.css": (_REPORT, "text/css"),
    "drawing.js": (_REPORT, "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src "
    "'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    return _file("page.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(name: str) -> Response:
    """A file that the page loads."""
    if name not in _FILES:
        raise HTTPException(404, "Not Found")
    return _file(name)


def _file(name: str) -> Response:
    package, media_type = _FILES[name]
    return Response((files(package) / name).read_bytes(), media_type=media_type, headers=_HEADERS)


def drawn(task: Task, form: PuzzleForm) -> dict[str, Any]:
    """How inputs of a model are written and drawn, as JSON would have it."""
    size = PuzzleSize(form.seq_len, form.vocab_size)
    view, rules, names = task.view_of(form), task.rules(size), form.identifiers[1:]
    shown = task.shown_identifiers(names)
    return {
        "title": task.title(size),
        "example": task.example(form),
        "num_puzzle_identifiers": form.num_puzzle_identifiers,
        "puzzles": list(islice(names if shown is None else compress(names, shown), _MOST_NAMES)),
        "view": view.as_json() | {"result": rules.result if rules else None},
    }
