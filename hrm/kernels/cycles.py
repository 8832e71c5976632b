"""Runs of updates that need no gradient: most of a training step, and all of an evaluation.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hrm.kernels.naive import RotaryTables

Block = TypeVar("Block", contravariant=True)


class Cycles(Protocol):
    """Apply `updates`, a text of L and H such as `LLHL`, to the states, and return the new ones.

    L is z_L = module(z_L, z_H + embeddings) with the L level's blocks, H is z_H = module(z_H, z_L) with the H level's,
    where module is `hrm.kernels.naive.reasoning_module`. States and embeddings are [B, T, D]; blocks are what
    `hrm.kernels.Kernels.prepare` made for the level. The arguments are left as they are.
    """

    def __call__(
        self,
        z_H: Tensor,
        z_L: Tensor,
        embeddings: Tensor,
        H_blocks: Sequence[Any],
        L_blocks: Sequence[Any],
        updates: str,
        rotary: RotaryTables | None,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]: ...


class Module(Protocol[Block]):
    """See `hrm.kernels.naive.reasoning_module`; `Block` is what holds the weights of a block."""

    def __call__(
        self,
        state: Tensor,
        injection: Tensor,
        blocks: Sequence[Block],
        rotary: RotaryTables | None,
        num_heads: int,
        eps: float,
    ) -> Tensor: ...


def looped(modules: Mapping[str, Module[Any]]) -> Cycles:
    """One call of the level's module, `modules["H"]` or `modules["L"]`, for every update."""

    def cycles(
        z_H: Tensor,
        z_L: Tensor,
        embeddings: Tensor,
        H_blocks: Sequence[Any],
        L_blocks: Sequence[Any],
        updates: str,
        rotary: RotaryTables | None,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        injection = None  # the L level's, kept until z_H changes
        for level in updates:
            if level == "L":
                if injection is None:
                    injection = z_H + embeddings
                z_L = modules["L"](z_L, injection, L_blocks, rotary, num_heads, eps)
            else:
                z_H = modules["H"](z_H, z_L, H_blocks, rotary, num_heads, eps)
                injection = None
        return z_H, z_L

    return cycles


# The widest tensor of a block, for all sequences of a pass, with which passes are fastest on a CPU: a few times that no
# longer stays in its cache, and from 32 MiB on the C library takes fresh pages for every tensor.
_WIDEST_ON_CPU = 10 << 20


def _sequences_on_cpu(z: Tensor) -> int:
    """Into how many sequences at a time to divide states `z` [B, T, D], evenly."""
    widest = 6 * z.numel() * z.element_size()  # gates and ups of all sequences, as published
    parts = max(1, min(math.ceil(widest / _WIDEST_ON_CPU), len(z)))
    return math.ceil(len(z) / parts)


def chunked(cycles: Cycles, sequences: int | None = None) -> Cycles:
    """All updates for so many sequences, then for the next: what passes between kernels may then stay in the cache.

    By default as many as is best on a CPU, and all elsewhere.
    """

    def in_chunks(
        z_H: Tensor,
        z_L: Tensor,
        embeddings: Tensor,
        H_blocks: Sequence[Any],
        L_blocks: Sequence[Any],
        updates: str,
        rotary: RotaryTables | None,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        size = sequences or (_sequences_on_cpu(z_H) if z_H.device.type == "cpu" else len(z_H))
        if size >= len(z_H):
            return cycles(z_H, z_L, embeddings, H_blocks, L_blocks, updates, rotary, num_heads, eps)
        new_H, new_L = torch.empty_like(z_H), torch.empty_like(z_L)
        for start in range(0, len(z_H), size):
            part = slice(start, start + size)
            new_H[part], new_L[part] = cycles(
                z_H[part], z_L[part], embeddings[part], H_blocks, L_blocks, updates, rotary, num_heads, eps
            )
        return new_H, new_L

    return in_chunks
