"""The start of an ACT step in Triton: places whose sequence halted take a new one, in one launch.

Shapes: B sequences, T tokens with the puzzle prefix, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

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
def _reset_carry_kernel(
    states: tl.tuple,
    steps: tl.tensor,
    data: tl.tuple,
    new_states: tl.tuple,
    new_steps: tl.tensor,
    new_data: tl.tuple,
    fresh: tl.tuple,
    initial: tl.tuple,
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
        for i in tl.static_range(len(states)):
            tl.store(new_states[i] + at, tl.load(initial[i] + within % D), inside)
        if piece == 0:
            tl.store(new_steps + sequence, 1)
            _copy_row(sequence, fresh, new_data, widths, 1024)
    else:
        for i in tl.static_range(len(states)):
            tl.store(new_states[i] + at, tl.load(states[i] + at, inside), inside)
        if piece == 0:
            tl.store(new_steps + sequence, tl.load(steps + sequence) + 1)
            _copy_row(sequence, data, new_data, widths, 1024)


def reset_carry(
    states: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    halted: Tensor,
    steps: Tensor,
    data: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """As `hrm.kernels.naive.reset_carry`, for contiguous states of one shape and fields of the same dtypes."""
    first = next(iter(states.values()))
    size, D = first[0].numel(), first.shape[-1]
    new_states = {name: torch.empty_like(state) for name, state in states.items()}
    new_steps = torch.empty_like(steps)
    new_data = {name: torch.empty_like(data[name]) for name in fresh}
    widths = tuple(field[0].numel() for field in fresh.values())
    _reset_carry_kernel[(len(halted), triton.cdiv(size, _BLOCK))](
        tuple(states.values()), steps, tuple(data[name] for name in fresh),
        tuple(new_states.values()), new_steps, tuple(new_data.values()),
        tuple(fresh.values()), tuple(initial[name] for name in states), halted,
        widths, size, D, _BLOCK,
    )  # fmt: skip
    return new_states, new_steps, new_data
