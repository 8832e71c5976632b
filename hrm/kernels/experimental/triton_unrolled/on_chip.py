"""A recurrence of two states without gradient for small models: a program per sequence, all of it on chip.

The state of a sequence stays in registers through all blocks of an update, and weights stream by from the L2 cache:
there is one launch, and programs never wait for one another.

Shapes: B sequences, T tokens, D hidden size, N heads of size K, F inner width of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.context import KernelContext
from hrm.kernels.naive import BlockWeights
from hrm.kernels.ops.triton.attention.common import LOG2_E, load_angles
from hrm.kernels.ops.triton.common import stages, tile_rows

_BLOCK_F = 64


@triton.jit
def select(pointers: tl.tuple, index: tl.tensor) -> tl.tensor:
    """`pointers[index]`, for an index that only the GPU knows."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit
def _matrix(
    weight: tl.tensor, row: tl.tensor, column: tl.tensor, STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """[C, R], transposed: the R rows from `row` on and C columns from `column` on."""
    return tl.load(weight + (row + tl.arange(0, R))[None, :] * STRIDE + (column + tl.arange(0, C))[:, None])


@triton.jit
def _turned_head(
    x: tl.tensor, weight: tl.tensor, row: tl.tensor, cos: tl.tensor, sin: tl.tensor, K: tl.constexpr, D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A head of q or k as two halves [R, K/2], rotated in float32: projected apart, they need not be taken apart."""
    first = tl.dot(x, _matrix(weight, row, 0, D, K // 2, D), input_precision="ieee").to(x.dtype)
    second = tl.dot(x, _matrix(weight, row + K // 2, 0, D, K // 2, D), input_precision="ieee").to(x.dtype)
    if cos is None:
        return first, second
    else:
        a, b = first.to(tl.float32), second.to(tl.float32)
        return (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)


@triton.jit
def _add_and_norm(x: tl.tensor, acc: tl.tensor, eps: tl.tensor) -> tl.tensor:
    total = (x.to(tl.float32) + acc).to(x.dtype).to(tl.float32)
    return (total * tl.rsqrt(tl.sum(total * total, 1) / x.shape[1] + eps)[:, None]).to(x.dtype)


@triton.jit(do_not_specialize=["slow_updates", "num_updates"])
def _on_chip_kernel(
    state: tl.tensor,
    constant: tl.tensor,
    qkv_weights: tl.tuple,
    o_weights: tl.tuple,
    gate_up_weights: tl.tuple,
    down_weights: tl.tuple,
    cos: tl.tensor,
    sin: tl.tensor,
    slow_updates: tl.tensor,
    num_updates: tl.tensor,
    eps: tl.tensor,
    FAST_LAYERS: tl.constexpr,
    SLOW_LAYERS: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
) -> None:
    """Bit i of `slow_updates` says that update i is of the slow state; `state` is [2, B, T, D], fast and slow."""
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    rows = tl.arange(0, ROWS)
    inside = (rows < T)[:, None]
    at = tl.program_id(0).to(tl.int64) * (T * D) + rows[:, None] * D + tl.arange(0, D)[None, :]
    slow_at = state + tl.num_programs(0).to(tl.int64) * (T * D) + at
    if cos is None:
        c, s = None, None
    else:
        c, s = load_angles(cos, sin, rows, T, K)
    update = 0
    while update < num_updates:
        is_slow = (slow_updates >> update) & 1
        fast = tl.load(state + at, inside, 0.0)
        slow = tl.load(slow_at, inside, 0.0)
        injection = (slow + tl.load(constant + at, inside, 0.0)).to(fast.dtype)
        x = tl.where(is_slow == 0, fast + injection, slow + fast)
        block = is_slow * FAST_LAYERS
        end = block + FAST_LAYERS + is_slow * (SLOW_LAYERS - FAST_LAYERS)
        while block < end:
            qkv = select(qkv_weights, block)
            o = select(o_weights, block)
            acc = tl.zeros((ROWS, D), tl.float32)
            for head in tl.range(N):
                row = head * K
                q1, q2 = _turned_head(x, qkv, row, c, s, K, D)
                k1, k2 = _turned_head(x, qkv, D + row, c, s, K, D)
                v = tl.dot(x, _matrix(qkv, 2 * D + row, 0, D, K, D), input_precision="ieee").to(x.dtype)
                scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
                scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * SCALE
                scores = tl.where((rows < T)[None, :], scores, float("-inf"))
                p = tl.exp2(scores - tl.max(scores, 1)[:, None])
                mixed = tl.dot(p.to(x.dtype), v, input_precision="ieee") * (1.0 / tl.sum(p, 1))[:, None]
                acc = tl.dot(mixed.to(x.dtype), _matrix(o, 0, row, D, D, K), acc, input_precision="ieee")
            x = _add_and_norm(x, acc, eps)
            gate_up = select(gate_up_weights, block)
            down = select(down_weights, block)
            acc = tl.zeros((ROWS, D), tl.float32)
            for f in tl.range(0, F, BLOCK_F):
                gate = tl.dot(x, _matrix(gate_up, f, 0, D, BLOCK_F, D), input_precision="ieee")
                up = tl.dot(x, _matrix(gate_up, F + f, 0, D, BLOCK_F, D), input_precision="ieee")
                hidden = (gate * tl.sigmoid(gate) * up).to(x.dtype)
                acc = tl.dot(hidden, _matrix(down, 0, f, F, D, BLOCK_F), acc, input_precision="ieee")
            x = _add_and_norm(x, acc, eps)
            block += 1
        tl.store(tl.where(is_slow == 0, state + at, slow_at), x, inside)
        tl.debug_barrier()  # the next update's loads may give a thread what another one stored
        update += 1


def fits_on_chip(z: Tensor, inner: int, head_size: int) -> bool:
    """Whether a sequence of `z` [B, T, D] and its attention stay in the registers of one program."""
    _, tokens, width = z.shape
    return (
        tokens <= 128
        and width in (32, 64, 128)
        and head_size >= 32  # half a head is what the matrix unit multiplies at least
        and inner % _BLOCK_F == 0
        and (z.element_size() == 2 or not z.is_cuda)
    )


def update_on_chip(
    state: Tensor,
    constant: Tensor,
    blocks: list[BlockWeights],
    fast_layers: int,
    slow_updates: Sequence[bool],
    context: KernelContext,
) -> None:
    """Update `state` [2, B, T, D], the fast one and the slow one, in place; `blocks` are the fast module's, then the
    slow one's, and `slow_updates` says of each update whether it is of the slow state.
    """
    _, batch, tokens, width = state.shape
    cos, sin = (None, None) if context.rotary is None else context.rotary
    _on_chip_kernel[(batch,)](
        state,
        constant,
        *zip(*blocks, strict=True),
        cos,
        sin,
        as_bits(slow_updates),
        len(slow_updates),
        context.eps,
        FAST_LAYERS=fast_layers,
        SLOW_LAYERS=len(blocks) - fast_layers,
        T=tokens,
        N=context.num_heads,
        K=width // context.num_heads,
        F=blocks[0].down.shape[1],
        ROWS=tile_rows(tokens, 128),
        BLOCK_F=_BLOCK_F,
        num_warps=8 if tokens > 64 else 4,
        num_stages=stages(state.device),
    )


def as_bits(flags: Sequence[bool]) -> int:
    """Bit i is flag i."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)
