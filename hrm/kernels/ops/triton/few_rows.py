"""Schedules without gradient for a few sequences, one puzzle above all: bound by the latency of launches.

A block is five launches,

    qkv, rotated | attention | o + residual | gate_up, SwiGLU | down + residual

of programs so small that there is one for every multiprocessor. A launch begins while the one before it runs
(programmatic dependent launch): a program has its part of the weights in shared memory before it waits for what others
compute. What counts from there on is how many instructions a warp has to issue, one after the other. So rows are
stored as they are before their norm, with the sums of their squares; a norm is a factor of a row, and who multiplies
the rows next applies it to the result.

Shapes: B sequences, T tokens, M = B T rows, D hidden size, N heads of size K, F inner width of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hrm.kernels.context import KernelContext, RotaryTables
from hrm.kernels.naive import BlockWeights
from hrm.kernels.ops.triton.attention.common import LOG2_E, load_head
from hrm.kernels.ops.triton.common import tile_rows
from hrm.kernels.requirements import is_hopper
from hrm.kernels.schedule import Schedule, States


@triton.jit
def _let_next_begin(OVERLAPS: tl.constexpr) -> None:
    """The next launch may begin when all programs of this one have come here."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def _wait_for_last(OVERLAPS: tl.constexpr) -> None:
    """Until the launch before has ended. What comes before may read only what no launch of the schedule writes."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def _rows_in_parts(
    x: tl.tensor, rows: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr, PART: tl.constexpr
) -> tl.tuple:
    """Whole rows of `x` [.., WIDTH] as tiles of PART columns, all on the way at once; zeros outside."""
    at = x + rows[:, None].to(tl.int64) * WIDTH + tl.arange(0, PART)[None, :]
    parts: tl.tuple = ()
    for i in tl.static_range(WIDTH // PART):
        parts += (tl.load(at + i * PART, inside[:, None], 0.0),)
    return parts


@triton.jit
def _factors(
    squares: tl.tensor,
    rows: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Of the norms of rows of WIDTH numbers, from the SUMS sums of their squares [M, SUMS]."""
    sums = tl.arange(0, BLOCK)
    at = squares + rows[:, None] * SUMS + sums[None, :]
    total = tl.sum(tl.load(at, (rows < M)[:, None] & (sums < SUMS)[None, :], 0.0), 1)
    return tl.rsqrt(total / WIDTH + eps)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    residual: tl.tensor,
    squares: tl.tensor,
    out_squares: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    HEAD: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """`out` from the rows of `x` [M, K] and `weight` [N, K]:

    - GATED: [M, N / 2], the SwiGLU of gate and up, which `weight` has in this order;
    - with `cos`: [M, N], q, k and v in heads of HEAD, q and k rotated by `cos` and `sin` [T, HEAD];
    - else [M, N], to which `residual` [M, N] is added; the sums of the squares of each tile's rows go to
      `out_squares` [M, N / BLOCK_N].

    `squares` [M, SUMS] are those of the residual, or of `x` where there is none: its rows lack their norm then.

    Tiles are transposed: the matrix unit takes 64 rows of weights at a time, and 16 of `x`.
    """
    _let_next_begin(OVERLAPS)
    PARTS: tl.constexpr = K // PART
    PAIRED: tl.constexpr = GATED or cos is not None
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_rows = n
    if PAIRED:
        # A gate and its up, or what is rotated together, are 8 rows apart in a tile, so that one thread has both.
        pair = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        APART: tl.constexpr = N // 2 if GATED else HEAD // 2
        first = pair // APART * (2 * APART) + pair % APART
        pair_of_row = n // 16 * 8 + n % 8
        w_rows = pair_of_row // APART * (2 * APART) + pair_of_row % APART + n // 8 % 2 * APART
    if cos is not None:
        angle_at = (rows % T)[None, :] * HEAD + (pair % APART)[:, None]
        rotates = (pair < N // 3)[:, None] & (rows < M)[None, :]
        c, s = tl.load(cos + angle_at, rotates, 1.0), tl.load(sin + angle_at, rotates, 0.0)
    w = _rows_in_parts(weight, w_rows, n < N, K, PART)
    _wait_for_last(OVERLAPS)
    a = _rows_in_parts(x, rows, rows < M, K, PART)
    if squares is not None:
        WIDTH: tl.constexpr = K if residual is None else N
        factors = _factors(squares, rows, M, eps, WIDTH, SUMS, SUMS_BLOCK)[None, :]
    at = rows[None, :].to(tl.int64) * N + n[:, None]
    inside = (rows < M)[None, :] & (n < N)[:, None]
    if residual is not None:
        before = tl.load(residual + at, inside, 0.0).to(tl.float32)
    acc = tl.dot(w[0], tl.trans(a[0]), input_precision="ieee")
    for i in tl.static_range(1, PARTS):
        acc = tl.dot(w[i], tl.trans(a[i]), acc, input_precision="ieee")
    if residual is not None:
        if squares is not None:
            before = (before * factors).to(out.dtype.element_ty).to(tl.float32)
        total = (acc + before).to(out.dtype.element_ty)
        tl.store(out + at, total, inside)
        sums = tl.sum(total.to(tl.float32) * total.to(tl.float32), 0)
        tl.store(out_squares + rows * tl.num_programs(0) + tl.program_id(0), sums, rows < M)
    else:
        if squares is not None:
            acc *= factors
        if PAIRED:
            both = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
            left, right = tl.split(both)
            left = tl.reshape(left, (BLOCK_N // 2, BLOCK_M))
            right = tl.reshape(right, (BLOCK_N // 2, BLOCK_M))
            inside = (rows < M)[None, :] & (pair < N // 2)[:, None]
            if GATED:
                at = rows[None, :].to(tl.int64) * (N // 2) + pair[:, None]
                tl.store(out + at, (left * tl.sigmoid(left) * right).to(out.dtype.element_ty), inside)
            else:
                left = left.to(out.dtype.element_ty).to(tl.float32)  # rounded as where it is stored before
                right = right.to(out.dtype.element_ty).to(tl.float32)
                at = rows[None, :].to(tl.int64) * N + first[:, None]
                tl.store(out + at, (left * c - right * s).to(out.dtype.element_ty), inside)
                tl.store(out + at + APART, (right * c + left * s).to(out.dtype.element_ty), inside)
        else:
            tl.store(out + at, acc.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["M"])
def _long_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    residual: tl.tensor,
    squares: tl.tensor,
    out_squares: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    """As `_linear_kernel` with a residual, for rows too long for 64 of the weights to be in shared memory.

    Weights wait in registers, as operands of the matrix unit. For the compiler to divide them among the warps, BLOCK_N
    is more than BLOCK_M.
    """
    _let_next_begin(OVERLAPS)
    PARTS: tl.constexpr = K // PART
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows[:, None].to(tl.int64) * N + n[None, :]
    inside = (rows < M)[:, None] & (n < N)[None, :]
    w = _rows_in_parts(weight, n, n < N, K, PART)
    _wait_for_last(OVERLAPS)
    a = _rows_in_parts(x, rows, rows < M, K, PART)
    before = tl.load(residual + at, inside, 0.0).to(tl.float32)
    factors = _factors(squares, rows, M, eps, N, SUMS, SUMS_BLOCK)[:, None]
    # Even and odd parts apart, so that the matrix unit need not wait for itself.
    even = tl.dot(a[0], tl.trans(w[0]), input_precision="ieee")
    odd = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(1, PARTS):
        if i % 2 == 0:
            even = tl.dot(a[i], tl.trans(w[i]), even, input_precision="ieee")
        else:
            odd = tl.dot(a[i], tl.trans(w[i]), odd, input_precision="ieee")
    before = (before * factors).to(out.dtype.element_ty).to(tl.float32)
    total = (even + odd + before).to(out.dtype.element_ty)
    tl.store(out + at, total, inside)
    sums = tl.sum(total.to(tl.float32) * total.to(tl.float32), 1)
    tl.store(out_squares + rows * tl.num_programs(0) + tl.program_id(0), sums, rows < M)


@triton.jit
def _attention_kernel(
    qkv: tl.tensor,
    out: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """ROWS queries of a head [K], all of whose keys are one tile; rotated already."""
    _let_next_begin(OVERLAPS)
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    head = tl.program_id(1)
    token = (head // N).to(tl.int64) * T
    q_at = qkv + token * (3 * D) + head % N * K
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    _wait_for_last(OVERLAPS)
    q = load_head(q_at, rows, T, 3 * D, K)
    k = load_head(q_at + D, keys, T, 3 * D, K)
    v = load_head(q_at + 2 * D, keys, T, 3 * D, K)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    scores = tl.where((keys < T)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    mixed = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / tl.sum(p, 1))[:, None]
    at = out + (token + rows)[:, None] * D + head % N * K + tl.arange(0, K)[None, :]
    tl.store(at, mixed.to(out.dtype.element_ty), (rows < T)[:, None])


@triton.jit
def _term(x: tl.tensor, z: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """A tile of `x`, or `z` where there is none."""
    if x is None:
        return z
    else:
        return tl.load(x + at, inside, 0.0)


@triton.jit(do_not_specialize=["M"])
def _sum_kernel(
    y: tl.tensor,
    z: tl.tensor,
    state: tl.tensor,
    first_input: tl.tensor,
    second_input: tl.tensor,
    x: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """z = norm(y) where there is `y`, then x = state + (first_input + second_input), each [M, WIDTH].

    There are TERMS of state and inputs; those that are None are z.
    """
    _let_next_begin(OVERLAPS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < WIDTH)
    at = rows[:, None].to(tl.int64) * WIDTH + columns
    _wait_for_last(OVERLAPS)
    if y is not None:
        wide = tl.load(y + at, inside, 0.0).to(tl.float32)
        value = (wide * tl.rsqrt(tl.sum(wide * wide, 1) / WIDTH + eps)[:, None]).to(y.dtype.element_ty)
        tl.store(z + at, value, inside)
    else:
        value = tl.load(state + at, inside, 0.0)  # stands for nothing
    if TERMS > 0:
        # Each sum rounds as if it had been made of what is in memory.
        total = _term(first_input, value, at, inside).to(tl.float32)
        if TERMS == 3:
            total = (total + _term(second_input, value, at, inside).to(tl.float32)).to(value.dtype).to(tl.float32)
        total = _term(state, value, at, inside).to(tl.float32) + total
        tl.store(x + at, total.to(value.dtype), inside)


# ---- launchers


class Tile(NamedTuple):
    """How a matmul is divided among programs."""

    rows: int
    columns: int
    part: int  # inputs that are loaded at a time
    num_warps: int


class Tiles(NamedTuple):
    """Those of a block."""

    qkv: Tile
    o: Tile
    gate_up: Tile
    down: Tile
    queries: int = 16  # rows of attention


# For how many rows it pays, with these tiles, as measured on an H200 at width 512; never: `MOST_ROWS = 0`.
MOST_ROWS = 164
TILES = Tiles(Tile(16, 64, 512, 4), Tile(16, 64, 512, 4), Tile(32, 64, 512, 4), Tile(16, 32, 128, 4))


def fits(states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext) -> bool:
    """Whether `run` computes this: in 16 bit, of sizes that programs hold whole."""
    if not schedule or any(len(update.inputs) > 2 or not modules[update.module] for update in schedule):
        return False
    state = states[schedule[0].state]
    _, tokens, width = state.shape
    inner_widths = [modules[update.module][0].down.shape[1] for update in schedule]
    return (
        state.dtype.itemsize == 2
        and tokens <= 128
        and width // context.num_heads in (32, 64, 128)
        and width % 64 == 0
        and width <= 512
        and all(inner % 64 == 0 and inner <= 1536 for inner in inner_widths)
    )


def pays(states: States, schedule: Schedule, modules: Mapping[str, Sequence[Any]], context: KernelContext) -> bool:
    """Whether `run` is the fastest to compute this: few rows, on Hopper GPUs, where it was measured."""
    if not schedule:
        return False
    state = states[schedule[0].state]
    few = state.shape[0] * state.shape[1] <= MOST_ROWS
    return few and is_hopper(state.device) and fits(states, schedule, modules, context)


@torch.no_grad()
def run(
    states: States, schedule: Schedule, modules: Mapping[str, Sequence[BlockWeights]], context: KernelContext
) -> dict[str, Tensor]:
    """As `hrm.kernels.schedule.Run`, for what `fits`."""
    shape = states[schedule[0].state].shape
    rows = {name: state.reshape(-1, shape[-1]).contiguous() for name, state in states.items()}
    y: Tensor | None = None
    ended = ""  # the state that y lacks only the norm to be
    for update in schedule:
        terms = [None if name == ended else rows[name] for name in (update.state, *update.inputs)]
        z, x = _sum(y, terms, rows[update.state], context.eps)
        if y is not None:
            rows[ended] = z
        y, ended = _apply_blocks(x, modules[update.module], shape[1], context), update.state
    assert y is not None
    rows[ended], _ = _sum(y, [], y, context.eps)
    return {name: state.view(shape) for name, state in rows.items()}


def _apply_blocks(x: Tensor, blocks: Sequence[BlockWeights], tokens: int, context: KernelContext) -> Tensor:
    """The blocks' result on the rows of x [M, D], without the norm of the last."""
    M, width = x.shape
    squares: Tensor | None = None  # of x, whose rows lack their norm then
    for weights in blocks:
        qkv, mixed, middle, out = x.new_empty(M, 3 * width), *(torch.empty_like(x) for _ in range(3))
        inner = x.new_empty(M, weights.down.shape[1])
        middle_squares = x.new_empty(M, triton.cdiv(width, TILES.o.columns), dtype=torch.float32)
        out_squares = x.new_empty(M, triton.cdiv(width, TILES.down.columns), dtype=torch.float32)
        _linear(x, weights.qkv, qkv, TILES.qkv, context.eps, squares=squares, rotary=context.rotary)
        _attention(qkv, mixed, tokens, context.num_heads)
        _linear(mixed, weights.o, middle, TILES.o, context.eps, (x, middle_squares), squares=squares)
        _linear(middle, weights.gate_up, inner, TILES.gate_up, context.eps, squares=middle_squares, gated=True)
        _long_linear(inner, weights.down, out, context.eps, (middle, out_squares), middle_squares)
        x, squares = out, out_squares
    return x


def _linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tile: Tile,
    eps: float,
    residual: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    *,
    squares: Tensor | None = None,
    rotary: RotaryTables | None = None,
    gated: bool = False,
) -> None:
    """Launch the kernel, with a residual and where the squares of the result go."""
    (M, K), N = x.shape, len(weight)
    before, out_squares = residual
    cos, sin = (None, None) if rotary is None else rotary
    tokens, head_size = (1, 1) if cos is None else cos.shape
    _linear_kernel[(triton.cdiv(N, tile.columns), triton.cdiv(M, tile.rows))](
        x, weight, out, before, squares, out_squares, cos, sin, M, eps, N, K, tokens, head_size, *_sums(squares),
        gated, x.is_cuda, tile.rows, tile.columns, min(tile.part, K & -K), num_warps=tile.num_warps, **_overlap(x),
    )  # fmt: skip


def _long_linear(
    x: Tensor, weight: Tensor, out: Tensor, eps: float, residual: tuple[Tensor, Tensor], squares: Tensor
) -> None:
    (M, K), N, tile = x.shape, len(weight), TILES.down
    before, out_squares = residual
    _long_linear_kernel[(triton.cdiv(N, tile.columns), triton.cdiv(M, tile.rows))](
        x, weight, out, before, squares, out_squares, M, eps, N, K, *_sums(squares), x.is_cuda, tile.rows,
        tile.columns, min(tile.part, K & -K), num_warps=tile.num_warps, **_overlap(x),
    )  # fmt: skip


def _sums(squares: Tensor | None) -> tuple[int, int]:
    """How many sums there are of each row, and a power of two that is enough for them."""
    sums = 1 if squares is None else squares.shape[1]
    return sums, triton.next_power_of_2(sums)


def _attention(qkv: Tensor, out: Tensor, tokens: int, num_heads: int) -> None:
    M, width = out.shape
    _attention_kernel[(triton.cdiv(tokens, TILES.queries), M // tokens * num_heads)](
        qkv, out, tokens, num_heads, width // num_heads, qkv.is_cuda, TILES.queries, tile_rows(tokens, 128),
        num_warps=4, **_overlap(qkv),
    )  # fmt: skip


def _sum(y: Tensor | None, terms: Sequence[Tensor | None], like: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z and x of the kernel. Without `y` it is the first of a schedule, and begins only when all before it is done."""
    M, width = like.shape
    z, x = torch.empty_like(like), torch.empty_like(like)
    columns = triton.next_power_of_2(width)
    rows = max(1, 1024 // columns)
    _sum_kernel[(triton.cdiv(M, rows),)](
        y, z, *terms, *[None] * (3 - len(terms)), x, M, eps, width, len(terms), like.is_cuda, rows, columns,
        num_warps=4, **({} if y is None else _overlap(like)),
    )  # fmt: skip
    return z, x


def _overlap(x: Tensor) -> dict[str, bool]:
    """The launch option; the interpreter knows none."""
    return {"launch_pdl": True} if x.is_cuda else {}
