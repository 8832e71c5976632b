"""The 8-bit format that `fp8` rounds to, and weights in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
# Weights start with a standard deviation between 0.02 and 0.09; they may grow up to ±14.
WEIGHT_SCALE = 32.0
# Of the product of a normed gate's MLP where it is rounded before its norm: of rms 0.5 to 15 in a model at the end of
# its training, with numbers up to 170.
PRODUCT_SCALE = 0.25


class Fp8BlockWeights(NamedTuple):
    """The matrices of `BlockWeights` times WEIGHT_SCALE, in e4m3."""

    qkv: Tensor  # [3 D, D]
    o: Tensor  # [D, D]
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of e4m3, which has neither infinity nor anything beyond 448."""
    return x.clamp(-_LARGEST, _LARGEST).to(E4M3)
