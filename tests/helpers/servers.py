"""Real servers of other programs, on free ports of the loopback address, in folders of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A program that listens at a port, and can be killed and started again.

    Args:
        command: starts it in the foreground.
        port: of the loopback address, at which it listens.
        log: a file for what it prints.
        answers: whether it answers at that port.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, answers: Callable[[int], bool]) -> None:
        self.port = port
        self._command, self._log, self._answers = list(command), log, answers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers; one that finds traces of its former self is started again."""
        until = time.monotonic() + 30
        while self._process is None or not self._answers(self.port):
            assert time.monotonic() < until, self._log.read_text()
            if self._process is None or self._process.poll() is not None:
                with self._log.open("ab") as log:
                    # A group of its own: `kill` then reaches the processes that it starts.
                    self._process = subprocess.Popen(
                        self._command, stdout=log, stderr=log, cwd=self._log.parent, start_new_session=True
                    )
            time.sleep(0.02)

    def kill(self) -> None:
        """End it and all of its processes by SIGKILL."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def stop(self) -> None:
        """End it by SIGINT, so that it leaves nothing behind."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None


_URL = "postgresql://hrm:of-no-use@127.0.0.1:{port}/postgres"


@contextmanager
def postgresql() -> Iterator[tuple[Server, str]]:
    """PostgreSQL that runs, with an empty database, and the URL of that; skips the test where it is not installed."""
    programs = _programs("postgres", "/usr/lib/postgresql/*/bin")
    psycopg = pytest.importorskip("psycopg")

    def answers(port: int) -> bool:
        try:
            psycopg.connect(_URL.format(port=port)).close()
        except psycopg.OperationalError:
            return False
        return True

    # PostgreSQL refuses to run as root. Then it is its own user who must be able to enter the folder.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="hrm-postgresql-") as temporary:
        folder = Path(temporary)
        if as_user:
            shutil.chown(folder, "postgres", "postgres")
        data, port = str(folder / "data"), free_port()
        initdb = [*as_user, str(programs / "initdb"), "-D", data, "-U", "hrm", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initdb, "--locale=C", "--no-sync"], check=True, capture_output=True, cwd=folder)
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",  # processes are killed here, no machine loses its power
            "shared_buffers": "8MB",
        }
        command = [*as_user, str(programs / "postgres"), "-D", data, "-p", str(port)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        server = Server(command, port, folder / "log", answers)
        try:
            server.start()
            yield server, _URL.format(port=port)
        finally:
            server.stop()


@contextmanager
def redis(password: str = "") -> Iterator[tuple[Server, str]]:
    """An empty Redis that runs, and its URL; skips the test where it is not installed. It forgets nothing when killed.

    Args:
        password: that it asks for.
    """
    program = shutil.which("redis-server") or pytest.skip("redis-server is not installed")
    package = pytest.importorskip("redis")

    def answers(port: int) -> bool:
        try:
            with package.Redis("127.0.0.1", port, password=password or None) as client:
                return bool(client.ping())
        except package.ConnectionError:  # also while it reads what it wrote before
            return False

    with tempfile.TemporaryDirectory(prefix="hrm-redis-") as temporary:
        folder, port = Path(temporary), free_port()
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--requirepass", password]
        server = Server(command, port, folder / "log", answers)
        try:
            server.start()
            secret = f":{quote(password, safe='')}@" if password else ""
            yield server, f"redis://{secret}127.0.0.1:{port}/0"
        finally:
            server.stop()


def _programs(name: str, pattern: str) -> Path:
    """The folder of a program, on the PATH or among those of Debian's packages, the newest."""
    if found := shutil.which(name):
        return Path(found).resolve().parent
    folders = sorted(Path("/").glob(pattern.lstrip("/")))
    if not folders:
        pytest.skip(f"{name} is not installed")
    return folders[-1]
