"""The eight symmetries of the square, numbered as in the published packs."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Cell = TypeVar("_Cell", bound=np.generic)

NUM_DIHEDRAL = 8
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)


def dihedral(grids: NDArray[_Cell], number: int) -> NDArray[_Cell]:
    """Grids [..., r, c] mapped by one of the symmetries: 0 is the identity, 1 to 3 quarter turns
    (counterclockwise), 4 mirrors left and right, 5 up and down, 6 is the transpose, 7 the other diagonal's.
    """
    if number < 4:
        return np.rot90(grids, number, axes=(-2, -1))
    if number == 4:
        return grids[..., ::-1]
    if number == 5:
        return grids[..., ::-1, :]
    return grids.swapaxes(-2, -1) if number == 6 else np.rot90(grids, axes=(-2, -1))[..., ::-1]
