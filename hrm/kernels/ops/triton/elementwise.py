"""How kernels walk over all elements of tensors: in tiles of whole 16-byte accesses, the last one under a mask.

Triton reads an element at a time under a mask whose end is no multiple of 16: tiles that are full go without one.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

TILE_BYTES = 16 * 128 * 4
"""Of each tensor, for a program of 4 warps: four accesses of 16 bytes a thread, all on their way at once."""


def tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile over all elements of `x`."""
    size = TILE_BYTES // x.element_size()
    return (triton.cdiv(x.numel(), size),), {"SIZE": size, "num_warps": 4}


def as_result(out: Tensor, *tensors: Tensor) -> list[Tensor]:
    """`tensors` with the strides of `out`, a dense tensor of their shape: those that have others are copied."""
    return [
        tensor if tensor.stride() == out.stride() else torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)
        for tensor in tensors
    ]
