"""Fewest moves that solve a board of Rush Hour, the puzzle of cars that stand in each other's way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

RED = "A"  # the car that must reach the right edge
WALL, EMPTY = "x", "."


class Car(NamedTuple):
    """A car moves along one line of cells: `cells[i]` is where its first cell is at position i."""

    name: str
    length: int
    cells: tuple[int, ...]  # of its line
    walls: frozenset[int]  # positions on the line that hold a wall


State = tuple[int, ...]  # the position of each car on its line


def fewest_moves(board: str, most_states: int = 500_000) -> str | None:
    """Moves such as `F+1 K-2` that bring car A to the right edge: cars by name, right and down positive.

    Of several shortest solutions it is the first that a breadth-first search meets, cars in the order of their names. A
    move takes one car over any number of free cells.

    Args:
        board: lines of equal length, letters for cars, `x` for walls, `.` for free cells.
        most_states: that the search looks at.

    Returns:
        None where there is none, or none was found among `most_states`.
    """
    lines = board.split()
    width, cells = len(lines[0]), "".join(lines)
    cars, start = _cars(cells, width)
    goal = len(cars[0].cells) - cars[0].length
    came_from: dict[State, tuple[State, str]] = {start: (start, "")}
    level = [start]
    while level and len(came_from) < most_states:
        following = []
        for state in level:
            for after, move in _moves(cars, state):
                if after not in came_from:
                    came_from[after] = (state, move)
                    if after[0] == goal:
                        return _path(came_from, after)
                    following.append(after)
        level = following
    return None


def _cars(cells: str, width: int) -> tuple[list[Car], State]:
    cars, start = [], []
    for name in sorted(set(cells) - {WALL, EMPTY}):
        held = [index for index, cell in enumerate(cells) if cell == name]
        first = held[0]
        if held[1] == first + 1:
            line = range(first - first % width, first - first % width + width)
        else:
            line = range(first % width, len(cells), width)
        walls = frozenset(place for place, cell in enumerate(line) if cells[cell] == WALL)
        cars.append(Car(name, len(held), tuple(line), walls))
        start.append(line.index(first))
    assert cars[0].name == RED
    return cars, tuple(start)


def _moves(cars: list[Car], state: State) -> Iterator[tuple[State, str]]:
    taken = {cell for car, at in zip(cars, state, strict=True) for cell in car.cells[at : at + car.length]}
    for index, (car, at) in enumerate(zip(cars, state, strict=True)):
        for ahead, step in ((range(at + car.length, len(car.cells)), 1), (range(at - 1, -1, -1), -1)):
            for count, front in enumerate(ahead, start=1):
                if front in car.walls or car.cells[front] in taken:
                    break
                yield (*state[:index], at + count * step, *state[index + 1 :]), f"{car.name}{count * step:+d}"


def _path(came_from: dict[State, tuple[State, str]], state: State) -> str:
    moves = []
    while came_from[state][1]:
        state, move = came_from[state]
        moves.append(move)
    return " ".join(reversed(moves))
