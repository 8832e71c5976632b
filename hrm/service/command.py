"""What `hrm serve` does: load a model, listen, and answer until a signal comes."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from hrm.config import ServeConfig
from hrm.errors import UserError, printable_lines
from hrm.inference.model import TrainedModel, from_pretrained
from hrm.reading import sha256_of
from hrm.results import open_store
from hrm.results.records import StoreError
from hrm.service.connection import BACKLOG, connection_class, connections_allowed
from hrm.service.engine import Engine
from hrm.service.http import make_app
from hrm.service.memory import check_memory
from hrm.service.results import Results

_SECONDS_TO_SWITCH = 0.0002  # after which a thread of Python has to let another one go on; Python's own: 0.005


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what is at hand and end.

    Raises:
        UserError: there is no such model, or nothing can listen at the address.
    """
    config = replace(config, most_connections=connections_allowed(wanted := config.most_connections))
    if config.most_connections < wanted:
        print(
            f"At most {config.most_connections} connections at a time, not {wanted}: this process may have no more "
            "files open (ulimit -n).",
            flush=True,
        )
    check_memory(config.memory)
    with _listening(config.host, config.port) as listener:  # before the model is loaded: that takes longer
        model = from_pretrained(
            config.checkpoint,
            device=config.device,
            dtype=config.dtype,
            kernels=config.kernels,
            quantize=config.quantize,
            data_path=config.data_path,
        )
        name = Path(config.checkpoint).name or config.checkpoint
        results = results_of(config, model, name)
        engine = Engine(model, config.slots)
        engine.warm_up()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        slots = "1 slot" if engine.slots == 1 else f"{engine.slots} slots"
        listens = f"Serving {name} at http://{shown}:{port} with {slots}; a browser shows a page there."
        records = "Answers are not recorded: results=none." if results is None else f"Answers are recorded: {results}."
        print(printable_lines(f"{model!r}\n{records}\n{listens}"), flush=True)
        run(engine, config, name, listener, results)
    if results is not None and (lost := results.recorder.kept):
        raise UserError(f"{lost} answers that were given could not be recorded: {results} does not work.")


def results_of(config: ServeConfig, model: TrainedModel, name: str) -> Results | None:
    """Where answers are recorded.

    Args:
        name: what the service calls the model.

    Raises:
        UserError: that cannot be used.
    """
    if config.results == "none":
        return None
    try:
        store = open_store(config.results)
        store.check_writable()
    except StoreError as error:
        raise UserError(f"{error.problem}: put that right, give another, or results=none to record nothing.") from error
    return Results(store, config.most_unrecorded_bytes, name, sha256_of(model.checkpoint.weights_file))


def run(
    engine: Engine, config: ServeConfig, name: str, listener: socket.socket, results: Results | None = None
) -> None:
    """Answer what comes in there, until SIGTERM or Ctrl-C."""
    # The engine's thread needs the interpreter a few times between two ACT steps, while the device waits.
    sys.setswitchinterval(_SECONDS_TO_SWITCH)
    settings = settings_of(make_app(engine, config, name, results), config)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn passes a signal on when all is answered; it has been heard by then.
        signal.signal(number, lambda *_: None)
    # Python's search for garbage stops all threads. What there is by now, PyTorch above all, stays: it is left out.
    gc.collect()
    gc.freeze()
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        gc.unfreeze()


def settings_of(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn runs an application."""
    return uvicorn.Config(
        app,
        http=connection_class(config.seconds_per_request, config.most_connections),
        ws="none",
        backlog=BACKLOG,
        log_level="error",  # not a line for everything that clients send
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=round(config.seconds_to_drain),
    )


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen at host={host} port={port} ({reason}); port=0 takes any that is free."
        ) from error
    return listener
