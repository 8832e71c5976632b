"""The service in a thread and as a process, how tests ask it for sessions, and waiting for what others do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from hrm.config import ServeConfig
from hrm.inference.model import TrainedModel
from hrm.service.command import settings_of
from hrm.service.engine import Engine
from hrm.service.http import make_app
from tests.helpers.entry_points import ROOT


def client_of(model: TrainedModel, **options: Any) -> TestClient:
    """A client of a service with four slots, by way of no network."""
    return TestClient(make_app(Engine(model, 4), ServeConfig(checkpoint="none", **options), "small"))


def update(client: TestClient, level: str, **request: Any) -> dict[str, Any]:
    response = client.post(f"/infer/{level}", json=request)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def refused(client: TestClient, status: int, level: str = "L", **request: Any) -> str:
    """The sentence of a request that is refused."""
    response = client.post(f"/infer/{level}", json=request)
    assert (response.status_code, response.json().keys()) == (status, {"error"})
    return str(response.json()["error"])


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Return as soon as it holds; fail if it does not within so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.005)


@contextmanager
def in_a_thread(app: FastAPI, config: ServeConfig) -> Iterator[tuple[uvicorn.Server, tuple[str, int]]]:
    """The service in a thread, with real connections."""
    server = uvicorn.Server(settings_of(app, config))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield server, listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(60)


@contextmanager
def held(*engines: Engine) -> Iterator[threading.Event]:
    """Engines compute nothing until it is set."""
    event = threading.Event()

    def wait(entered: threading.Event) -> Generator[None, None, None]:
        entered.set()
        event.wait(60)
        yield

    try:
        for engine in engines:
            engine.run(wait(entered := threading.Event()))
            assert entered.wait(30)
        yield event
    finally:
        event.set()


@contextmanager
def served(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`hrm serve` on a CPU at a free port, once it listens, and its URL; killed at the end."""
    argv = [sys.executable, "-m", "hrm", "serve", f"checkpoint={checkpoint}", "port=0", "device=cpu", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(argv, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Serving "):
                break
        else:
            assert process.stderr is not None
            pytest.fail(process.stderr.read())
        yield process, line.split()[3]
        process.kill()
