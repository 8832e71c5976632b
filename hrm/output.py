"""Output that nobody can read any more: a closed pipe, a full disk, a terminal that is gone. It ends no work."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


class UnbreakableStream:
    """A text stream whose `write` and `flush` never raise: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that works; the number of characters, as if it had."""
        with suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """A context in which `sys.stdout` and `sys.stderr` never raise, nor does Python when it flushes them at its end."""
    former = sys.stdout, sys.stderr
    with ExitStack() as stack:
        # One is None where its descriptor was closed before Python started.
        sys.stdout, sys.stderr = (
            UnbreakableStream(stream or stack.enter_context(open(os.devnull, "w"))) for stream in former
        )
        try:
            yield
        finally:
            sys.stdout, sys.stderr = former
            for stream in former:
                if stream is not None:
                    _silence_if_broken(stream)


def occupy_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that the caller closed, or the next files opened would get what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _silence_if_broken(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let what is written to a stream from now on, and what it still holds, go nowhere."""
    with suppress(OSError, ValueError):  # of a stream without a descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
