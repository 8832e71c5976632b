"""What kernels in Gluon for Hopper GPUs share: tiles, registers, descriptors, stores, and the division of work.

One warp streams operands into shared memory with the bulk tensor copy engine (TMA); the others multiply with wgmma and
finish rows in registers. By hand because Triton's pipeliner leaves the tensor cores idle during an epilogue and cannot
keep a tile of x in shared memory from one output tile to the next.

Two kinds of barrier in shared memory pass buffers around: `full` (the copy has arrived) and `empty` (the readers are
done). A wait names the parity of the phase it waits for, so nobody may run a whole phase ahead of a waiter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
# A row of an operand tile is 128 bytes, the widest that TMA swizzles against bank conflicts.
ROWS, COLUMNS = 128, 64
# All registers of a multiprocessor over three groups of four warps. Of these 504, the two groups that multiply then
# take 240 each and the one that loads keeps 24, the least there is.
START_REGISTERS = 168
MULTIPLY_REGISTERS = gl.constexpr(240)
LOAD_REGISTERS = gl.constexpr(24)
# Of the 227 KB of a multiprocessor's shared memory that a program can have, what is left beside its barriers.
BUFFER_BYTES = 226 * 1024


@gluon.jit
def run_of(tiles: gl.tensor) -> Any:
    """First and end of the run of tiles that this program takes."""
    most = gl.cdiv(tiles, gl.num_programs(0))
    start = gl.program_id(0) * most
    return start, gl.minimum(start + most, tiles)


@gluon.jit
def tile_position(tile: gl.tensor, tiles_m: gl.tensor, tiles_n: gl.tensor) -> Any:
    """Row and column of a tile: 8 rows of tiles are done together, so that what they read stays in the L2 cache."""
    group = tile // (8 * tiles_n)
    height = gl.minimum(tiles_m - group * 8, 8)
    rest = tile % (8 * tiles_n)
    return group * 8 + rest % height, rest // height


@gluon.jit
def store_tile(
    desc: tma.tensor_descriptor,
    m: gl.tensor,
    n: gl.tensor,
    value: gl.tensor,
    staging: gl.shared_memory_descriptor,
    PENDING: gl.constexpr,
) -> None:
    """Write `value` to global memory through `staging`, once all but the last PENDING stores have left theirs."""
    tma.store_wait(PENDING)
    staging.store(value.to(staging.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [m, n], staging)


@gluon.jit
def quarters(x: gl.tensor) -> Any:
    """The columns of x [M, N] in four parts [M, N / 4]; nothing moves between threads."""
    M: gl.constexpr = x.type.shape[0]
    N: gl.constexpr = x.type.shape[1]
    left, right = x.reshape([M, 2, N // 2]).permute([0, 2, 1]).split()
    a, b = left.reshape([M, 2, N // 4]).permute([0, 2, 1]).split()
    c, d = right.reshape([M, 2, N // 4]).permute([0, 2, 1]).split()
    return a, b, c, d


@gluon.jit
def tanh(x: gl.tensor) -> Any:
    """One special-function instruction, with an error of 2^-11 at most."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def sigmoid(x: gl.tensor) -> gl.tensor:
    """1 / (1 + exp(-x)) in four instructions, to a few units in the last place; a division alone would be more."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, t; }",  # the first factor is -1 / ln 2
        "=f,f",
        [x],
        gl.float32,
        True,
        1,
    )


@gluon.jit
def store_squares(
    squares: gl.tensor, x: gl.tensor, m: gl.tensor, n: gl.tensor, M: gl.tensor, N: gl.tensor, SCALE: gl.constexpr
) -> None:
    """Write the squares of a tile of SCALE x [M, N], summed along its rows, to `squares` [tiles in a row, M]."""
    sums = SCALE * SCALE * gl.sum(x * x, 1)
    rows = m + gl.arange(0, x.type.shape[0], sums.type.layout)
    gl.store(squares + n // x.type.shape[1] * M + rows, sums, (rows < M) & (n < N))


def multiprocessor_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block), shared_layout(tensor.dtype, block))


@functools.cache
def shared_layout(dtype: torch.dtype, block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), DTYPES[dtype])
