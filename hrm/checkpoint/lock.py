"""One living run a folder: a lock that says who holds it, and that nobody has to remove after a process died.

The file `.lock` in a run folder names the process that trains there. Two things show that this one lives:

- The operating system's lock on the file, for processes of the same host. It ends with the process, however that ends.
  (It is a lock of the process, `lockf`: one by `flock` would live on in loader workers that were forked from it.)
- Beats, for processes of other hosts that see the folder on a shared disk, whose locks not all file systems pass on: a
  thread changes the file's time every few seconds. Who wants the folder watches for a change, so clocks of hosts need
  not agree. A file that stays as it is for `LEASE_SECONDS` is that of a dead process.

A job that its scheduler starts again (torchrun after a failure, Slurm after a requeue) takes over at once what its
earlier attempt held on another host, since that one was ended before.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hrm.checkpoint.run_folder import cannot_write, make_folder
from hrm.errors import UserError
from hrm.reading import parse_json

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # on Windows, where beats must do
    lockf = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0

# A job's name and its attempt, in the environments of those that start jobs again.
JOBS = (("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"), ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))

_held: set[Path] = set()  # by this process, which the operating system's lock does not keep from itself


@dataclass(frozen=True)
class Holder:
    """The process that trains in a folder, as its lock file names it."""

    host: str
    pid: int
    since: str  # local time there
    token: str  # of this taking of the lock
    machine: str  # what host and processes a process id belongs to
    jobs: dict[str, tuple[str, int]]  # jobs that the process is part of, each with its attempt

    @classmethod
    def this_process(cls) -> Holder:
        jobs = {}
        for name, attempt in JOBS:
            if (job := os.environ.get(name, "none")) != "none":  # torchrun's name for jobs without one
                count = os.environ.get(attempt, "")
                jobs[name] = job, int(count) if count.isdecimal() else 0
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), since, uuid.uuid4().hex, _machine(), jobs)

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """None where nobody has written yet, or something that names no process."""
        try:
            fields = parse_json(os.pread(descriptor, 1 << 16, 0).decode())
            jobs = {str(name): (str(job), int(attempt)) for name, (job, attempt) in fields["jobs"].items()}
            host, since, token, machine = (_plain(fields[name]) for name in ("host", "since", "token", "machine"))
            return cls(host, int(fields["pid"]), since, token, machine, jobs)
        except (ValueError, OverflowError, TypeError, KeyError, AttributeError):
            return None

    def is_earlier_attempt_of(self, other: Holder) -> bool:
        """Whether the other process belongs to a later attempt at the same job."""
        for name, (job, attempt) in other.jobs.items():
            earlier_job, earlier_attempt = self.jobs.get(name, (None, 0))
            if earlier_job == job and earlier_attempt < attempt:
                return True
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class RunLock:
    """Holds a run folder for this process, from entering the context to leaving it.

    Attributes:
        lost: set when another process took the folder over, as this one gave no sign of life for too long. It must
            write there no more.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        """`say` is told when another process must be waited for."""
        self.lost = False
        self._folder = folder
        self._file = folder / LOCK_FILE
        self._say = say
        self._own = Holder.this_process()
        self._descriptor = -1
        self._ended = threading.Event()
        self._made_folders: list[Path] = []

    def __enter__(self) -> Self:
        """Take the lock, making the folder if it is missing.

        Raises:
            UserError: a living process holds it, which the sentence names; or the folder cannot be written.
        """
        # os.path, for pathlib raises errors about names that are too long.
        self._made_folders = [path for path in (self._folder, *self._folder.parents) if not os.path.exists(path)]
        try:
            make_folder(self._folder, "checkpoint_path")
            self._descriptor = self._take()
        except OSError as error:
            self._remove_empty_folders()
            if os.path.lexists(self._file) and (self._file.is_symlink() or not self._file.is_file()):
                raise UserError(f"{self._file} is not the file that a run leaves there: remove it.") from error
            raise cannot_write(self._folder, error) from error
        _held.add(self._file.resolve())
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        _held.discard(self._file.resolve())
        with suppress(OSError):
            if self._is_ours():
                self._file.unlink()
        os.close(self._descriptor)  # only now: a process that waits for it then finds that the file has gone
        self._remove_empty_folders()

    def _take(self) -> int:
        """Wait for what must be waited for, and return the descriptor of the file that names this process."""
        watched: tuple[str, int] | None = None
        since = time.monotonic()
        while True:
            if self._file.resolve() in _held:
                raise self._refusal(str(self._own))
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            is_locked, holder = _lock(descriptor), Holder.read(descriptor)
            is_current = _is_at(descriptor, self._file)  # else its holder removed it after we opened it
            is_here = holder is not None and holder.machine == self._own.machine
            if is_current and (is_locked if is_here else holder is None and is_locked is not False):
                if os.fstat(descriptor).st_nlink == 1:
                    return self._written(descriptor)
                os.close(descriptor)  # what has other names too, such as in a backup, stays as it is
                if (replaced := self._replace()) is not None:
                    return replaced
                continue
            beat = os.fstat(descriptor).st_mtime_ns
            os.close(descriptor)  # and opened anew for the next look: only then a shared disk shows changes for sure
            waited = time.monotonic() - since
            if not is_current:
                continue
            if holder is None:  # it has the lock and is about to write its name
                if waited > BEAT_SECONDS:
                    raise self._refusal("another process")
            elif is_here and is_locked is False:
                raise self._refusal(str(holder))
            elif holder.is_earlier_attempt_of(self._own) or (
                waited > LEASE_SECONDS and watched == (holder.token, beat)
            ):
                if (replaced := self._replace()) is not None:
                    return replaced
            elif watched is None:
                self._say(f"{self._folder} is held by {holder}: waiting up to {LEASE_SECONDS:g} s for a sign of life.")
                watched, since = (holder.token, beat), time.monotonic()
            elif watched != (holder.token, beat):
                raise self._refusal(str(holder))
            time.sleep(BEAT_SECONDS / 20)

    def _replace(self) -> int | None:
        """Put a file that names this process in the place of a dead one's; None if another process does so too."""
        temporary = self._file.with_name(f"{LOCK_FILE}.{self._own.token}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _lock(descriptor)
            self._written(descriptor)
            temporary.replace(self._file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        time.sleep(BEAT_SECONDS / 5)  # who saw the dead one's file at the same moment has replaced it by then
        if _is_at(descriptor, self._file):
            return descriptor
        os.close(descriptor)
        return None

    def _written(self, descriptor: int) -> int:
        """The descriptor, once its file names this process."""
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(self._own)).encode(), 0)
            os.fsync(descriptor)
        except OSError:  # such as on a full disk
            with suppress(OSError):
                if _is_at(descriptor, self._file):
                    self._file.unlink()
            os.close(descriptor)
            raise
        return descriptor

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self._file.stat()
                if not self._is_ours():
                    self.lost = True
                    return
                os.utime(self._file)
            except OSError:  # the folder was removed, or the disk does not answer: saving notices too, and can say it
                continue

    def _is_ours(self) -> bool:
        """Whether the file still names this process."""
        # Through our descriptor: if this process opened the file once more, closing that would end its lock.
        if not _is_at(self._descriptor, self._file):
            return False
        holder = Holder.read(self._descriptor)
        return holder is not None and holder.token == self._own.token

    def _refusal(self, holder: str) -> UserError:
        self._remove_empty_folders()
        return UserError(
            f"the run folder {self._folder} is held by {holder}: wait for its end or end it, or give another "
            "checkpoint_path."
        )

    def _remove_empty_folders(self) -> None:
        with suppress(OSError):
            for path in self._made_folders:
                path.rmdir()


def _machine() -> str:
    """Names what the process ids of this process belong to: a host since its start, or a container in it."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return _plain(" ".join(names))


def _lock(descriptor: int) -> bool | None:
    """Whether the operating system gave its lock; None where there are no locks."""
    if lockf is None:
        return None  # type: ignore[unreachable]
    try:
        lockf(descriptor, LOCK_EX | LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether a file is the one that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _plain(text: object) -> str:
    """Something from a file that others may have written, fit for the terminal."""
    return "".join(character for character in str(text)[:200] if character.isprintable())
