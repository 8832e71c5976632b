"""Blocks in e4m3 for Hopper GPUs: matmuls warp-specialised by hand in Gluon, each rounding for the next one.

One warp streams operands into shared memory with the bulk tensor copy engine (TMA). Two groups of four warps multiply
with wgmma, each for rows of its own, and take turns: while one multiplies, the other one finishes its tile. Both pass
over the same tiles of weights, so these are read once for 256 rows: in 8 bits, the L2 cache is what falls short first.

Shapes: M rows, K inputs, N outputs, F inner width of the gated MLP, D hidden size. Barriers: see
`hrm.kernels.ops.hopper.common`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hrm.kernels.context import KernelContext
from hrm.kernels.ops.e4m3 import E4M3, PRODUCT_SCALE, WEIGHT_SCALE, Fp8BlockWeights
from hrm.kernels.ops.hopper.common import (
    LOAD_REGISTERS,
    MULTIPLY_REGISTERS,
    ROWS,
    START_REGISTERS,
    descriptor,
    multiprocessor_count,
    quarters,
    run_of,
    store_squares,
    store_tile,
    tanh,
)
from hrm.kernels.ops.hopper.residual_rms import NORM_STAGES, NORM_WIDTH, norm_kernel
from hrm.kernels.ops.triton.attention import attention_in_e4m3

# 128 inputs of 8 bits are the 128 bytes over which TMA swizzles. Of the 227 KiB of shared memory, 256 rows of x take
# 128 at most, the stages of weights 64, and two buffers of output for each group 32.
_INPUTS, _OUTPUTS = 128, 128
# The second group begins with a tile's weights when the first one is done with all of them: unless there is a stage for
# each slice, both wait forever.
_STAGES = 4


@gluon.jit
def _load(
    descs: gl.tuple, buffers: gl.tuple, barriers: gl.tuple, work: gl.tuple, SLICES: gl.constexpr, STAGES: gl.constexpr
) -> None:
    x_desc, weight_desc = descs
    x_tile, weight_ring = buffers
    x_full, x_empty, weight_full, weight_empty, _ = barriers
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[1]
    step = 0
    x_phase = 0
    for tile in range(start, end):
        m = tile // tiles_n * (2 * BLOCK_M)
        n = tile % tiles_n * BLOCK_N
        new_rows = (tile == start) | (n == 0)
        for k in range(SLICES):
            stage = step % STAGES
            full = weight_full.index(stage)
            mbarrier.wait(weight_empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full, weight_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(weight_desc, [0, n, k * BLOCK_K], full, weight_ring.index(stage))
            step += 1
            if new_rows:
                for half in gl.static_range(2):
                    i = half * SLICES + k
                    mbarrier.wait(x_empty.index(i), x_phase ^ 1)
                    mbarrier.expect(x_full.index(i), x_desc.block_type.nbytes)
                    at = [m + half * BLOCK_M, k * BLOCK_K]
                    tma.async_copy_global_to_shared(x_desc, at, x_full.index(i), x_tile.index(i))
        x_phase ^= new_rows.to(gl.int32)


@gluon.jit
def _sigmoid(half: gl.tensor, SCALE: gl.constexpr) -> gl.tensor:
    """SCALE times the sigmoid of twice `half`, 1/2 + 1/2 tanh(half), by one special-function instruction.

    exp and a division would be two. The error, 2^-12 at most, is small beside the rounding to 3 bits that follows.
    """
    return 0.5 * SCALE + 0.5 * SCALE * tanh(half)


@gluon.jit
def _multiply(
    HALF: gl.constexpr,
    out_desc: tma.tensor_descriptor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    work: gl.tuple,
    squares: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE: gl.constexpr,
    SWIGLU: gl.constexpr,
    PRODUCT_SCALE: gl.constexpr,
) -> None:
    """One of the two groups of four warps."""
    x_tile, weight_ring, staging = buffers
    x_full, x_empty, weight_full, weight_empty, turns = barriers
    start, end, tiles_n = work
    BLOCK_M: gl.constexpr = x_tile.type.shape[1]
    BLOCK_K: gl.constexpr = x_tile.type.shape[2]
    PARTS: gl.constexpr = weight_ring.type.shape[1]
    BLOCK_N: gl.constexpr = weight_ring.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PARTS * BLOCK_N, 32])
    step = 0
    x_phase = 0
    turn_phase = 1 - HALF  # The first group finds its first turn given.
    for tile in range(start, end):
        m = tile // tiles_n * (2 * BLOCK_M) + HALF * BLOCK_M
        n = tile % tiles_n * BLOCK_N
        new_rows = (tile == start) | (n == 0)
        last_of_rows = (tile + 1 == end) | ((tile + 1) % tiles_n == 0)
        acc = gl.zeros([BLOCK_M, PARTS * BLOCK_N], gl.float32, layout)
        mbarrier.wait(turns.index(HALF), turn_phase)
        turn_phase ^= 1
        for k in range(SLICES):
            i = HALF * SLICES + k
            stage = step % STAGES
            mbarrier.wait(x_full.index(i), x_phase, pred=new_rows)
            mbarrier.wait(weight_full.index(stage), step // STAGES & 1)
            weight = weight_ring.index(stage).reshape([PARTS * BLOCK_N, BLOCK_K]).permute([1, 0])
            acc = warpgroup_mma(x_tile.index(i), weight, acc, use_acc=k > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(weight_empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            mbarrier.arrive(x_empty.index(gl.maximum(i, 1) - 1), count=1, pred=last_of_rows & (k > 0))
            step += 1
        mbarrier.arrive(turns.index(1 - HALF), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(weight_empty.index((step + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(x_empty.index((HALF + 1) * SLICES - 1), count=1, pred=last_of_rows)
        x_phase ^= last_of_rows.to(gl.int32)

        if SWIGLU:
            gate, up = acc.reshape([BLOCK_M, 2, BLOCK_N]).permute([0, 2, 1]).split()
            product = gate * up
            if squares is not None:
                store_squares(squares, product, m, n, M, N, SCALE * SCALE)
            value = product * _sigmoid(0.5 * SCALE * gate, PRODUCT_SCALE * SCALE * SCALE)
            store_tile(out_desc, m, n, value, staging.index(2 * HALF + tile % 2), 1)
        else:
            part: gl.constexpr = BLOCK_N // 4
            a, b, c, d = quarters(acc)
            store_tile(out_desc, m, n, SCALE * a, staging.index(2 * HALF), 1)
            store_tile(out_desc, m, n + part, SCALE * b, staging.index(2 * HALF + 1), 1)
            store_tile(out_desc, m, n + 2 * part, SCALE * c, staging.index(2 * HALF), 1)
            store_tile(out_desc, m, n + 3 * part, SCALE * d, staging.index(2 * HALF + 1), 1)
    tma.store_wait(0)


@gluon.jit
def _linear_kernel(
    x_desc: tma.tensor_descriptor,
    weight_desc: tma.tensor_descriptor,
    out_desc: tma.tensor_descriptor,
    squares: gl.tensor,
    M: gl.tensor,
    N: gl.tensor,
    SLICES: gl.constexpr,
    STAGES: gl.constexpr,
    SCALE: gl.constexpr,
    SWIGLU: gl.constexpr,
    PRODUCT_SCALE: gl.constexpr,
) -> None:
    """The weights are [1, N, K] or, with SWIGLU, [2, N, K]: gate and up, tiles of both being one operand.

    squares: gets, of each row, the sums of squares of gate * up, as `store_squares` says.
    """
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    PARTS: gl.constexpr = weight_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = weight_desc.block_type.shape[1]
    gl.static_assert(SLICES <= STAGES)
    x_tile = gl.allocate_shared_memory(x_desc.dtype, [2 * SLICES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, PARTS, BLOCK_N, BLOCK_K], weight_desc.layout)
    out_shape: gl.constexpr = out_desc.block_type.shape
    staging = gl.allocate_shared_memory(out_desc.dtype, [4, out_shape[0], out_shape[1]], out_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [2 * SLICES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [2 * SLICES, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * SLICES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(weight_full.index(stage), count=1)
        mbarrier.init(weight_empty.index(stage), count=2)  # Both groups read the weights.
    for half in gl.static_range(2):
        mbarrier.init(turns.index(half), count=1)
    tiles_n = gl.cdiv(N, BLOCK_N)
    start, end = run_of(gl.cdiv(M, 2 * BLOCK_M) * tiles_n)  # neighbouring tiles share their rows of x

    work = (start, end, tiles_n)
    barriers = (x_full, x_empty, weight_full, weight_empty, turns)
    buffers = (x_tile, weight_ring, staging)
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, out_desc, buffers, barriers, work, squares, M, N, SLICES, STAGES, SCALE, SWIGLU, PRODUCT_SCALE),
            ),
            (
                _multiply,
                (1, out_desc, buffers, barriers, work, squares, M, N, SLICES, STAGES, SCALE, SWIGLU, PRODUCT_SCALE),
            ),
            (_load, ((x_desc, weight_desc), (x_tile, weight_ring), barriers, work, SLICES, STAGES)),
        ],
        [4, 1],
        [MULTIPLY_REGISTERS, LOAD_REGISTERS],
    )


@triton.jit
def _round(source: tl.tensor, target: tl.tensor, n: tl.tensor, SCALE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, at < n).to(tl.float32)
    tl.store(target + at, (SCALE * x).to(target.dtype.element_ty), at < n)


@triton.jit
def _quantize_kernel(
    sources: tl.tuple, targets: tl.tuple, sizes: tl.tuple, SCALE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """All matrices in one launch, each with its own row of programs."""
    for i in tl.static_range(len(sources)):
        if tl.program_id(1) == i:
            _round(sources[i], targets[i], sizes[i], SCALE, BLOCK)


@triton.jit
def _add_kernel(a: tl.tensor, b: tl.tensor, x: tl.tensor, x8: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(a + at, inside).to(tl.float32) + tl.load(b + at, inside).to(tl.float32)
    tl.store(x + at, total, inside)
    tl.store(x8 + at, total.to(x8.dtype.element_ty), inside)


def quantize(matrices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The matrices times WEIGHT_SCALE in e4m3, in one launch."""
    sources = tuple(matrix.contiguous() for matrix in matrices)
    targets = tuple(torch.empty_like(matrix, dtype=E4M3) for matrix in sources)
    sizes = tuple(matrix.numel() for matrix in sources)
    block = 4096  # four vectors of 16 bytes in flight for each of 128 threads
    grid = (triton.cdiv(max(sizes), block), len(sources))
    _quantize_kernel[grid](sources, targets, sizes, WEIGHT_SCALE, block, num_warps=4)
    return targets


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T / WEIGHT_SCALE of contiguous e4m3 x [M, K] and weight [N, K], as [M, N] of a 16-bit dtype."""
    out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    _launch(x, weight.unsqueeze(0), out, swiglu=False)
    return out


def linear_swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate) * up [M, F] in e4m3, where gate, up = x @ gate_up.T / WEIGHT_SCALE for contiguous e4m3 operands.

    x is [M, K], gate_up [2 F, K]: the rows of gate, then those of up.
    """
    out = torch.empty(x.shape[0], gate_up.shape[0] // 2, dtype=E4M3, device=x.device)
    _launch(x, gate_up.view(2, -1, gate_up.shape[1]), out, swiglu=True)
    return out


def linear_swiglu_and_squares(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_swiglu` times PRODUCT_SCALE, and the squares of gate * up, sums of some at a time [parts, M] float32."""
    M, F = x.shape[0], gate_up.shape[0] // 2
    out = torch.empty(M, F, dtype=E4M3, device=x.device)
    squares = torch.empty(triton.cdiv(F, _OUTPUTS // 2), M, device=x.device)
    _launch(x, gate_up.view(2, F, -1), out, swiglu=True, squares=squares)
    return out, squares


def _launch(x: Tensor, weight: Tensor, out: Tensor, swiglu: bool, squares: Tensor | None = None) -> None:
    M, K = x.shape
    parts, N, _ = weight.shape
    columns = _OUTPUTS // parts
    tiles = triton.cdiv(M, 2 * ROWS) * triton.cdiv(N, columns)
    _linear_kernel[(min(tiles, multiprocessor_count(x.device)),)](
        descriptor(x, ROWS, _INPUTS),
        descriptor(weight, parts, columns, _INPUTS),
        descriptor(out, ROWS, 64 // out.itemsize),
        squares,
        M,
        N,
        SLICES=K // _INPUTS,
        STAGES=_STAGES,
        SCALE=1 / WEIGHT_SCALE,
        SWIGLU=swiglu,
        PRODUCT_SCALE=1.0 if squares is None else PRODUCT_SCALE,
        num_warps=4,
        maxnreg=START_REGISTERS,
    )


def linear_residual_rms(
    x: Tensor, weight: Tensor, residual: Tensor, eps: float, only_y: bool = False
) -> tuple[Tensor, Tensor]:
    """y = rms_norm(residual + x @ weight.T / WEIGHT_SCALE) for contiguous e4m3 x [M, K] and weight [D, K].

    Returns:
        y [M, D] in the dtype of `residual` [M, D], and the same in e4m3, or y again where that is not wanted.
    """
    M, K = x.shape
    y = torch.empty_like(residual)
    rounded = y if only_y else torch.empty_like(residual, dtype=E4M3)
    norm_kernel[(min(triton.cdiv(M, ROWS), multiprocessor_count(x.device)),)](
        descriptor(x, ROWS, _INPUTS),
        descriptor(weight, NORM_WIDTH // 2, _INPUTS),
        descriptor(residual, ROWS, NORM_WIDTH // 8),
        descriptor(y, ROWS, NORM_WIDTH // 8),
        descriptor(rounded, ROWS, NORM_WIDTH // 8),
        None,
        None,
        M,
        K,
        eps,
        SCALE=1 / WEIGHT_SCALE,
        STAGES=NORM_STAGES,
        SAVE=False,
        ROUND=not only_y,
        num_warps=8,
        maxnreg=START_REGISTERS,
    )
    return y, rounded


def add(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and the same in e4m3."""
    x = torch.empty_like(a)
    x8 = torch.empty_like(a, dtype=E4M3)
    block = 2048  # two vectors of 16 bytes in flight for each of 128 threads and each operand
    _add_kernel[(triton.cdiv(a.numel(), block),)](a, b, x, x8, a.numel(), block, num_warps=4)
    return x, x8


def fits(state: Tensor, blocks: Sequence[Fp8BlockWeights], num_heads: int) -> bool:
    """Whether the kernels here take these operands."""
    width = state.shape[-1]
    return (
        bool(blocks)
        and state.dtype in (torch.bfloat16, torch.float16)
        and width == NORM_WIDTH
        and width // num_heads in (16, 32, 64, 128)
        and all(weights.down.shape[1] % _INPUTS == 0 for weights in blocks)
    )


def reasoning_module(
    state: Tensor,
    injection: Tensor,
    blocks: Sequence[Fp8BlockWeights],
    context: KernelContext,
    *,
    gluon: bool,
) -> Tensor:
    """As `hrm.kernels.fp8.reasoning_module`, for operands that it `fits`; `gluon` as in `triton.attention`."""
    batch, tokens, width = state.shape
    x, rounded = add(state.contiguous().view(-1, width), injection.contiguous().view(-1, width))
    for i, weights in enumerate(blocks):
        qkv = linear(rounded, weights.qkv, x.dtype).view(batch, tokens, 3 * width)
        mixed = attention_in_e4m3(qkv, context.rotary, context.num_heads, gluon=gluon).view(-1, width)
        x, rounded = linear_residual_rms(mixed, weights.o, x, context.eps)
        inner = linear_swiglu(rounded, weights.gate_up)
        x, rounded = linear_residual_rms(inner, weights.down, x, context.eps, only_y=i + 1 == len(blocks))
    return x.view(batch, tokens, width)
