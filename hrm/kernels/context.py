"""What the kernels of one model share beside its states and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class RotaryTables(NamedTuple):
    """Rotary position embedding, half-split: features i and i + K/2 are rotated together."""

    cos: Tensor  # [T, K], float32
    sin: Tensor  # [T, K], float32


@dataclass(frozen=True)
class KernelContext:
    """What every block of a model is computed with."""

    rotary: RotaryTables | None  # tables for T tokens, or None where attention is told no positions
    num_heads: int  # of all processes together
    eps: float  # of the norms
