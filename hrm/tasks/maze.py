"""Mazes: tokens, breadth-first search over many mazes at once, a checker of answers and random mazes.

A maze is a square grid of `n*n` cells, row by row: `#` wall, ` ` free, `S` start, `G` goal and, in an answer, `o` on
every cell of the path between the two. A path goes up, down, left and right; its length is its number of moves.

The search holds 64 mazes in the bits of one word: an array `[n, n, words]` is a set of cells in each of them, and one
numpy call moves all of them on.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrm.errors import UserError
from hrm.tasks.dihedral import NUM_DIHEDRAL, dihedral

Tokens = NDArray[np.uint8]  # of one maze [n*n]
Mazes = NDArray[np.uint8]  # tokens [N, n, n]
Cells = NDArray[np.bool_]  # a set of cells of each maze [N, n, n]
_Token = TypeVar("_Token", bound=np.generic)
_Words = NDArray[np.uint64]  # the same as bits [n, n, words]

CHARSET = "# SGo"
PAD_TOKEN, WALL, FREE, START, GOAL, PATH = range(len(CHARSET) + 1)
VOCAB_SIZE = len(CHARSET) + 1

# Lehnert et al. 2024 (Searchformer, arXiv 2402.14083) draw the share of cells that are walls from this range.
WALL_SHARES = (0.3, 0.5)

# Cells of the random mazes drawn together: bounds the memory, and keeps the search's words in the processor's cache.
_DRAWN_CELLS = 1 << 22
# So many random mazes in a row without a new one to keep, and the generator gives up.
PATIENCE = 1 << 18


# Text and tokens.


def side_of(cells: int) -> int:
    """Rows and columns of a maze with so many cells; UserError unless it is a square of 2x2 or more."""
    side = math.isqrt(cells)
    if side < 2 or side**2 != cells:
        raise UserError(f"No maze has {cells} cells; mazes are square, such as 900 cells for 30x30.")
    return side


def parse_maze(text: str) -> Tokens:
    """The tokens `[cells]` of a maze or of an answer written row by row in the characters `# SGo`.

    Raises:
        UserError: for another character, or a number of cells that is no square.
    """
    tokens = np.array([CHARSET.find(symbol) + 1 for symbol in text], dtype=np.uint8)
    if (tokens == 0).any():
        at = int((tokens == 0).argmax())
        raise UserError(f"Character {at + 1} of the maze is {text[at]!r}; write one of {CHARSET!r}.")
    side_of(len(tokens))
    return tokens


def render_text(tokens: NDArray[np.integer[Any]]) -> str:
    """A maze or answer `[cells]` as lines of `# SGo`; padding shows as `?`."""
    grid = tokens.reshape(side_of(tokens.size), -1)
    return "\n".join("".join(("?" + CHARSET)[token] for token in row) for row in grid)


def dihedral_images(mazes: NDArray[_Token]) -> NDArray[_Token]:
    """The 8 images `[N, 8, n, n]` of each maze under the symmetries of the square, the maze itself first.

    In the order of the published packs, see `hrm.tasks.dihedral`.
    """
    return np.stack([dihedral(mazes, number) for number in range(NUM_DIHEDRAL)], axis=1)


# Breadth-first search.


def _to_words(cells: Cells) -> _Words:
    count, rows, columns = cells.shape
    padded = np.zeros((rows, columns, -(-count // 64) * 64), dtype=np.bool_)
    padded[..., :count] = cells.transpose(1, 2, 0)
    return np.packbits(padded, axis=-1).view(np.uint64)


def _from_words(words: _Words, count: int) -> Cells:
    """The first `count` bits along the last axis, which becomes the first."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=count).view(np.bool_)
    return np.moveaxis(bits, -1, 0)


def _waves(passable: _Words, sources: _Words) -> Iterator[_Words]:
    """The cells at distance 0, 1, 2, ... from the sources through passable cells, until no maze has any left."""
    wave, unreached = sources, passable & ~sources
    while wave.any():
        yield wave
        spread = wave.copy()
        spread[1:] |= wave[:-1]
        spread[:-1] |= wave[1:]
        spread[:, 1:] |= wave[:, :-1]
        spread[:, :-1] |= wave[:, 1:]
        wave = spread & unreached
        unreached ^= wave


def _present(words: _Words) -> _Words:
    """For each maze, whether it has any cell: words `[words]`."""
    present: _Words = np.bitwise_or.reduce(words, axis=(0, 1))
    return present


