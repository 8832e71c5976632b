"""Weights of which matrices are stored as int8: half the size of bfloat16, and read by everything that reads weights.

Each row of a matrix NAME [N, K] has a scale of its own: `NAME` holds int8, and `NAME_scale` [N] what it is multiplied
by. Scales are those of `hrm.kernels.int8`, so that a model which computes in int8 computes with what is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hrm.errors import UserError, shortened
from hrm.kernels.int8 import Int8Matrix, dequantize, quantize

_SCALE = "_scale"


def to_int8(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Weights with those of these names, matrices, as int8 and scales."""
    stored = dict(weights)
    for name in names:
        stored[name], stored[name + _SCALE] = quantize(weights[name])
    return stored


def from_int8(weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Weights with what `to_int8` stored as int8 in float32.

    Args:
        file: where they are from, for errors.

    Raises:
        UserError: the scales of a matrix are missing, or are not one for each of its rows.
    """
    plain = dict(weights)
    for name, values in weights.items():
        if values.dtype != torch.int8:
            continue
        scales = plain.pop(name + _SCALE, None)
        if scales is None or values.ndim != 2 or scales.shape != values.shape[:1] or not scales.is_floating_point():
            raise UserError(
                f"{file} has {shortened(name)} in int8, but not {shortened(name + _SCALE)}, a scale for each of its "
                "rows: save it anew."
            )
        plain[name] = dequantize(Int8Matrix(values, scales.float()))
    return plain
