"""How a request ends that gets no answer: a status, and one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from hrm.errors import printable

Result = TypeVar("Result")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one sentence, naming what is wrong and the way out")


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers

    def response(self, **headers: str) -> JSONResponse:
        # Printable: half of a surrogate pair in what a request holds could not be written in UTF-8.
        return JSONResponse({"error": printable(self.sentence)}, self.status, {**headers, **(self.headers or {})})


def gone() -> Refused:
    """For a client that does not wait for its answer: only the counts will tell of this status."""
    return Refused(499, "the client has gone.")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be read as JSON"},
    408: {"model": Problem, "description": "the request did not arrive within the time that it has"},
    409: {"model": Problem, "description": "a request of this Idempotency-Key is being answered"},
    413: {"model": Problem, "description": "the request is too long"},
    422: {"model": Problem, "description": "an input is no puzzle, or an option is of no use"},
    429: {
        "model": Problem,
        "description": "too many puzzles wait",
        "headers": {
            "Retry-After": {
                "description": "seconds after which there is likely to be room, as fast as it became free lately",
                "schema": {"type": "integer", "minimum": 1, "maximum": 60},
            }
        },
    },
    503: {"model": Problem, "description": "the service ends, its model cannot compute, or there are too many clients"},
    504: {"model": Problem, "description": "no answer within the time that a request has"},
}


async def all_of(
    tasks: Sequence[asyncio.Task[Result]], http: Request, seconds: float, what: str = "inputs or ACT steps"
) -> list[Result]:
    """What all tasks of a request answer; whatever happens, none goes on after this.

    Args:
        what: to ask for less of, where the time is up.

    Raises:
        Refused: the client has gone, or the time is up.
    """

    async def leaves() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answers, left = asyncio.gather(*tasks), asyncio.create_task(leaves())
    answers.add_done_callback(_noticed)  # asyncio would log what nobody asks for any more
    try:
        both: set[asyncio.Future[Any]] = {answers, left}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            return answers.result()
        if left.done():
            raise gone()
        raise Refused(504, f"no answer within {seconds:g} s; ask for fewer {what}.")
    finally:
        for task in tasks:
            task.cancel()
        answers.cancel()
        left.cancel()


def _noticed(answers: asyncio.Future[Any]) -> None:
    if not answers.cancelled():
        answers.exception()
