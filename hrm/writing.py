"""Writing into folders that somebody else may have filled: nothing is written through a link that lies there."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hrm.errors import UserError


def is_special(file: Path) -> bool:
    """Whether it is a device, a pipe, or a name of an open file in /dev: written into, never removed."""
    try:
        mode = file.stat().st_mode
    except OSError:  # nothing is there, or a link to nothing
        return False
    names_open_file = file.is_symlink() and file.absolute().parent in (Path("/dev"), Path("/dev/fd"))
    return names_open_file or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A context that writes a file. What had its name is removed, be it a link or a file that shares its bytes.

    Raises:
        UserError: it cannot be written.
    """
    if is_special(file):
        raise UserError(f"{file} is no regular file: give another one.")
    try:
        file.unlink(missing_ok=True)
        yield file
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}): choose another folder.") from error