def path_lengths(passable: Cells, sources: Cells, targets: Cells) -> NDArray[np.int64]:
    """Fewest moves `[N]` from a source to a target, both passable, through passable cells; -1 if there is no way."""
    count = len(passable)
    wanted = _to_words(targets)
    lengths = np.full(count, -1, dtype=np.int64)
    searching = _present(wanted)
    for distance, wave in enumerate(_waves(_to_words(passable), _to_words(sources))):
        found = _present(wave & wanted) & searching
        if found.any():
            lengths[_from_words(found, count)] = distance
            searching &= ~found
            if not searching.any():
                break
    return lengths


def _farthest(passable: Cells, sources: Cells, rng: np.random.Generator) -> tuple[NDArray[np.int64], Cells]:
    """Distance `[N]` of the cells that are farthest from the source, and one of them, drawn at random."""
    count = len(passable)
    lengths = np.zeros(count, dtype=np.int64)
    last = _to_words(sources)
    for wave in _waves(_to_words(passable), last):
        present = _present(wave)
        lengths += _from_words(present, count)
        last = (last & ~present) | wave
    return lengths - 1, _draw_cell(_from_words(last, count), rng)


def _draw_cell(cells: Cells, rng: np.random.Generator) -> Cells:
    """One random cell of each set that has any."""
    flat = cells.reshape(len(cells), math.prod(cells.shape[1:]))
    order = rng.random(flat.shape, dtype=np.float32)
    drawn = np.zeros_like(flat)
    drawn[np.arange(len(flat)), np.where(flat, order, -1).argmax(1)] = True
    return (drawn & flat).reshape(cells.shape)


# Answers.


def shortest_paths(mazes: Mazes) -> Mazes:
    """The mazes with one shortest path marked in each, its start reachable from its goal.

    Of several shortest paths it is the one that moves, from the start on, to the first cell in reading order.
    """
    count, rows = np.arange(len(mazes)), mazes.shape[1]
    # A border that nothing reaches spares the edges a case of their own.
    moves_left = np.full((len(mazes), rows + 2, rows + 2), -1, dtype=np.int64)
    inside = moves_left[:, 1:-1, 1:-1]
    for distance, wave in enumerate(_waves(_to_words(mazes != WALL), _to_words(mazes == GOAL))):
        inside[_from_words(wave, len(mazes))] = distance
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


def is_maze(inputs: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether each row `[B]` of tokens `[B, S]` is a maze: walls and free cells, one start and one goal."""
    one_of_each = [np.count_nonzero(inputs == end, axis=1) == 1 for end in (START, GOAL)]
    result: NDArray[np.bool_] = ((inputs >= WALL) & (inputs <= GOAL)).all(1) & one_of_each[0] & one_of_each[1]
    return result


def is_shortest_path(inputs: NDArray[np.integer[Any]], answers: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Whether each answer marks a shortest path through its maze and changes nothing else.

    Any of several shortest paths counts, so this never says less than exact match with a right label.

    Args:
        inputs, answers: tokens `[B, S]`, S a square number.

    Returns:
        `[B]`; false where the input is no maze, such as the padding of a batch.

    Raises:
        UserError: if S is not the number of cells of a square maze.
    """
    side = side_of(inputs.shape[1])
    mazes, marked = (tokens.reshape(-1, side, side) for tokens in (inputs, answers))
    starts, goals, path = mazes == START, mazes == GOAL, marked == PATH
    unchanged = (np.where(path, FREE, marked) == mazes).all((1, 2))
    # If the cells of the path connect start and goal in as few moves as there are cells, every one lies on the way.
    moves = np.count_nonzero(path, axis=(1, 2)) + 1
    connected = path_lengths(path | starts | goals, starts, goals) == moves
    shortest = path_lengths((mazes == FREE) | starts | goals, starts, goals) == moves
    result: NDArray[np.bool_] = is_maze(inputs) & unchanged & connected & shortest
    return result


# Random mazes.


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
    found: dict[bytes, Mazes] = {}  # by what is common to all images
    drawn = accepted = barren = 0
    with tqdm(desc="Generating", total=count, unit=" mazes", delay=2, leave=False) as progress:
        while len(found) < count:
            known = len(found)
            mazes = _draw(batch, side, min_length, rng)
            for images in dihedral_images(mazes):
                found.setdefault(min(map(bytes, images)), images[0])
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
