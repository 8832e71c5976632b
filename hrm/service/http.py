"""The service's HTTP interface, a FastAPI application around one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrm.config import ServeConfig
from hrm.errors import UserError, shortened
from hrm.service.answering import answer, read_inputs
from hrm.service.engine import Closed, Engine
from hrm.service.measures import Measures
from hrm.version import __version__

_EXAMPLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


class InferRequest(BaseModel):
    """Puzzles, written as `predict` takes them."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"inputs": [_EXAMPLE]}]})

    inputs: list[Any] = Field(description="Sudoku and mazes: text or grids; ARC: {input, puzzle} or a task; lists.")
    act_max_steps: int | None = Field(None, ge=1, description="ACT steps at most; null: the service's default")
    augmentations: int = Field(1, ge=1, description="symmetric copies of each input to try")
    trajectory: bool = Field(False, description="give what was answered after every ACT step too")


class InferResponse(BaseModel):
    """Answers, in the order of the inputs."""

    answers: list[Any] = Field(description="as JSON: grids of digits, rows of a maze, lists of symbols")
    texts: list[str] = Field(description="each answer on one line")
    q_halt: list[float] = Field(description="the probability that an answer is right, as the model estimates it")
    steps: list[int] = Field(description="ACT steps spent, over all augmentations")
    index: list[int] = Field(description="which input each answer is to: a task of ARC may hold several puzzles")
    trajectory: list[list[dict[str, Any]]] | None = Field(None, description="answer and q_halt after every ACT step")
    model: str = Field(description="what answered")
    ms: float = Field(description="from the request's arrival on")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one sentence, naming what is wrong and the way out")


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    413: {"model": Problem, "description": "the request is too long"},
    422: {"model": Problem, "description": "an input is no puzzle, or an option is of no use"},
    429: {"model": Problem, "description": "too many puzzles wait; Retry-After says when to come again"},
    503: {"model": Problem, "description": "the service ends, or its model cannot compute"},
    504: {"model": Problem, "description": "no answer within the time that a request has"},
}


