"""Kernels of `hrm.kernels.ops.memory_mlp_forward_loss` and `memory_mlp_backward_update_`: two launches, then one.

- `_hidden_kernel`: z1 and h. It also makes the copy of w2 in the compute dtype, which the two after it read, and sets
  to 0 the counters with which their programs wait for one another.
- `_error_kernel`: y, its error, and the loss, whose parts the program that comes last adds up.
- `_update_kernel`: in three phases, between which all programs wait for all: the gradient of z1; those of the weights,
  and the squares of their norm; clipping and the update. All its programs have to run at once (a cooperative launch).
  Triton's interpreter runs one program after the other, and there each phase is a launch of its own.

In a tile of a matmul, operands are in the compute dtype and sums in float32. Every sum is in a fixed order.

Shapes: M memories, N tokens, D width, H hidden width; each memory has its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.kernels.ops.memory_mlp import MemoryWeights, row_tile
from hrm.kernels.ops.triton.common import multiprocessor_count, shared_memory

_APPLY_TILE = 1024  # weights that a program updates at a time


class _Tiles(NamedTuple):
    """Tiles of the matmuls, for matrices of 16 bits; those of 32 bits take half as many columns at a time."""

    columns: int = 64  # of a tile of z1, y and the gradient of z1, beside `row_tile` rows
    inner: int = 64  # columns of both operands that are multiplied at a time
    weight: int = 64  # rows and columns of a tile of a weight's gradient
    tokens: int = 64  # of both operands of such a tile that are multiplied at a time
    split: int = 1  # programs that share the tokens of such a tile, 1 or 2
    warps: int = 4  # of a program forward
    update_warps: int = 4
    stages: int = 4
    programs: int = 1  # of the update, for each multiprocessor


TILES = _Tiles()


@triton.jit
def _tile(
    matrix: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    ROWS: tl.tensor,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL_ROWS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """A tile [HEIGHT, WIDTH] of a matrix [ROWS, COLUMNS], zeros outside; ALL_... where nothing of it is outside."""
    rows = (row + tl.arange(0, HEIGHT))[:, None]
    columns = (column + tl.arange(0, WIDTH))[None, :]
    at = matrix + rows.to(tl.int64) * COLUMNS + columns
    if ALL_ROWS and ALL_COLUMNS:
        values = tl.load(at)
    elif ALL_COLUMNS:
        values = tl.load(at, rows < ROWS, 0.0)
    else:
        values = tl.load(at, (rows < ROWS) & (columns < COLUMNS), 0.0)
    return values


@triton.jit
def _linear_tile(
    x: tl.tensor,
    weight: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    N: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """A tile of x weightᵀ, for x [N, INPUTS] and weight [OUTPUTS, INPUTS], which is cast to the dtype of x."""
    EVEN: tl.constexpr = INPUTS % INNER == 0
    acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for k in range(0, INPUTS, INNER):
        a = _tile(x, row, k, N, INPUTS, HEIGHT, INNER, False, EVEN)
        b = _tile(weight, column, k, OUTPUTS, INPUTS, WIDTH, INNER, OUTPUTS % WIDTH == 0, EVEN)
        acc = tl.dot(a, b.to(a.dtype).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _bias_tile(bias: tl.tensor, column: tl.tensor, COLUMNS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    columns = column + tl.arange(0, WIDTH)
    return tl.load(bias + columns, columns < COLUMNS, 0.0)[None, :]


@triton.jit
def _put(
    matrix: tl.tensor,
    values: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    ROWS: tl.tensor,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Write a tile of a matrix [ROWS, COLUMNS]."""
    rows = (row + tl.arange(0, HEIGHT))[:, None]
    columns = (column + tl.arange(0, WIDTH))[None, :]
    at = matrix + rows.to(tl.int64) * COLUMNS + columns
    tl.store(at, values.to(matrix.dtype.element_ty), (rows < ROWS) & (columns < COLUMNS))


