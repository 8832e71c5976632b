"""A bound on what a model may take of the memory, told before it is taken: options come from files, too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from hrm.errors import UserError

_BYTES = 4  # of a master weight
_left: ContextVar[int | None] = ContextVar("numbers_left", default=None)

ALWAYS_ALLOWED = 1 << 28
"""Numbers that any machine has room for, 1 GiB."""


@contextmanager
def at_most(numbers: int | None = None) -> Iterator[None]:
    """A context in which weights of at most so many numbers are made; None: of as many as this machine can hold.

    Within another such context, its bound counts too.
    """
    outer = _left.get()
    bounds = [bound for bound in (outer, memory_bytes() // _BYTES if numbers is None else numbers) if bound is not None]
    token = _left.set(min(bounds, default=None))
    try:
        yield
    finally:
        _left.reset(token)


def claim(shape: Sequence[int]) -> None:
    """Count a weight that is about to be made.

    Raises:
        UserError: it is too much.
    """
    left = _left.get()
    if left is None:
        return
    numbers = math.prod(shape)
    if numbers > left:
        raise UserError(
            f"the model's weights are too large for the memory or for the file they come from: one of shape "
            f"{tuple(shape)} takes {numbers * _BYTES / 1e9:,.1f} GB; make arch or the pack's vocabulary smaller."
        )
    _left.set(left - numbers)


def memory_bytes() -> int:
    """The memory of this machine; where the system does not tell, no bound."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
