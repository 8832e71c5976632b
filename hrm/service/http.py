"""The service's HTTP interface, a FastAPI application around one engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrm.config import ServeConfig
from hrm.errors import UserError, shortened
from hrm.service import page
from hrm.service.answering import answer, places, read_inputs
from hrm.service.engine import Closed, Engine
from hrm.service.measures import Measures
from hrm.service.messages import InferRequest, InferResponse
from hrm.service.modules import Modules
from hrm.service.problems import PROBLEMS, Problem, Refused, all_of, gone
from hrm.service.results import Results, asked_for
from hrm.service.room import Room
from hrm.version import __version__

_SHORT_BODY = 1 << 14  # bytes whose puzzles are read in a millisecond or two
_SECONDS_TO_RECORD = 5.0  # what was answered when the service ends, though the results store fails
_ABOUT_KEY = "any text of the client's own: a repeated request of the same key gets the answer of the first"


def make_app(engine: Engine, config: ServeConfig, name: str, results: Results | None = None) -> FastAPI:
    """The application.

    Args:
        name: what to call the model.
        results: where answers are recorded; written to its end when the application ends.
    """
    modules = Modules(engine, config, name)
    measures = Measures(engine, modules, results.recorder if results else None, config.most_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # One thread for `asyncio.to_thread`: with several, the event loop would wait for its turn as one of many.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "hrm-inputs"))
        await modules.memory.check()
        with suppress(asyncio.CancelledError):  # after a second Ctrl-C
            yield
        await asyncio.to_thread(engine.close)
        if results is not None:
            await asyncio.to_thread(results.recorder.close, _SECONDS_TO_RECORD)
        await modules.memory.close()

    # The pages that FastAPI can show of an API load scripts from other hosts: left out.
    app = FastAPI(
        title="hrm serve",
        version=__version__,
        summary="Answers of a Hierarchical Reasoning Model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to an address made of the header Host, which is anybody's
    )
    app.add_middleware(_Guard, config=config, measures=measures)
    if results is not None:
        app.include_router(results.router())
    app.include_router(page.router)
    room = Room(engine.slots + config.most_waiting)
    drawn = page.drawn(engine.model.task, engine.model.form)

    @app.exception_handler(Refused)
    async def refused(_: Request, problem: Refused) -> Response:
        return problem.response()

    @app.exception_handler(HTTPException)
    async def by_the_framework(_: Request, problem: HTTPException) -> Response:
        said = "the body cannot be read as JSON" if problem.status_code == 400 else str(problem.detail).rstrip(".")
        headers = dict(problem.headers or {})
        return Refused(problem.status_code, f"{said}; GET /openapi.json says what there is.", headers).response()

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        if first["type"] == "json_invalid":
            return Refused(422, f"the body is no JSON: {shortened(str(first['ctx']['error']))}.").response()
        if first["loc"] == ("body",) and isinstance(first["input"], bytes):  # it was not even read as JSON
            return Refused(422, "the header Content-Type: application/json is missing.").response()
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        said = shortened(str(first["msg"]))
        return Refused(422, f"{where}: {said}; GET /openapi.json says what a request holds.").response()

    @app.post("/infer", response_model=InferResponse, responses=PROBLEMS)
    async def infer(
        request: InferRequest,
        http: Request,
        idempotency_key: Annotated[str | None, Header(alias="Idempotency-Key", description=_ABOUT_KEY)] = None,
    ) -> Response:
        began = time.perf_counter()
        try:
            _check(request, config)
            if len(await http.body()) <= _SHORT_BODY:
                puzzles, index = read_inputs(request.inputs, engine)
            else:  # in a thread: they would hold up the event loop
                puzzles, index = await asyncio.to_thread(read_inputs, request.inputs, engine)
            if len(http.headers.getlist("Idempotency-Key")) > 1:
                raise UserError("Idempotency-Key is given more than once.")
            wanted = len(puzzles) * places(engine, request.augmentations)
            max_steps = request.act_max_steps or config.act_max_steps
            _check_puzzles(request, len(puzzles), wanted, max_steps)
        except UserError as error:
            raise Refused(422, str(error)) from error

        async def computed() -> InferResponse:
            with room.held(wanted, "puzzles"):
                asked = answer(
                    puzzles,
                    engine,
                    max_steps,
                    augmentations=request.augmentations,
                    trajectory=request.trajectory,
                    request=http,
                )
                try:
                    (answers,) = await all_of([asyncio.ensure_future(asked)], http, config.seconds_per_request)
                except Closed as error:
                    raise Refused(503, f"{error}.") from error
                except UserError as error:
                    raise Refused(422, str(error)) from error
            return InferResponse(
                answers=[each.value for each in answers],
                texts=[each.text for each in answers],
                q_halt=[each.q_halt for each in answers],
                steps=[each.steps for each in answers],
                index=index,
                trajectory=[each.trajectory or [] for each in answers] if request.trajectory else None,
                tokens=[each.tokens() for each in answers] if request.tokens else None,
                model=name,
                ms=round(1000 * (time.perf_counter() - began), 3),
            )

        if results is not None:
            content = await results.answered(asked_for(request, puzzles, index, idempotency_key), computed)
        elif idempotency_key is not None:
            raise Refused(422, "Idempotency-Key: this service records no answers (results=none), so it repeats none.")
        else:
            content = (await computed()).model_dump_json(exclude_none=True)
        return Response(content, media_type="application/json")

    def _check_puzzles(request: InferRequest, count: int, wanted: int, max_steps: int | None) -> None:
        """UserError where the service could never answer."""
        if wanted > room.size:
            raise UserError(
                f"{wanted} puzzles and augmentations are asked for at once, and {room.size} can be: ask in parts."
            )
        tokens = count * (max_steps or engine.model.act_max_steps) * engine.model.form.seq_len
        if request.trajectory and tokens > config.most_trajectory_tokens:
            raise UserError(
                f"trajectory: {tokens} tokens may be to show, and this service gives at most "
                f"{config.most_trajectory_tokens}: ask for fewer inputs or ACT steps."
            )

    app.include_router(modules.router())

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
        return {"models": [shown | drawn]}

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
            raise UserError(f"{field}: {shortened(value)} are asked for, and this service gives at most {most}.")
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
                if message["type"] == "http.disconnect":
                    broken = gone()
                    raise broken
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
            # The connection leaves out the body of what answers HEAD.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(asked, receive_some, send_some)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: what is left when the time to drain is up
            problem = broken or (error if isinstance(error, Refused) else _failed(error))
            if not has_begun:
                await problem.response(Connection="close")(scope, receive, send_noted)
        finally:
            self._measures.count(scope["path"], status, time.perf_counter() - began)


def _failed(error: BaseException) -> Refused:
    """For an error that nobody foresaw, and for a request whose task is cancelled."""
    if isinstance(error, asyncio.CancelledError):
        return Refused(503, "the service is ending.")
    return Refused(500, f"the service failed ({shortened(f'{type(error).__name__}: {error}')}).")
