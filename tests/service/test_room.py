"""How soon there is room."""

import pytest

from hrm.service.room import Room


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_room(clock: Clock) -> None:
    room = Room(10, clock)
    assert room.has(10)
    assert not room.has(11)
    room.take(7)
    assert (room.taken, room.has(3), room.has(4)) == (7, True, False)
    room.give_back(7)
    assert room.has(10)


@pytest.mark.parametrize(
    ("per_second", "wanted", "seconds"),
    [
        (4, 1, 1),  # a quarter of a second
        (4, 20, 5),
        (0.5, 7, 14),
        (0.5, 60, 60),  # two minutes
    ],
)
def test_the_wait_is_that_of_what_was_measured(clock: Clock, per_second: float, wanted: int, seconds: int) -> None:
    room = Room(100, clock)
    room.take(100)
    for _ in range(100):
        clock.now += 1 / per_second
        room.give_back(1)
        room.take(1)
    assert room.seconds_until(wanted) == seconds


def test_only_what_is_recent_counts(clock: Clock) -> None:
    room = Room(100, clock)
    room.take(100)
    for seconds in (0.01, 1):  # a hundred times faster before
        for _ in range(200):
            clock.now += seconds
            room.give_back(1)
            room.take(1)
    assert room.seconds_until(10) == 10


def test_idle_time_does_not_count(clock: Clock) -> None:
    room = Room(4, clock)
    room.take(1)
    clock.now += 1
    room.give_back(1)
    clock.now += 50
    room.take(4)
    clock.now += 2
    room.give_back(1)
    room.take(1)
    assert room.seconds_until(1) == 2


def test_before_anything_was_measured(clock: Clock) -> None:
    room = Room(4, clock)
    room.take(4)
    assert room.seconds_until(1) == 1
    clock.now += 10  # nothing came free in ten seconds
    assert room.seconds_until(2) == 20
