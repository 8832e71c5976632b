"""What a service does with its results store: it records answers, gives recorded ones, and repeats those of a key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Response

from hrm.results.records import Answer, AnsweredRequest, RecordError, StoreError, new_id, now
from hrm.service.messages import InferRequest, InferResponse
from hrm.service.problems import Problem, Refused
from hrm.service.recorder import Entry, Recorder
from hrm.tasks.form import Puzzle
from hrm.version import __version__

if TYPE_CHECKING:
    from hrm.results.store import Store

T = TypeVar("T")

_MOST_KEY_CHARACTERS = 255
_SECONDS_TO_READ = 5.0
_READS_AT_ONCE = 8


@dataclass(frozen=True)
class Asked:
    """A request as the store knows it."""

    input_hashes: list[str]  # of each puzzle
    request_hash: str
    options: dict[str, Any]
    key: str | None


def asked_for(request: InferRequest, puzzles: Sequence[Puzzle], index: Sequence[int], key: str | None) -> Asked:
    """What the store is to know of a request.

    A puzzle's hash is that of its tokens and its identifier, 8 bytes each, little-endian: however it was written.

    Raises:
        Refused: the key is of no use.
    """
    if key is not None and not (0 < len(key) <= _MOST_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        raise Refused(422, f"Idempotency-Key has 1 to {_MOST_KEY_CHARACTERS} printable characters of ASCII.")
    if key is not None and request.tokens:
        raise Refused(422, "tokens cannot be combined with Idempotency-Key: they are not recorded.")
    hashes = [
        hashlib.sha256(np.append(puzzle.tokens, puzzle.identifier).astype("<i8").tobytes()).hexdigest()
        for puzzle in puzzles
    ]
    options = request.model_dump(exclude={"inputs"})
    whole = hashlib.sha256(json.dumps([hashes, list(index), options], sort_keys=True).encode()).hexdigest()
    return Asked(hashes, whole, options, key)


class Results:
    """The results store of a service.

    Args:
        most_bytes: of answers that are kept while the store fails.
        model: what the service calls its model.
        weights_hash: SHA-256 of its weights file.
    """

    def __init__(self, store: Store, most_bytes: int, model: str, weights_hash: str) -> None:
        self.recorder = Recorder(store, most_bytes)
        self._store, self._model, self._weights_hash = store, model, weights_hash
        self._keys_at_hand: set[str] = set()
        self._reads = asyncio.Semaphore(_READS_AT_ONCE)

    def __str__(self) -> str:
        return str(self._store)

    async def answered(self, asked: Asked, compute: Callable[[], Awaitable[InferResponse]]) -> str:
        """The answer to a request, as JSON: a recorded one if its key has been seen, else what `compute` gives.

        An answer is recorded soon after it is given. One to a request with a key is given after it was recorded.

        Raises:
            Refused: the key is of another request or of one at hand, or the store cannot say whether it was seen.
        """
        if asked.key is None:
            content, entry = self._entry(await compute(), asked)
            self.recorder.put(entry)
            return content
        if asked.key in self._keys_at_hand:
            raise Refused(409, "a request of this Idempotency-Key is being answered.", {"Retry-After": "1"})
        self._keys_at_hand.add(asked.key)
        try:
            if (before := await self._of_key(asked)) is not None:
                return before
            _, entry = self._entry(await compute(), asked)
            await self._from_the_store(asyncio.wrap_future(self.recorder.put_at_once(entry)))
            first = await self._of_key(asked)  # another service may have been quicker
            assert first is not None
            return first
        finally:
            self._keys_at_hand.remove(asked.key)

    def router(self) -> APIRouter:
        """`GET /results/{id}`."""
        router = APIRouter()
        problems: dict[int | str, dict[str, Any]] = {
            404: {"model": Problem, "description": "no such answer is recorded"},
            503: {"model": Problem, "description": "the results store cannot be used"},
        }

        @router.get("/results/{id}", response_model=InferResponse, responses=problems)
        async def result(id: str) -> Response:
            """A recorded answer, as it was given."""
            if (waiting := self.recorder.on_its_way(id)) is not None:
                await self._from_the_store(asyncio.wrap_future(waiting))
            record = await self._read(partial(self._store.request, id)) if _is_id(id) else None
            if record is None:
                raise Refused(404, "no answer of this id is recorded; an answer comes with its id.")
            return Response(_written(record), media_type="application/json")

        return router

    async def _of_key(self, asked: Asked) -> str | None:
        """The recorded answer to the request of a key."""
        assert asked.key is not None
        record = await self._read(partial(self._store.request_of_key, self._model, asked.key))
        if record is None:
            return None
        if record.weights_hash != self._weights_hash:
            raise Refused(
                422, f"this Idempotency-Key was answered by other weights of the name {self._model}: take another."
            )
        if record.request_hash != asked.request_hash:
            raise Refused(422, "this Idempotency-Key is of a request with other inputs or options: take another.")
        return _written(record)

    def _entry(self, content: InferResponse, asked: Asked) -> tuple[str, Entry]:
        """An answer as JSON, with its id, and what is to be recorded of it."""
        content.id = new_id()
        text = content.model_dump_json(exclude_none=True)
        given_at = now()

        def record() -> AnsweredRequest:
            answers = _answers(json.loads(text), asked.input_hashes)
            of_request = (self._model, self._weights_hash, asked.request_hash, asked.options, content_ms, answers)
            return AnsweredRequest(*of_request, __version__, asked.key, content_id, given_at)

        content_id, content_ms = content.id, content.ms
        return text, Entry(content_id, len(text) + 64 * len(asked.input_hashes) + 1000, record)

    async def _read(self, read: Callable[[], T]) -> T:
        """What the store gives, in a thread that holds up nobody.

        Raises:
            Refused: it cannot be used.
        """
        loop = asyncio.get_running_loop()

        def has_ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._reads.release)

        async def result() -> T:
            await self._reads.acquire()
            future = _in_a_thread(read)
            future.add_done_callback(has_ended)  # a read that nobody waits for any more still counts
            return await asyncio.wrap_future(future)

        return await self._from_the_store(result())

    async def _from_the_store(self, result: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(result, _SECONDS_TO_READ)
        except RecordError as error:
            raise Refused(500, "the answer cannot be recorded.") from error
        except (StoreError, TimeoutError) as error:
            raise Refused(
                503, "the results store cannot be used now: come again later.", {"Retry-After": "2"}
            ) from error


def _in_a_thread(read: Callable[[], T]) -> Future[T]:
    """What a thread of its own gives. The process can end while it waits for a database that does not answer."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="hrm-results", daemon=True).start()
    return future


def _is_id(text: str) -> bool:
    return text.isascii() and text.isalnum() and len(text) == len(new_id())


def _answers(content: dict[str, Any], input_hashes: Sequence[str]) -> list[Answer]:
    """An answer as it was given, puzzle by puzzle."""
    columns = [content[name] for name in ("answers", "texts", "q_halt", "steps")]
    trajectories = content.get("trajectory") or [None] * len(input_hashes)
    rows = zip(content["index"], input_hashes, *columns, trajectories, strict=True)
    return [Answer(*row) for row in rows]


def _written(record: AnsweredRequest) -> str:
    """An answer as it was given."""
    trajectories = [answer.trajectory for answer in record.answers if answer.trajectory is not None]
    content = InferResponse(
        answers=[answer.answer for answer in record.answers],
        texts=[answer.text for answer in record.answers],
        q_halt=[answer.q_halt for answer in record.answers],
        steps=[answer.steps for answer in record.answers],
        index=[answer.input for answer in record.answers],
        trajectory=[list(map(dict, trajectory)) for trajectory in trajectories] or None,
        tokens=None,
        model=record.model,
        ms=record.ms,
        id=record.id,
    )
    return content.model_dump_json(exclude_none=True)
