"""Places for puzzles, in slots and in line for them, and how soon they become free."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hrm.service.problems import Refused

_SECONDS_MEASURED = 60.0  # how far back the estimate looks
_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Room:
    """How many puzzles a service has taken on, and how many it can.

    Args:
        size: places in all.
        clock: seconds from any moment on.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.size, self.taken = size, 0
        self._clock = clock
        self._busy_since = 0.0
        self._freed: deque[tuple[float, int]] = deque()  # when, and how many places

    def has(self, places: int) -> bool:
        """Whether so many are free."""
        return self.taken + places <= self.size

    def take(self, places: int) -> None:
        if not self.taken:
            self._busy_since = self._clock()
            self._freed.clear()
        self.taken += places

    def give_back(self, places: int) -> None:
        self.taken -= places
        self._freed.append((self._clock(), places))
        self._forget()

    @contextmanager
    def held(self, places: int, what: str) -> Iterator[None]:
        """So many of them while the body runs.

        Args:
            what: takes them, for the sentence.

        Raises:
            Refused: not so many are free now.
        """
        if not self.has(places):
            seconds = self.seconds_until(places)
            sentence = f"{self.taken} {what} wait already; come again in {seconds} s."
            raise Refused(429, sentence, {"Retry-After": str(seconds)})
        self.take(places)
        try:
            yield
        finally:
            self.give_back(places)

    def seconds_until(self, places: int) -> int:
        """About when so many will be free, at the rate at which places became free lately: 1 to 60."""
        self._forget()
        lacking = self.taken + places - self.size
        seconds = min(self._clock() - self._busy_since, _SECONDS_MEASURED)
        freed = max(sum(count for _, count in self._freed), 1)
        return min(max(math.ceil(lacking * seconds / freed), 1), _LONGEST_WAIT)

    def _forget(self) -> None:
        oldest = self._clock() - _SECONDS_MEASURED
        while self._freed and self._freed[0][0] < oldest:
            self._freed.popleft()
