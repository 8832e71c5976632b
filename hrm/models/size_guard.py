"""A bound on what a model may take of the memory, told before it is taken: options come from files, too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from hrm.errors import UserError

_BYTES = 4  # of a master weight
_NO_BOUND = 1 << 62
_left: ContextVar[int | None] = ContextVar("numbers_left", default=None)

ALWAYS_ALLOWED = 1 << 28
"""Numbers that any machine has room for, 1 GiB."""


@contextmanager
def at_most(numbers: int | None = None) -> Iterator[None]:
    """A context in which weights of at most so many numbers are made; None: of as many as fit `memory_bytes`.

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
    """What a process may have: the machine's memory, or less where its control group (a container, a Slurm job) or
    `ulimit -v` says so; where the system does not tell, no bound."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        machine = _NO_BOUND
    return min(machine, _control_group_bytes(), _address_space_bytes())


def _control_group_bytes(root: Path = Path("/")) -> int:
    """The least that a control group around this process allows, of version 1 or 2.

    Args:
        root: of the file system.
    """
    least = _NO_BOUND
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                top, name = root / "sys/fs/cgroup", "memory.max"
            elif "memory" in controllers.split(","):
                top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            else:
                continue
            own = top / group.lstrip("/")  # in a container this may be a path of the host, and missing
            for folder in (own, *own.parents):
                with suppress(OSError, ValueError):  # "max" is no number
                    least = min(least, int((folder / name).read_text(encoding="ascii")))
                if folder == top:
                    break
    return least


def _address_space_bytes() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return _NO_BOUND
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return _NO_BOUND if soft == resource.RLIM_INFINITY else soft
