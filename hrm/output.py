"""Output that nobody can read any more: a closed pipe, a full disk, a terminal that is gone. It ends no work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

from hrm.errors import UserError


class UnbreakableStream:
    """A text stream whose `write` and `flush` never raise: what cannot be written is dropped.

    Attributes:
        error: the last of what was not written for another reason than that nobody reads any more.
    """

    def __init__(self, stream: TextIO) -> None:
        # Not around another one, which would keep errors to itself.
        self._stream: TextIO = stream._stream if isinstance(stream, UnbreakableStream) else stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write, if that works; the number of characters, as if it had."""
        with self._note():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._note():
            self._stream.flush()

    @contextmanager
    def _note(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.error = error
        except ValueError:  # the stream was closed
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """A context in which `sys.stdout` and `sys.stderr` never raise, nor does Python when it flushes them at its end."""
    occupy_standard_descriptors()
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
                    silence_if_broken(stream)


@contextmanager
def output_that_counts() -> Iterator[None]:
    """As `unbreakable_output`, for work whose result is what it prints.

    Raises:
        UserError: it could not be printed, for another reason than that its reader left.
    """
    with unbreakable_output():
        out = sys.stdout
        yield
        out.flush()
    if isinstance(out, UnbreakableStream) and out.error is not None:
        raise UserError(f"the output cannot be written ({out.error.strerror}): send it elsewhere.")


def bar_interval() -> float:
    """Seconds between two states of a progress bar on stderr: a terminal overwrites them, a file keeps them all."""
    with suppress(OSError, ValueError, AttributeError):  # of a stream that was closed, or none
        if sys.stderr.isatty():
            return 0.1
    return 10.0


def occupy_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that the caller closed, or the next files opened would get what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def silence_if_broken(stream: TextIO) -> None:
    """Send a stream that cannot be written nowhere, so that Python does not fail over it at its end."""
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