def make_app(engine: Engine, config: ServeConfig, name: str) -> FastAPI:
    """The application.

    Args:
        name: what to call the model.
    """
    measures = Measures(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, engine.close)

    # The pages that FastAPI can show of an API load scripts from other hosts: left out.
    app = FastAPI(
        title="hrm serve",
        version=__version__,
        summary="Answers of a Hierarchical Reasoning Model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(_Guard, config=config, measures=measures)
    at_hand = 0  # puzzles of requests that were taken and are not answered yet

    @app.exception_handler(Refused)
    async def refused(_: Request, problem: Refused) -> Response:
        return JSONResponse({"error": problem.sentence}, problem.status, problem.headers)

    @app.exception_handler(HTTPException)
    async def by_the_framework(_: Request, problem: HTTPException) -> Response:
        said = str(problem.detail).rstrip(".")
        return JSONResponse({"error": f"{said}; GET /openapi.json says what there is."}, problem.status_code)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        said = shortened(str(first["msg"]))
        return JSONResponse({"error": f"{where}: {said}; GET /openapi.json says what a request holds."}, 422)

    @app.post("/infer", response_model_exclude_none=True, responses=_PROBLEMS)
    async def infer(request: InferRequest) -> InferResponse:
        nonlocal at_hand
        began = time.perf_counter()
        try:
            _check(request, config)
            puzzles, index = read_inputs(request.inputs, engine)
        except UserError as error:
            raise Refused(422, str(error)) from error
        if at_hand + len(puzzles) > engine.slots + config.most_waiting:
            raise Refused(429, f"{at_hand} puzzles wait already; come again later.", {"Retry-After": "1"})
        at_hand += len(puzzles)
        max_steps = request.act_max_steps or config.act_max_steps
        tasks = [
            asyncio.ensure_future(
                answer(puzzle, engine, max_steps, augmentations=request.augmentations, trajectory=request.trajectory)
            )
            for puzzle in puzzles
        ]
        try:
            answers = await asyncio.wait_for(asyncio.gather(*tasks), config.seconds_per_request)
        except TimeoutError as error:
            seconds = config.seconds_per_request
            raise Refused(504, f"no answer within {seconds:g} s; ask for fewer inputs or ACT steps.") from error
        except Closed as error:
            raise Refused(503, f"{error}.") from error
        except UserError as error:
            raise Refused(422, str(error)) from error
        finally:
            at_hand -= len(puzzles)
            for task in tasks:
                task.cancel()
        return InferResponse(
            answers=[each.value for each in answers],
            texts=[each.text for each in answers],
            q_halt=[each.q_halt for each in answers],
            steps=[each.steps for each in answers],
            index=index,
            trajectory=[each.trajectory or [] for each in answers] if request.trajectory else None,
            model=name,
            ms=round(1000 * (time.perf_counter() - began), 3),
        )

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> dict[str, str]:
        """Whether it answers."""
        if engine.failure is not None:
            raise Refused(503, "the model cannot compute any more; restart the service.")
        return {"status": "ready"}

    @app.get("/models")
    async def models() -> dict[str, list[dict[str, Any]]]:
        """What answers, and how its inputs are written."""
        model = engine.model
        shown = {
            "name": name,
            "task": model.task.name,
            "seq_len": model.form.seq_len,
            "vocab_size": model.form.vocab_size,
            "parameters": model.num_parameters,
            "act_max_steps": config.act_max_steps or model.act_max_steps,
            "dtype": model.dtype,
            "device": str(model.device),
            "slots": engine.slots,
        }
        return {"models": [shown]}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(measures.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _check(request: InferRequest, config: ServeConfig) -> None:
    """UserError for more than the service gives."""
    if not request.inputs:
        raise UserError("inputs is empty: give at least one puzzle.")
    limits = [
        ("inputs", len(request.inputs), config.most_inputs),
        ("augmentations", request.augmentations, config.most_augmentations),
        ("act_max_steps", request.act_max_steps or 1, config.most_act_steps),
    ]
    for field, value, most in limits:
        if value > most:
            raise UserError(f"{field}: {value} are asked for, and this service gives at most {most}.")
    if request.trajectory and request.augmentations > 1:
        raise UserError("trajectory cannot be combined with augmentations: each of them has its own.")


class _Guard:
    """Refuses bodies that are too long or too slow before they are read, ends what fails in a sentence, and counts."""

    def __init__(self, app: ASGIApp, config: ServeConfig, measures: Measures) -> None:
        self._app, self._config, self._measures = app, config, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        has_begun = False
        too_long = Refused(413, f"a request has at most {self._config.most_body_bytes} bytes.")
        deadline = began + self._config.seconds_per_request
        length = 0
        is_read = False
        broken: Refused | None = None  # what is wrong with the body, whatever the application makes of it

        async def receive_some() -> Message:
            nonlocal length, is_read, broken
            if is_read:  # what is left is the news that the client has gone
                return await receive()
            left = deadline - time.perf_counter()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0))
            except TimeoutError as error:
                broken = Refused(408, "the request did not arrive in time.")
                raise broken from error
            length += len(message.get("body", b""))
            if length > self._config.most_body_bytes:
                broken = too_long
                raise broken
            is_read = not message.get("more_body", False)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
            await send(message)

        async def send_some(message: Message) -> None:
            if broken and not has_begun:  # the framework would tell of a body that it cannot parse
                raise broken
            await send_noted(message)

        try:
            headers = dict(scope["headers"])
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > self._config.most_body_bytes:
                raise too_long
            await self._app(scope, receive_some, send_some)
        except Exception as error:
            problem = broken or (error if isinstance(error, Refused) else _failed(error))
            if not has_begun:
                headers_out = {"Connection": "close", **(problem.headers or {})}
                await JSONResponse({"error": problem.sentence}, problem.status, headers_out)(scope, receive, send_noted)
        finally:
            self._measures.count(scope["path"], status, time.perf_counter() - began)


def _failed(error: Exception) -> Refused:
    """For an error that nobody foresaw."""
    return Refused(500, f"the service failed ({shortened(f'{type(error).__name__}: {error}')}).")
