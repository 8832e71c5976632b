"""Writing into folders that somebody else may have filled: nothing is written through a link that lies there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hrm.errors import UserError


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A context that writes a file. What had its name is removed, be it a link or a file that shares its bytes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.unlink(missing_ok=True)
        yield file
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}): choose another folder.") from error