@triton.jit
def _wait_for_all(counter: tl.tensor) -> None:
    """What any program wrote before is what all read after; for launches whose programs run at once.

    The first program adds so much that the sign of the counter changes when all have come. After two waits it is as it
    was.
    """
    tl.debug_barrier()  # all threads of the program have written
    come = tl.where(tl.program_id(0) == 0, (2147483647 - tl.num_programs(0)) + 2, 1)
    before = tl.atomic_add(counter, come, sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter, 0, sem="acq_rel", scope="gpu")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["M", "N"])  # 1 is a number like others
def _hidden_kernel(
    k: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    w2: tl.tensor,
    z1: tl.tensor,
    h: tl.tensor,
    w2_copy: tl.tensor,
    counters: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    COPY: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    COPY_TILE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program <= M:
        tl.store(counters + program, 0)
    if COPY:
        at = program.to(tl.int64) * COPY_TILE
        while at < M.to(tl.int64) * D * H:
            here = at + tl.arange(0, COPY_TILE)
            inside = here < M.to(tl.int64) * D * H
            tl.store(w2_copy + here, tl.load(w2 + here, inside).to(w2_copy.dtype.element_ty), inside)
            at += tl.num_programs(0).to(tl.int64) * COPY_TILE

    COLUMN_TILES: tl.constexpr = (H + WIDTH - 1) // WIDTH
    tiles = tl.cdiv(N, HEIGHT) * COLUMN_TILES
    memory = (program // tiles).to(tl.int64)
    if memory < M:
        row, column = program % tiles // COLUMN_TILES * HEIGHT, program % COLUMN_TILES * WIDTH
        acc = _linear_tile(
            k + memory * N * D, w1 + memory * H * D, row, column, N, D, H, HEIGHT, WIDTH, INNER, PRECISION
        )
        acc += _bias_tile(b1 + memory * H, column, H, WIDTH)
        _put(z1 + memory * N * H, acc, row, column, N, H, HEIGHT, WIDTH)
        _put(h + memory * N * H, acc * tl.sigmoid(acc), row, column, N, H, HEIGHT, WIDTH)


@triton.jit(do_not_specialize=["N"])  # 1 is a number like others
def _error_kernel(
    h: tl.tensor,
    v: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    y: tl.tensor,
    error: tl.tensor,
    error_sums: tl.tensor,
    loss_parts: tl.tensor,
    loss: tl.tensor,
    counters: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    COLUMN_TILES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    row_tiles = tl.cdiv(N, HEIGHT)
    tiles = row_tiles * COLUMN_TILES
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row, column = tile // COLUMN_TILES * HEIGHT, tile % COLUMN_TILES * WIDTH
    acc = _linear_tile(h + memory * N * H, w2 + memory * D * H, row, column, N, H, D, HEIGHT, WIDTH, INNER, PRECISION)
    acc += _bias_tile(b2 + memory * D, column, D, WIDTH)
    _put(y + memory * N * D, acc, row, column, N, D, HEIGHT, WIDTH)
    difference = acc - _tile(v + memory * N * D, row, column, N, D, HEIGHT, WIDTH, False, D % WIDTH == 0)
    rows = row + tl.arange(0, HEIGHT)
    columns = column + tl.arange(0, WIDTH)
    difference = tl.where((rows < N)[:, None] & (columns < D)[None, :], difference, 0.0)
    _put(error + memory * N * D, difference, row, column, N, D, HEIGHT, WIDTH)
    sums = error_sums + (memory * row_tiles + tile // COLUMN_TILES) * D
    tl.store(sums + columns, tl.sum(difference, 0), columns < D)
    tl.store(loss_parts + memory * tiles + tile, tl.sum(difference * difference))

    tl.debug_barrier()  # all threads have written
    if tl.atomic_add(counters + 1 + memory, 1, sem="acq_rel", scope="gpu") == tiles - 1:
        total = 0.0
        for start in range(0, tiles, PARTS):
            parts = start + tl.arange(0, PARTS)
            total += tl.sum(tl.load(loss_parts + memory * tiles + parts, parts < tiles, 0.0, volatile=True))
        tl.store(loss + memory, total / (N.to(tl.float32) * D))


@triton.jit
def _update_phase_1(
    z1: tl.tensor,
    error: tl.tensor,
    w2: tl.tensor,
    dz1: tl.tensor,
    dz1_sums: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    """The gradient of z1, but for the factor 2 / (N D), and its sums over the rows of each tile."""
    COLUMN_TILES: tl.constexpr = (H + WIDTH - 1) // WIDTH
    EVEN: tl.constexpr = D % INNER == 0
    row_tiles = tl.cdiv(N, HEIGHT)
    tiles = row_tiles * COLUMN_TILES
    item = tl.program_id(0)
    while item < M * tiles:
        memory = (item // tiles).to(tl.int64)
        tile = item % tiles
        row, column = tile // COLUMN_TILES * HEIGHT, tile % COLUMN_TILES * WIDTH
        acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for d in range(0, D, INNER):
            a = _tile(error + memory * N * D, row, d, N, D, HEIGHT, INNER, False, EVEN)
            b = _tile(w2 + memory * D * H, d, column, D, H, INNER, WIDTH, EVEN, H % WIDTH == 0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        z = _tile(z1 + memory * N * H, row, column, N, H, HEIGHT, WIDTH, False, H % WIDTH == 0).to(tl.float32)
        sigmoid = tl.sigmoid(z)
        acc *= sigmoid * (1 + z * (1 - sigmoid))
        _put(dz1 + memory * N * H, acc, row, column, N, H, HEIGHT, WIDTH)
        rows, columns = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        acc = tl.where((rows < N)[:, None], acc, 0.0)  # z1 may be infinite, and 0 times it NaN
        sums = dz1_sums + (memory * row_tiles + tile // COLUMN_TILES) * H
        tl.store(sums + columns, tl.sum(acc, 0), columns < H)
        item += tl.num_programs(0)


@triton.jit
def _weight_gradient(
    left: tl.tensor,
    right: tl.tensor,
    grad: tl.tensor,
    square: tl.tensor,
    halves: tl.tensor,
    arrivals: tl.tensor,
    tile: tl.tensor,
    part: tl.tensor,
    N: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A tile of a weight's gradient, scale leftᵀ right for left [N, ROWS] and right [N, COLUMNS], and its square's sum.

    With SPLIT 2, two programs take half of the tokens each, and the one that comes last adds the halves: the sum of two
    is the same in either order.
    """
    COLUMN_TILES: tl.constexpr = (COLUMNS + SIDE - 1) // SIDE
    row, column = tile // COLUMN_TILES * SIDE, tile % COLUMN_TILES * SIDE
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    span = tl.cdiv(N, TOKENS * SPLIT) * TOKENS
    for n in range(part * span, tl.minimum(part * span + span, N), TOKENS):
        a = _tile(left, n, row, N, ROWS, TOKENS, SIDE, False, ROWS % SIDE == 0)
        b = _tile(right, n, column, N, COLUMNS, TOKENS, SIDE, False, COLUMNS % SIDE == 0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    come = SPLIT - 1
    if SPLIT == 2:
        inside = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        tl.store(halves + part * SIDE * SIDE + inside, acc)
        tl.debug_barrier()  # all threads have written
        come = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
    if come == SPLIT - 1:
        if SPLIT == 2:
            acc += tl.load(halves + (1 - part) * SIDE * SIDE + inside)
        acc *= scale
        _put(grad, acc, row, column, ROWS, COLUMNS, SIDE, SIDE)
        tl.store(square, tl.sum(acc * acc))


@triton.jit
def _bias_gradient(
    sums: tl.tensor, grad: tl.tensor, chunk: tl.tensor, row_tiles: tl.tensor, scale: tl.tensor, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write so many numbers of a bias's gradient, which are the tiles' sums added up; returns the sum of squares."""
    columns = chunk * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, row_tiles, PARTS):
        parts = (start + tl.arange(0, PARTS))[:, None]
        inside = (parts < row_tiles) & (columns < SIZE)[None, :]
        total += tl.sum(tl.load(sums + parts * SIZE + columns[None, :], inside, 0.0), 0)
    total *= scale
    tl.store(grad + columns, total, columns < SIZE)
    return tl.sum(total * total)


@triton.jit
def _update_phase_2(
    k: tl.tensor,
    h: tl.tensor,
    error: tl.tensor,
    error_sums: tl.tensor,
    dz1: tl.tensor,
    dz1_sums: tl.tensor,
    grads: tl.tensor,
    squares: tl.tensor,
    halves: tl.tensor,
    arrivals: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """The gradients of each memory, w1's, b1's, w2's, b2's one after the other, and parts of their squared norm."""
    TILES_H: tl.constexpr = (H + SIDE - 1) // SIDE
    TILES_D: tl.constexpr = (D + SIDE - 1) // SIDE
    MATRIX: tl.constexpr = TILES_H * TILES_D
    PRODUCTS: tl.constexpr = 2 * MATRIX * SPLIT
    WORK: tl.constexpr = PRODUCTS + TILES_H + TILES_D
    ITEMS: tl.constexpr = 2 * MATRIX + TILES_H + TILES_D  # parts of the squared norm
    SIZE: tl.constexpr = 2 * D * H + D + H
    row_tiles = tl.cdiv(N, HEIGHT)
    scale = 2.0 / (N.to(tl.float32) * D)
    number = tl.program_id(0)
    while number < M * WORK:
        memory = (number // WORK).to(tl.int64)
        item = number % WORK
        grad = grads + memory * SIZE
        square = squares + memory * ITEMS
        if item < PRODUCTS:
            tile, part = item // SPLIT, item % SPLIT
            own = memory * 2 * MATRIX + tile
            half = halves + own * SPLIT * SIDE * SIDE
            if tile < MATRIX:
                _weight_gradient(
                    dz1 + memory * N * H, k + memory * N * D, grad, square + tile, half, arrivals + own, tile, part, N,
                    scale, H, D, SIDE, TOKENS, SPLIT, PRECISION,
                )  # fmt: skip
            else:
                _weight_gradient(
                    error + memory * N * D, h + memory * N * H, grad + D * H + H, square + tile, half, arrivals + own,
                    tile - MATRIX, part, N, scale, D, H, SIDE, TOKENS, SPLIT, PRECISION,
                )  # fmt: skip
        elif item < PRODUCTS + TILES_H:
            chunk = item - PRODUCTS
            sums = dz1_sums + memory * row_tiles * H
            total = _bias_gradient(sums, grad + D * H, chunk, row_tiles, scale, H, SIDE, PARTS)
            tl.store(square + 2 * MATRIX + chunk, total)
        else:
            chunk = item - PRODUCTS - TILES_H
            sums = error_sums + memory * row_tiles * D
            total = _bias_gradient(sums, grad + 2 * D * H + H, chunk, row_tiles, scale, D, SIDE, PARTS)
            tl.store(square + 2 * MATRIX + TILES_H + chunk, total)
        number += tl.num_programs(0)


@triton.jit
def _gate(gate: tl.tensor, memory: tl.tensor) -> tl.tensor:
    """A gate of a memory: a number for all, or one of a vector."""
    return tl.load(gate + memory) if gate.dtype.is_ptr() else gate


@triton.jit
def _apply(
    weight: tl.tensor,
    moment: tl.tensor,
    grads: tl.tensor,
    squares: tl.tensor,
    loss: tl.tensor,
    norms: tl.tensor,
    alpha: tl.tensor,
    eta: tl.tensor,
    theta: tl.tensor,
    limit: tl.tensor,
    M: tl.tensor,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    ALL: tl.constexpr,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Update one weight of all memories, whose gradients begin at START of ALL."""
    CHUNKS: tl.constexpr = (SIZE + TILE - 1) // TILE
    number = tl.program_id(0)
    while number < M * CHUNKS:
        memory = (number // CHUNKS).to(tl.int64)
        at = number % CHUNKS * TILE + tl.arange(0, TILE)
        square = 0.0
        for start in range(0, ITEMS, PARTS):
            parts = start + tl.arange(0, PARTS)
            square += tl.sum(tl.load(squares + memory * ITEMS + parts, parts < ITEMS, 0.0))
        norm = tl.sqrt_rn(square)
        if START == 0:
            tl.store(norms + memory, norm, number % CHUNKS == 0)
        forget, keep, rate = _gate(alpha, memory), _gate(eta, memory), _gate(theta, memory)
        # 0 times NaN or infinity is NaN.
        zero = 0 * tl.load(loss + memory) + 0 * norm + 0 * forget + 0 * keep + 0 * rate
        rate *= tl.minimum(limit / norm, 1.0)
        inside = at < tl.where(zero == 0, SIZE, 0)
        grad = tl.load(grads + memory * ALL + START + at, inside)
        new_moment = keep * tl.load(moment + memory * SIZE + at, inside) - rate * grad
        new_weight = (1 - forget) * tl.load(weight + memory * SIZE + at, inside) + new_moment
        tl.store(moment + memory * SIZE + at, new_moment, inside)
        tl.store(weight + memory * SIZE + at, new_weight, inside)
        number += tl.num_programs(0)


@triton.jit(do_not_specialize=["M", "N"])  # 1 is a number like others
def _update_kernel(
    z1: tl.tensor,
    h: tl.tensor,
    k: tl.tensor,
    error: tl.tensor,
    w2_copy: tl.tensor,
    error_sums: tl.tensor,
    dz1: tl.tensor,
    dz1_sums: tl.tensor,
    grads: tl.tensor,
    squares: tl.tensor,
    halves: tl.tensor,
    arrivals: tl.tensor,
    loss: tl.tensor,
    norms: tl.tensor,
    counters: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    s_w1: tl.tensor,
    s_b1: tl.tensor,
    s_w2: tl.tensor,
    s_b2: tl.tensor,
    alpha: tl.tensor,
    eta: tl.tensor,
    theta: tl.tensor,
    limit: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    ITEMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    ARRIVALS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PHASE: tl.constexpr,
) -> None:
    """PHASE: which one, or 0 for all in one launch whose programs run at once."""
    if PHASE == 0 or PHASE == 1:
        at = tl.program_id(0)
        while at < M * ARRIVALS:
            tl.store(arrivals + at, 0)
            at += tl.num_programs(0)
        _update_phase_1(z1, error, w2_copy, dz1, dz1_sums, M, N, D, H, PRECISION, HEIGHT, WIDTH, INNER)
    if PHASE == 0:
        _wait_for_all(counters)
    if PHASE == 0 or PHASE == 2:
        _update_phase_2(
            k, h, error, error_sums, dz1, dz1_sums, grads, squares, halves, arrivals, M, N, D, H, PRECISION, HEIGHT,
            SIDE, TOKENS, SPLIT, 16,
        )  # fmt: skip
    if PHASE == 0:
        _wait_for_all(counters)
    if PHASE == 0 or PHASE == 3:
        ALL: tl.constexpr = 2 * D * H + D + H
        _apply(w1, s_w1, grads, squares, loss, norms, alpha, eta, theta, limit, M, 0, D * H, ALL, ITEMS, PARTS, TILE)
        _apply(w2, s_w2, grads, squares, loss, norms, alpha, eta, theta, limit, M, D * H + H, D * H, ALL, ITEMS, PARTS,
               TILE)  # fmt: skip
        _apply(b1, s_b1, grads, squares, loss, norms, alpha, eta, theta, limit, M, D * H, H, ALL, ITEMS, PARTS, TILE)
        _apply(b2, s_b2, grads, squares, loss, norms, alpha, eta, theta, limit, M, 2 * D * H + H, D, ALL, ITEMS, PARTS,
               TILE)  # fmt: skip


def _matmul_options(k: Tensor, tokens: int) -> dict[str, object]:
    """Precision and tile of the products of rows of tokens."""
    exact = k.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    inner = TILES.inner * 2 // k.element_size()
    stage_bytes = inner * (row_tile(tokens) * k.element_size() + TILES.columns * 4)  # w1 is of 32 bits
    return {
        "PRECISION": "tf32x3" if exact and k.is_cuda else "tf32",
        "HEIGHT": row_tile(tokens),
        "WIDTH": TILES.columns,
        "INNER": inner,
        "num_warps": TILES.warps,
        # Beside them, w1 in 16 bits takes room.
        "num_stages": max(1, min(TILES.stages, (shared_memory(k.device) - 8192) // stage_bytes)),
    }


def _run_at_once(k: Tensor) -> bool:
    """Whether programs of a launch can wait for one another: not in the interpreter."""
    return k.is_cuda


def forward_loss(
    k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, z1, h, y, error, the copy of w2, the tiles' sums of the error, and counters, all 0."""
    *memories, N, D = k.shape
    H, M = w1.shape[-2], math.prod(memories)
    w1, b1, w2, b2 = (weight.contiguous() for weight in (w1, b1, w2, b2))
    z1, h = k.new_empty(*memories, N, H), k.new_empty(*memories, N, H)
    y, error = torch.empty_like(k), torch.empty_like(k)
    copies = w2.dtype != k.dtype
    w2_copy = torch.empty_like(w2, dtype=k.dtype) if copies else k.new_empty(0)
    row_tiles = triton.cdiv(N, row_tile(N))
    error_sums = w1.new_empty(M, row_tiles, D)
    loss = w1.new_empty(memories)
    counters = torch.empty(1 + M, dtype=torch.int32, device=k.device)
    options = _matmul_options(k, N)
    tiles_h, tiles_d = (row_tiles * triton.cdiv(size, TILES.columns) for size in (H, D))
    loss_parts = w1.new_empty(M * tiles_d)
    _hidden_kernel[(max(M * tiles_h, M + 1),)](
        k, w1, b1, w2, z1, h, w2_copy, counters, M, N, D, H, copies, COPY_TILE=1024, **options
    )
    _error_kernel[(M * tiles_d,)](
        h, v, w2_copy if copies else w2, b2, y, error, error_sums, loss_parts, loss, counters, N, D, H, PARTS=256,
        **options,
    )  # fmt: skip
    return loss, z1, h, y, error, w2_copy, error_sums, counters


def backward_update_(
    saved: Sequence[Tensor],
    w: MemoryWeights,
    momentum: MemoryWeights,
    gates: Sequence[float | Tensor],
    max_grad_norm: float,
) -> Tensor:
    """Update `w` and `momentum` in place; returns the gradients' norms."""
    loss, z1, h, k, error, w2_copy, error_sums, counters = saved
    N, D = k.shape[-2:]
    H, M = z1.shape[-1], loss.numel()
    side = TILES.weight
    tiles_h, tiles_d = triton.cdiv(H, side), triton.cdiv(D, side)
    matrices = 2 * tiles_h * tiles_d
    items = matrices + tiles_h + tiles_d
    row_tiles = triton.cdiv(N, row_tile(N))
    dz1 = torch.empty_like(z1)
    halves_size = 2 * matrices * side * side if TILES.split == 2 else 0
    sizes = (M * row_tiles * H, M * (2 * D * H + D + H), M * items, M * halves_size)
    dz1_sums, grads, squares, halves = torch.split(loss.new_empty(sum(sizes)), list(sizes))
    arrivals = torch.empty(M * matrices, dtype=torch.int32, device=k.device)
    norms = torch.empty_like(loss)
    options = _matmul_options(k, N) | {"num_warps": TILES.update_warps}
    if _run_at_once(k):
        phases, programs = [0], TILES.programs * multiprocessor_count(k.device)
        options["launch_cooperative_grid"] = True
    else:
        phases, programs = [1, 2, 3], max(1, M * row_tiles * triton.cdiv(H, TILES.columns) // 2)  # of several tiles
        # The interpreter leaves numbers as Python has them.
        gates = [gate if isinstance(gate, Tensor) else torch.full_like(loss, gate) for gate in gates]
    for phase in phases:
        _update_kernel[(programs,)](
            z1, h, k, error, w2_copy if w2_copy.numel() else w.w2, error_sums, dz1, dz1_sums, grads, squares, halves,
            arrivals, loss, norms, counters, *w, *momentum, *gates, max_grad_norm, M, N, D, H, items, SIDE=side,
            TOKENS=TILES.tokens * 2 // k.element_size(), SPLIT=TILES.split, ARRIVALS=matrices, TILE=_APPLY_TILE,
            PARTS=256, PHASE=phase, **options,
        )  # fmt: skip
    return norms
