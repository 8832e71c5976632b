"""What is left of an error that nobody foresaw: one sentence on the terminal, and the traceback in a file."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hrm.errors import first_sentence, printable
from hrm.output import silence_if_broken

EXIT_UNFORESEEN = 1
_FOLDER = "traceback_folder"


@contextmanager
def traceback_folder(folder: Path) -> Iterator[None]:
    """A context whose unforeseen errors leave their tracebacks in `folder`; of several, the innermost counts."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, _FOLDER):
            with suppress(AttributeError, TypeError):  # of exceptions that take no attributes
                setattr(error, _FOLDER, folder)
        raise


def unforeseen(error: Exception) -> str:
    """What to say of an error that nobody foresaw, once its traceback is in a file (or printed, where none can be).

    Too little memory is foreseen; it is told without a traceback.
    """
    kind, reason = type(error).__name__, first_sentence(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return (
            f"there is too little memory ({reason}): make the batch (global_batch_size, or slots of hrm serve) or the "
            "model smaller, or split the batch (accumulate)."
        )
    text = "".join(traceback.format_exception(error))
    name = f"traceback_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.txt"
    for folder in (getattr(error, _FOLDER, None), Path.cwd()):
        if folder is None:
            continue
        file = folder / name
        with suppress(OSError):
            with file.open("x", encoding="utf-8", errors="backslashreplace") as stream:  # never through a link
                stream.write(text)
            return f"this was not foreseen ({kind}: {reason}): please report it with {file.resolve()}, its traceback."
    print(text, file=sys.stderr)
    return f"this was not foreseen ({kind}: {reason}), and no file can be written: please report it with the above."


def tell(sentence: str) -> None:
    """Print an error on stderr, on one line that steers no terminal."""
    with suppress(OSError, ValueError):  # the exit status says that there was one
        print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    if sys.stderr is not None:
        silence_if_broken(sys.stderr)
