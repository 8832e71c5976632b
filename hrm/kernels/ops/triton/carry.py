"""The start of an ACT step in Triton: places whose sequence halted take a new one, in one launch.

Shapes: B sequences, T tokens with the puzzle prefix, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # numbers of each state a program: four vectors of 16 bytes for each of 128 threads, in 16 bit


@triton.jit
def _copy_row(row: tl.tensor, sources: tl.tuple, targets: tl.tuple, widths: tl.constexpr, BLOCK: tl.constexpr) -> None:
    for i in tl.static_range(len(widths)):
        for begin in range(0, widths[i], BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < widths[i]
            tl.store(
                targets[i] + row * widths[i] + columns, tl.load(sources[i] + row * widths[i] + columns, inside), inside
            )


@triton.jit
def _restart_kernel(
    z_H: tl.tensor,
    z_L: tl.tensor,
    steps: tl.tensor,
    data: tl.tuple,
    new_z_H: tl.tensor,
    new_z_L: tl.tensor,
    new_steps: tl.tensor,
    new_data: tl.tuple,
    fresh: tl.tuple,
    H_init: tl.tensor,
    L_init: tl.tensor,
    halted: tl.tensor,
    widths: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sequence, piece = tl.program_id(0), tl.program_id(1)
    within = piece * BLOCK + tl.arange(0, BLOCK)
    inside = within < SIZE
    at = sequence.to(tl.int64) * SIZE + within
    if tl.load(halted + sequence) != 0:
        tl.store(new_z_H + at, tl.load(H_init + within % D), inside)
        tl.store(new_z_L + at, tl.load(L_init + within % D), inside)
        if piece == 0:
            tl.store(new_steps + sequence, 1)
            _copy_row(sequence, fresh, new_data, widths, 1024)
    else:
        tl.store(new_z_H + at, tl.load(z_H + at, inside), inside)
        tl.store(new_z_L + at, tl.load(z_L + at, inside), inside)
        if piece == 0:
            tl.store(new_steps + sequence, tl.load(steps + sequence) + 1)
            _copy_row(sequence, data, new_data, widths, 1024)


def restart(
    z_H: Tensor,
    z_L: Tensor,
    H_init: Tensor,
    L_init: Tensor,
    halted: Tensor,
    steps: Tensor,
    data: Sequence[Tensor],
    fresh: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Give halted places their initial state and new data, and count the step.

    Args:
        z_H, z_L: [B, T, D], contiguous.
        H_init, L_init: [D].
        halted: [B] bool.
        steps: [B] integers.
        data, fresh: fields [B, ...] of the sequences in hand and of the batch to take from, contiguous, of one dtype
            each.

    Returns:
        The new `(z_H, z_L, steps, data)`.
    """
    B = len(halted)
    size, D = z_H[0].numel(), len(H_init)
    old = [z_H, z_L, steps, *data]
    new = [torch.empty_like(tensor) for tensor in old]
    widths = tuple(field[0].numel() for field in data)
    _restart_kernel[(B, triton.cdiv(size, _BLOCK))](
        *old[:3], tuple(data), *new[:3], tuple(new[3:]), tuple(fresh), H_init, L_init, halted,
        widths, size, D, _BLOCK,
    )  # fmt: skip
    return new[0], new[1], new[2], new[3:]
