"""A thread of its own writes what is to be recorded, so that no answer waits for the results store."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hrm.errors import printable
from hrm.results.records import AnsweredRequest, RecordError, StoreError

if TYPE_CHECKING:
    from hrm.results.store import Store

_MOST_AT_ONCE = 1000  # records written in one transaction ...
_MOST_BYTES_AT_ONCE = 1 << 22  # ... and their bytes
_RETRY_SECONDS = (0.1, 2.0)  # from one attempt to the next while the store fails: at first, and at most


@dataclass(frozen=True)
class Entry:
    """What is to be recorded, in a form that takes little memory."""

    id: str
    size: int  # bytes that it takes
    record: Callable[[], AnsweredRequest]


@dataclass(eq=False)
class _Kept:
    entry: Entry
    future: Future[None] | None = None  # done when it is in the store, for those who wait for that
    only_at_once: bool = False  # it is forgotten if the store fails now


class Recorder:
    """Records entries in their order, many at a time.

    While the store fails, entries are kept up to a bound, and written when it works again: each once, for the store
    knows them by their ids. One that cannot be kept is dropped and counted.

    Args:
        most_bytes: of entries that are kept.
    """

    def __init__(self, store: Store, most_bytes: int) -> None:
        self._store = store
        self._most_bytes = most_bytes
        self._kept: dict[str, _Kept] = {}  # by id, the oldest first
        self._bytes = 0
        self._recorded = self._dropped = 0
        self._is_failing = False
        self._delay = 0.0
        self._next_attempt = 0.0
        self._give_up_at: float | None = None  # once it is to end
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="hrm-recorder", daemon=True)
        self._thread.start()

    @property
    def kept(self) -> int:
        """Entries that are not in the store yet."""
        return len(self._kept)

    @property
    def recorded(self) -> int:
        """Entries that are."""
        return self._recorded

    @property
    def dropped(self) -> int:
        """Entries that never will be."""
        return self._dropped

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt to write failed."""
        return self._is_failing

    def put(self, entry: Entry) -> None:
        """Record an entry as soon as possible."""
        with self._changed:
            if self._bytes + entry.size > self._most_bytes or self._give_up_at is not None:
                self._dropped += 1
            else:
                self._add(_Kept(entry))

    def put_at_once(self, entry: Entry) -> Future[None]:
        """Record an entry now or not at all: the future fails with a `StoreError` or `RecordError` if it cannot be."""
        future = _new_future()
        with self._changed:
            self._add(_Kept(entry, future, only_at_once=True))
        return future

    def on_its_way(self, id: str) -> Future[None] | None:
        """If an entry is kept: a future that is done when it is recorded, or fails as `put_at_once` says."""
        with self._changed:
            if (kept := self._kept.get(id)) is None:
                return None
            kept.future = kept.future or _new_future()
            return kept.future

    def close(self, seconds: float) -> int:
        """Write what is kept, for so many seconds if the store fails, and end; how many entries could not be."""
        with self._changed:
            self._give_up_at = time.monotonic() + seconds
            self._changed.notify()
        self._thread.join(seconds + 10)  # a database that does not even fail is left alone
        self._store.close()
        with self._changed:
            self._dropped += len(self._kept)
        return len(self._kept)

    def _add(self, kept: _Kept) -> None:
        self._kept[kept.entry.id] = kept
        self._bytes += kept.entry.size
        self._changed.notify()

    # ---- its thread

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            try:
                if batch:
                    self._write(batch)
                else:
                    self._store.check_writable()
            except StoreError as error:
                self._fails(error)
            else:
                self._works()

    def _next(self) -> list[_Kept] | None:
        """Wait for entries; none to see whether the store works again, and None to end."""
        with self._changed:
            while True:
                now = time.monotonic()
                is_due = now >= self._next_attempt
                if self._give_up_at is not None and (not self._kept or (self._is_failing and now > self._give_up_at)):
                    return None
                if is_due and (self._kept or self._is_failing):
                    return self._first()
                self._changed.wait(None if is_due else self._next_attempt - now)

    def _first(self) -> list[_Kept]:
        batch: list[_Kept] = []
        size = 0
        for kept in self._kept.values():
            size += kept.entry.size
            if batch and (len(batch) == _MOST_AT_ONCE or size > _MOST_BYTES_AT_ONCE):
                break
            batch.append(kept)
        return batch

    def _write(self, batch: Sequence[_Kept]) -> None:
        """Record all, or each that can be."""
        problem: Exception | None = None
        try:
            self._store.add_requests([kept.entry.record() for kept in batch])
        except StoreError:
            raise
        except Exception as error:
            if half := len(batch) // 2:
                self._write(batch[:half])
                self._write(batch[half:])
                return
            problem = error if isinstance(error, RecordError) else RecordError(f"{type(error).__name__}: {error}.")
            _warn(f"one answer is not recorded: {problem}")
        with self._changed:
            for kept in batch:
                self._forget(kept)
            if problem:
                self._dropped += len(batch)
            else:
                self._recorded += len(batch)
            futures = [kept.future for kept in batch]
        for future in futures:
            _finish(future, problem)

    def _forget(self, kept: _Kept) -> None:
        del self._kept[kept.entry.id]
        self._bytes -= kept.entry.size

    def _fails(self, error: StoreError) -> None:
        first, most = _RETRY_SECONDS
        futures = []
        with self._changed:
            is_news, self._is_failing = not self._is_failing, True
            self._delay = min(2 * self._delay, most) or first
            self._next_attempt = time.monotonic() + self._delay
            for kept in list(self._kept.values()):
                futures.append(kept.future)
                kept.future = None
                if kept.only_at_once:
                    self._forget(kept)
        for future in futures:
            _finish(future, error)
        if is_news:
            _warn(
                f"{error.problem}: answers go on, and up to {self._most_bytes / (1 << 20):,.0f} MB of them are kept "
                "until they can be recorded."
            )

    def _works(self) -> None:
        with self._changed:
            is_news, self._is_failing = self._is_failing, False
            self._delay = self._next_attempt = 0.0
        if is_news:
            with suppress(OSError, ValueError):
                print(printable(f"{self._store} works again."), flush=True)


def _new_future() -> Future[None]:
    """One that nobody can cancel, for others may wait for it too."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _finish(future: Future[None] | None, problem: Exception | None) -> None:
    if future is not None and problem is not None:
        future.set_exception(problem)
    elif future is not None:
        future.set_result(None)


def _warn(sentence: str) -> None:
    with suppress(OSError, ValueError):
        print(printable(f"warning: {sentence}"), file=sys.stderr, flush=True)
