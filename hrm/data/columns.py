"""What a pack may say of each of its examples, in arrays beside the inputs: how hard it is, where it is from."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrm.data.pack import Pack
from hrm.errors import UserError
from hrm.reading import read_array


def _is_text(column: NDArray[Any]) -> bool:
    """Whether every code in an array of text is a character's; of others Python makes no string."""
    codes = np.ascontiguousarray(column.astype(column.dtype.newbyteorder("="))).view(np.uint32)
    return bool(((codes < 0xD800) | ((codes > 0xDFFF) & (codes < 0x110000))).all())


# The columns: what they hold, the kinds of arrays that hold it, and whether the values are such.
_COLUMNS: dict[str, tuple[str, str, Callable[[NDArray[Any]], bool]]] = {
    "ratings": ("numbers", "iuf", lambda column: bool(np.isfinite(column).all())),
    "sources": ("text", "U", _is_text),
}


def read_column(pack: Pack, column: str) -> NDArray[Any] | None:
    """What the arrays `<set>__<column>.npy` beside the inputs tell of every example of a split [N], in its order; None
    where a set has none, or all examples are alike.

    Args:
        column: ratings (numbers) or sources (text).

    Raises:
        UserError: such an array cannot be read, or has another length than its set.
    """
    kind, letters, is_valid = _COLUMNS[column]
    files = {name: pack.path / pack.split / f"{name}__{column}.npy" for name in pack.sets}
    if not all(file.is_file() for file in files.values()):
        return None
    parts = []
    for name, file in files.items():
        count = len(pack.sets[name].inputs)
        try:
            part = read_array(file, letters, kind)
        except (ValueError, OSError) as error:
            raise UserError(f"{file} is torn or is not a plain .npy file ({error}); build the pack again.") from error
        if part.shape != (count,):
            raise UserError(
                f"{file} has shape {part.shape} of {part.dtype}, but its set has {count} examples; write {kind}, one "
                "for each."
            )
        if not is_valid(part):
            raise UserError(f"{file} holds values that are not {kind}; build the pack again.")
        parts.append(part)
    values = np.concatenate(parts)
    return values if len(np.unique(values)) > 1 else None
