"""Random mazes and shortest paths through them, many at once."""

import math

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.errors import UserError
from hrm.tasks.maze import (
    FREE,
    GOAL,
    PATH,
    START,
    WALL,
    Cells,
    Mazes,
    dihedral_variants,
    farthest,
    from_words,
    to_words,
    waves,
)

# Lehnert et al. 2024 (Searchformer, arXiv 2402.14083) draw the share of cells that are walls from this range.
WALL_SHARES = (0.3, 0.5)

# Cells of the random mazes drawn together: bounds the memory, and keeps the search's words in the processor's cache.
_DRAWN_CELLS = 1 << 22
# So many random mazes in a row without a new one to keep, and the generator gives up.
PATIENCE = 1 << 18


def shortest_paths(mazes: Mazes) -> Mazes:
    """The mazes with one shortest path marked in each, its start reachable from its goal.

    Of several shortest paths it is the one that moves, from the start on, to the first cell in reading order.
    """
    count, rows = np.arange(len(mazes)), mazes.shape[1]
    # A border that nothing reaches spares the edges a case of their own.
    moves_left = np.full((len(mazes), rows + 2, rows + 2), -1, dtype=np.int64)
    inside = moves_left[:, 1:-1, 1:-1]
    for distance, wave in enumerate(waves(to_words(mazes != WALL), to_words(mazes == GOAL))):
        inside[from_words(wave, len(mazes))] = distance
    answers = mazes.copy()
    _, row, column = np.nonzero(mazes == START)
    left = inside[count, row, column]
    reading_order = np.array([(-1, 0), (0, -1), (0, 1), (1, 0)])
    while (left > 1).any():
        near = row[:, None] + reading_order[:, 0], column[:, None] + reading_order[:, 1]
        closer = moves_left[count[:, None], near[0] + 1, near[1] + 1] == left[:, None] - 1
        step = reading_order[closer.argmax(1)] * (left > 1)[:, None]
        row, column, left = row + step[:, 0], column + step[:, 1], np.maximum(left - 1, 1)
        here = answers[count, row, column]
        answers[count, row, column] = np.where(here == FREE, PATH, here)
    return answers


def random_mazes(count: int, side: int, min_length: int, rng: np.random.Generator) -> tuple[Mazes, float]:
    """Different random mazes `[count, side, side]` whose shortest path has `min_length` moves or more.

    Walls are drawn as by Lehnert et al. 2024: each cell with a probability which itself is drawn for each maze. Start
    and goal are not drawn at random as there, which would make one maze in 70 000 long enough at 30x30 and 110 moves:
    the start is a cell farthest from a random free cell, the goal a cell farthest from the start. So a maze with few
    long paths comes as often as one with many, and paths are a little longer (there 116 moves on average, not 115).
    No maze is a rotation or reflection of another.

    Returns:
        The mazes, and the share of random mazes that have a path so long.

    Raises:
        UserError: if random search finds no more.
    """
    batch = max(_DRAWN_CELLS // side**2 // 64, 1) * 64
    found: dict[bytes, Mazes] = {}  # by what is common to all variants
    drawn = accepted = barren = 0
    with tqdm(desc="Generating", total=count, unit=" mazes", delay=2, leave=False) as progress:
        while len(found) < count:
            known = len(found)
            mazes = _draw(batch, side, min_length, rng)
            for variants in dihedral_variants(mazes):
                found.setdefault(min(map(bytes, variants)), variants[0])
            drawn, accepted = drawn + batch, accepted + len(mazes)
            progress.update(min(len(found), count) - known)
            barren = 0 if len(found) > known else barren + batch
            if barren >= PATIENCE:
                raise UserError(
                    f"Only {known} of {count} mazes of {side}x{side} cells with shortest paths of {min_length} or more "
                    f"were found ({barren} random mazes in a row gave no new one); ask for fewer or for shorter paths."
                )
    return np.stack(list(found.values())[:count]), accepted / drawn


def _draw(count: int, side: int, min_length: int, rng: np.random.Generator) -> Mazes:
    """Those of `count` random mazes that have a path so long."""
    shares = rng.uniform(*WALL_SHARES, (count, 1, 1)).astype(np.float32)
    passable = rng.random((count, side, side), dtype=np.float32) >= shares
    sources = _draw_cell(passable, rng)
    # From any cell of a region, the farthest is at least half as far as the region's two farthest are apart.
    far, starts = _farthest(passable, sources, rng)
    passable, starts = (cells[2 * far >= min_length] for cells in (passable, starts))
    lengths, goals = _farthest(passable, starts, rng)
    mazes = np.where(passable, np.uint8(FREE), np.uint8(WALL))
    mazes[starts], mazes[goals] = START, GOAL
    return mazes[lengths >= min_length]


def _farthest(passable: Cells, sources: Cells, rng: np.random.Generator) -> tuple[NDArray[np.int64], Cells]:
    """Distance `[N]` of the cells that are farthest from the source, and one of them, drawn at random."""
    lengths, cells = farthest(passable, sources)
    return lengths, _draw_cell(cells, rng)


def _draw_cell(cells: Cells, rng: np.random.Generator) -> Cells:
    """One random cell of each set that has any."""
    flat = cells.reshape(len(cells), math.prod(cells.shape[1:]))
    order = rng.random(flat.shape, dtype=np.float32)
    drawn = np.zeros_like(flat)
    drawn[np.arange(len(flat)), np.where(flat, order, -1).argmax(1)] = True
    return (drawn & flat).reshape(cells.shape)
