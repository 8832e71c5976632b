"""One module's updates over HTTP: `POST /infer/L` and `POST /infer/H`, or what else a model's levels are called."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import Counter
from typing import Any

from fastapi import APIRouter, Request, Response

from hrm.config import ServeConfig
from hrm.errors import UserError, shortened
from hrm.service.answering import probability, read_inputs
from hrm.service.engine import Closed, Engine
from hrm.service.memory import SECONDS_UNTIL_UP, Bounds, Unavailable, open_memory
from hrm.service.messages import UpdateRequest, UpdateResponse
from hrm.service.problems import PROBLEMS, Problem, Refused, all_of
from hrm.service.room import Room
from hrm.service.sessions import Outputs, Session, SessionFormat, updated
from hrm.tasks.form import Puzzle

_AT_ONCE = 16  # calls whose states are in this process's hands; others wait with their request alone
_NAMES_ELSEWHERE = ("L", "H")  # of levels: what is asked for where a model has none
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    404: {"model": Problem, "description": "there is no such session, or no longer"},
    409: {
        "model": Problem,
        "description": "the session is there already, is another model's, or has changed meanwhile",
    },
    503: {"model": Problem, "description": "the service ends, its model cannot compute, or its memory does not answer"},
}


class Modules:
    """The sessions of one engine's model.

    Attributes:
        memory: where they live.
        updates: made by this process, by level.
    """

    def __init__(self, engine: Engine, config: ServeConfig, name: str) -> None:
        """
        Args:
            name: what to call the model.

        Raises:
            UserError: the memory cannot be used.
        """
        self._engine, self._config, self._name = engine, config, name
        self._format = SessionFormat(engine.model)
        most_bytes = self._format.most_bytes
        most = min(config.most_sessions, max(config.most_session_bytes // most_bytes, 1))
        bounds = Bounds(self._format.model_hash, most, most_bytes, config.seconds_per_session)
        self.memory = open_memory(config.memory, bounds)
        self._room = Room(config.most_waiting)
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._levels = list(engine.model.model.model.inner.levels)
        self.updates = Counter(dict.fromkeys(self._levels, 0))

    def router(self) -> APIRouter:
        """The routes, one for each level."""
        router = APIRouter()
        for level in self._levels or _NAMES_ELSEWHERE:
            router.add_api_route(
                f"/infer/{level}",
                self._route(level),
                methods=["POST"],
                name=f"infer_{level}",
                description=f"Update the state of level {level} in a session; the first call, with inputs, begins it.",
                response_model=UpdateResponse,
                responses=_RESPONSES,
            )
        return router

    def _route(self, level: str) -> Any:
        async def update(request: UpdateRequest, http: Request) -> Response:
            began = time.perf_counter()
            if "Idempotency-Key" in http.headers:
                sentence = "its answers are not recorded; updates in an answer tells what was done"
                raise Refused(422, f"Idempotency-Key: /infer/{level} knows none, for {sentence}.")
            puzzle = await self._checked(request)
            name = request.session or secrets.token_urlsafe(16)
            with self._room.held(1, "calls"):
                task = asyncio.ensure_future(self._update(level, name, puzzle, request.updates))
                seconds = self._config.seconds_per_request
                try:
                    ((session, outputs, content),) = await all_of([task], http, seconds, "updates")
                except Closed as error:
                    raise Refused(503, f"{error}.") from error
                except Unavailable as error:
                    raise Refused(503, str(error), {"Retry-After": str(SECONDS_UNTIL_UP)}) from error
            model = self._engine.model
            answer = UpdateResponse(
                session=name,
                answers=[model.task.answer_value(outputs.tokens, session.puzzle, model.form)],
                texts=[model.task.answer_text(outputs.tokens, session.puzzle, model.form)],
                q_halt=[probability(outputs.q_halt)],
                q_continue=[probability(outputs.q_continue)],
                updates=dict(session.updates),
                state=base64.b64encode(content).decode() if request.state else None,
                model=self._name,
                ms=round(1000 * (time.perf_counter() - began), 3),
            )
            return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

        return update

    async def _checked(self, request: UpdateRequest) -> Puzzle | None:
        """The puzzle to begin with, if there is one; Refused for what no session could do."""
        if not self._levels:
            architecture = self._engine.model.model.model.inner.config.name
            raise Refused(422, f"{architecture} has no levels to update apart: POST /infer answers its puzzles.")
        if request.updates > (most := self._config.most_updates):
            asked = shortened(request.updates)
            raise Refused(422, f"updates: {asked} are asked for, and this service makes at most {most}.")
        if request.inputs is None:
            if request.session is None:
                raise Refused(422, "session is missing: name one, or give the inputs to begin one.")
            return None
        try:
            puzzles, _ = await asyncio.to_thread(read_inputs, request.inputs, self._engine)
        except UserError as error:
            raise Refused(422, str(error)) from error
        if len(puzzles) != 1:
            raise Refused(422, f"inputs: {len(puzzles)} puzzles are given, and a session has one.")
        return puzzles[0]

    async def _update(self, level: str, name: str, puzzle: Puzzle | None, count: int) -> tuple[Session, Outputs, bytes]:
        """Read a session, update it, and keep it.

        Raises:
            Refused: there is none, or it cannot be had.
            Unavailable: the memory does not answer.
            Closed: the engine takes no more.
        """
        async with self._at_once:
            before, version = await self._loaded(name, puzzle)
            work = updated(self._engine.model, before, level, count)
            session, outputs = await asyncio.wrap_future(self._engine.run(work))
            content = await asyncio.to_thread(self._format.pack, session)
            if not await self.memory.store(name, version, content):
                sentence = f"session {name} was changed by another call meanwhile, and this one counts for nothing"
                raise Refused(409, f"{sentence}: ask again.")
            self.updates[level] += count
        return session, outputs, content

    async def _loaded(self, name: str, puzzle: Puzzle | None) -> tuple[Session | Puzzle, str | None]:
        """The session as it is now, and its version; the puzzle, where that begins one."""
        try:
            kept = await self.memory.load(name)
            if puzzle is not None:
                if kept is not None:
                    raise Refused(409, f"session {name} is there already: leave out the inputs, or take another name.")
                return puzzle, None
            if kept is None:
                raise Refused(
                    404,
                    f"there is no session {name}: it was not begun, was not used for "
                    f"{self._config.seconds_per_session:g} s, or made room for others; give inputs to begin it.",
                )
            return await asyncio.to_thread(self._format.unpack, kept.content), kept.version
        except ValueError as error:
            raise Refused(409, f"session {name} cannot be read ({error}): take another name.") from error
