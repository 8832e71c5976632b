"""How tests ask a service for sessions, and make its engine wait."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from hrm.service.engine import Engine


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


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it never came to be"
        time.sleep(0.005)


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
