"""Matmuls with fused epilogues for Hopper GPUs, warp-specialised by hand in Gluon.

One warp streams operands into shared memory with the bulk tensor copy engine; eight warps multiply with wgmma and finish
the rows in registers. Triton's own pipeliner leaves the tensor cores idle while it runs an epilogue, and cannot keep a
tile of x in shared memory between tiles of the output; `triton_linear` has the versions without these two.

Shapes: M rows, K inputs, F inner width of the gated MLP, D outputs.

Gluon's interface still changes between Triton releases, so `is_available` answers for the one it was tested with.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Tiles: 128 rows by 64 inputs, so that a row of a tile is the 128 bytes over which the copy engine swizzles.
BLOCK_M = 128
BLOCK_K = 64
# The tile of x stays in shared memory whole: 8 slices of 16 KiB.
MAX_SLICES = 8
# The row norm holds a row's two halves in registers: 256 columns in float32 and 256 in 16 bits at a time.
NORM_WIDTH = 512
# All registers of a multiprocessor for three groups of four warps: 168 each to start with. The two groups that multiply
# then take 240 of the 504 and leave the loading one 24, the least there is.
START_REGISTERS = 168
MULTIPLY_REGISTERS = 240
LOAD_REGISTERS = 24


@gluon.jit
def _load_for_swiglu(
    x_desc,
    weight_desc,
    x_tile,
    weight_ring,
    x_full,
    x_empty,
    weight_full,
    weight_empty,
    start,
    end,
    tiles_n,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
):
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[1]
    step = 0
    x_phase = 0
    for tile in range(start, end):
        m = tile // tiles_n * BLOCK_M
        n = tile % tiles_n * (2 * BLOCK_N)
        new_rows = (tile == start) | (n == 0)
        for half in gl.static_range(2):
            for k in range(SLICES):
                if half == 0 and new_rows:
                    mbarrier.wait(x_empty.index(k), x_phase ^ 1)
                    mbarrier.expect(x_full.index(k), x_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(x_desc, [m, k * BLOCK_K], x_full.index(k), x_tile.index(k))
                stage = step % STAGES
                full = weight_full.index(stage)
                mbarrier.wait(weight_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full, weight_desc.block_type.nbytes)
                rows = n + half * BLOCK_N
                tma.async_copy_global_to_shared(weight_desc, [0, rows, k * BLOCK_K], full, weight_ring.index(stage))
                step += 1
        x_phase ^= new_rows.to(gl.int32)
