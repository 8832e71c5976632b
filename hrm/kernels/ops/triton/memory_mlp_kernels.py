"""Kernels of `memory_mlp`, which launches them: the first two one after the other, and the third for the update.

- `hidden_kernel`: z1 and h. It also makes the copy of w2 in the compute dtype, which the two after it read, and sets
  to 0 the counters with which their programs wait for one another.
- `error_kernel`: y, its error, and the loss, whose parts the program that comes last adds up.
- `update_kernel`: in three phases, between which all programs wait for all: the gradient of z1; those of the weights,
  and the squares of their norm; clipping and the update. All its programs have to run at once (a cooperative launch).
  Triton's interpreter runs one program after the other, and there each phase is a launch of its own.

In a tile of a matmul, operands are in the compute dtype and sums in float32. Every sum is in a fixed order.

Shapes: M memories, N tokens, D width, H hidden width; each memory has its own weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hrm.kernels.ops.triton.matmul import reciprocal


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
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """A tile of x weightᵀ, for x [N, INPUTS] and weight [OUTPUTS, INPUTS], which is cast to the dtype of x.

    It is made as the transpose of weight xᵀ: a left operand that was cast may stay in registers.
    """
    EVEN: tl.constexpr = INPUTS % INNER == 0
    acc = tl.zeros((WIDTH, HEIGHT), tl.float32)
    for k in range(0, INPUTS, INNER):
        a = _tile(x, row, k, N, INPUTS, HEIGHT, INNER, WHOLE, EVEN)
        b = _tile(weight, column, k, OUTPUTS, INPUTS, WIDTH, INNER, OUTPUTS % WIDTH == 0, EVEN)
        acc = tl.dot(b.to(a.dtype), a.T, acc, input_precision=PRECISION)
    return acc.T


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
def _silu(z: tl.tensor, EXACT: tl.constexpr) -> tl.tuple:
    """silu of z and its slope; EXACT: to float32, otherwise by fewer instructions to what 16 bits show."""
    sigmoid = tl.sigmoid(z) if EXACT else reciprocal(1 + tl.exp(-z))
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


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
        now = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def _prefetch(values: tl.tensor, count: tl.tensor, LINES: tl.constexpr) -> None:
    """Bring float32 numbers into the L2 cache, all programs together."""
    at = (tl.program_id(0) * LINES + tl.arange(0, LINES)).to(tl.int64) * 32  # of 128 bytes
    while tl.min(at) < count:
        line = values + tl.minimum(at, count - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1
        )
        at += tl.num_programs(0).to(tl.int64) * LINES * 32


@triton.jit(do_not_specialize=["M", "N"])  # 1 is a number like others
def hidden_kernel(
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
    WHOLE: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program <= M:
        tl.store(counters + program, 0)
    if COPY:
        here = program.to(tl.int64) * COPY_TILE + tl.arange(0, COPY_TILE)
        count = M.to(tl.int64) * D * H
        copied = tl.load(w2 + here, here < count)  # its first part is on its way while the product is made

    COLUMN_TILES: tl.constexpr = (H + WIDTH - 1) // WIDTH
    tiles = tl.cdiv(N, HEIGHT) * COLUMN_TILES
    memory = (program // tiles).to(tl.int64)
    if memory < M:
        row, column = program % tiles // COLUMN_TILES * HEIGHT, program % COLUMN_TILES * WIDTH
        bias = _bias_tile(b1 + memory * H, column, H, WIDTH)
        acc = _linear_tile(
            k + memory * N * D, w1 + memory * H * D, row, column, N, D, H, HEIGHT, WIDTH, INNER, PRECISION, WHOLE
        )
        acc += bias
        _put(z1 + memory * N * H, acc, row, column, N, H, HEIGHT, WIDTH)
        hidden = _silu(acc, h.dtype.element_ty == tl.float32)[0]
        _put(h + memory * N * H, hidden, row, column, N, H, HEIGHT, WIDTH)
    if COPY:
        tl.store(w2_copy + here, copied.to(w2_copy.dtype.element_ty), here < count)
        here += tl.num_programs(0).to(tl.int64) * COPY_TILE
        while tl.min(here) < count:
            tl.store(w2_copy + here, tl.load(w2 + here, here < count).to(w2_copy.dtype.element_ty), here < count)
            here += tl.num_programs(0).to(tl.int64) * COPY_TILE


@triton.jit(do_not_specialize=["N"])  # 1 is a number like others
def error_kernel(
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
    WHOLE: tl.constexpr,
) -> None:
    COLUMN_TILES: tl.constexpr = (D + WIDTH - 1) // WIDTH
    row_tiles = tl.cdiv(N, HEIGHT)
    tiles = row_tiles * COLUMN_TILES
    memory = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row, column = tile // COLUMN_TILES * HEIGHT, tile % COLUMN_TILES * WIDTH
    # What the end needs comes while the product is made.
    wanted = _tile(v + memory * N * D, row, column, N, D, HEIGHT, WIDTH, WHOLE, D % WIDTH == 0)
    bias = _bias_tile(b2 + memory * D, column, D, WIDTH)
    acc = _linear_tile(
        h + memory * N * H, w2 + memory * D * H, row, column, N, H, D, HEIGHT, WIDTH, INNER, PRECISION, WHOLE
    )
    acc += bias
    _put(y + memory * N * D, acc, row, column, N, D, HEIGHT, WIDTH)
    difference = acc - wanted
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
    WHOLE: tl.constexpr,
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
        z = _tile(z1 + memory * N * H, row, column, N, H, HEIGHT, WIDTH, WHOLE, H % WIDTH == 0)
        acc = tl.zeros((WIDTH, HEIGHT), tl.float32)
        for d in range(0, D, INNER):
            a = _tile(error + memory * N * D, row, d, N, D, HEIGHT, INNER, WHOLE, EVEN)
            b = _tile(w2 + memory * D * H, d, column, D, H, INNER, WIDTH, EVEN, H % WIDTH == 0)
            acc = tl.dot(b.T, a.T, acc, input_precision=PRECISION)
        acc = acc.T * _silu(z.to(tl.float32), z.dtype == tl.float32)[1]
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
    tile: tl.tensor,
    N: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """A tile of scale leftᵀ right, for left [N, ROWS] and right [N, COLUMNS], and the sum of its squares."""
    COLUMN_TILES: tl.constexpr = (COLUMNS + SIDE - 1) // SIDE
    row, column = tile // COLUMN_TILES * SIDE, tile % COLUMN_TILES * SIDE
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    for n in range(0, N, TOKENS):
        a = _tile(left, n, row, N, ROWS, TOKENS, SIDE, WHOLE, ROWS % SIDE == 0)
        b = _tile(right, n, column, N, COLUMNS, TOKENS, SIDE, WHOLE, COLUMNS % SIDE == 0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
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
    M: tl.tensor,
    N: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
    HEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """The gradients of each memory, w1's, b1's, w2's, b2's one after the other, and parts of their squared norm."""
    TILES_H: tl.constexpr = (H + SIDE - 1) // SIDE
    TILES_D: tl.constexpr = (D + SIDE - 1) // SIDE
    MATRIX: tl.constexpr = TILES_H * TILES_D
    CHUNKS_H: tl.constexpr = (H + BIAS - 1) // BIAS
    CHUNKS_D: tl.constexpr = (D + BIAS - 1) // BIAS
    ITEMS: tl.constexpr = 2 * MATRIX + CHUNKS_H + CHUNKS_D  # parts of the squared norm
    SIZE: tl.constexpr = 2 * D * H + D + H
    row_tiles = tl.cdiv(N, HEIGHT)
    scale = 2.0 / (N.to(tl.float32) * D)
    number = tl.program_id(0)
    # A loop for each of the four, through which numbers run on. As branches of one loop, the two with products would
    # be joined by the compiler, and their multiplications then wait for one another.
    while number < M * MATRIX:
        memory, tile = (number // MATRIX).to(tl.int64), number % MATRIX
        _weight_gradient(
            dz1 + memory * N * H, k + memory * N * D, grads + memory * SIZE, squares + memory * ITEMS + tile, tile, N,
            scale, H, D, SIDE, TOKENS, PRECISION, WHOLE,
        )  # fmt: skip
        number += tl.num_programs(0)
    number -= M * MATRIX
    while number < M * MATRIX:
        memory, tile = (number // MATRIX).to(tl.int64), number % MATRIX
        _weight_gradient(
            error + memory * N * D, h + memory * N * H, grads + memory * SIZE + D * H + H,
            squares + memory * ITEMS + MATRIX + tile, tile, N, scale, D, H, SIDE, TOKENS, PRECISION, WHOLE,
        )  # fmt: skip
        number += tl.num_programs(0)
    number -= M * MATRIX
    while number < M * CHUNKS_H:
        memory, chunk = (number // CHUNKS_H).to(tl.int64), number % CHUNKS_H
        sums, grad = dz1_sums + memory * row_tiles * H, grads + memory * SIZE + D * H
        total = _bias_gradient(sums, grad, chunk, row_tiles, scale, H, BIAS, PARTS)
        tl.store(squares + memory * ITEMS + 2 * MATRIX + chunk, total)
        number += tl.num_programs(0)
    number -= M * CHUNKS_H
    while number < M * CHUNKS_D:
        memory, chunk = (number // CHUNKS_D).to(tl.int64), number % CHUNKS_D
        sums, grad = error_sums + memory * row_tiles * D, grads + memory * SIZE + 2 * D * H + H
        total = _bias_gradient(sums, grad, chunk, row_tiles, scale, D, BIAS, PARTS)
        tl.store(squares + memory * ITEMS + 2 * MATRIX + CHUNKS_H + chunk, total)
        number += tl.num_programs(0)


@triton.jit
def _gate(gate: tl.tensor, memory: tl.tensor) -> tl.tensor:
    """A gate of a memory: a number for all, or one of a vector."""
    return tl.load(gate + memory) if gate.dtype.is_ptr() else gate


@triton.jit
def _apply(
    weight: tl.tensor,
    moment: tl.tensor,
    grad: tl.tensor,
    squares: tl.tensor,
    loss: tl.tensor,
    norms: tl.tensor,
    alpha: tl.tensor,
    eta: tl.tensor,
    theta: tl.tensor,
    limit: tl.tensor,
    memory: tl.tensor,
    chunk: tl.tensor,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Update so many numbers of one weight of a memory, whose gradient begins at `grad`; FIRST: its norm is kept."""
    at = chunk * TILE + tl.arange(0, TILE)
    weight += memory * SIZE + at
    moment += memory * SIZE + at
    inside = at < SIZE
    # All is on its way before any of it is waited for.
    slope, old_moment, old_weight = tl.load(grad + at, inside), tl.load(moment, inside), tl.load(weight, inside)
    forget, keep, rate = _gate(alpha, memory), _gate(eta, memory), _gate(theta, memory)
    square = 0.0
    for start in range(0, ITEMS, PARTS):
        parts = start + tl.arange(0, PARTS)
        square += tl.sum(tl.load(squares + memory * ITEMS + parts, parts < ITEMS, 0.0))
    norm = tl.sqrt_rn(square)
    if FIRST:
        tl.store(norms + memory, norm, chunk == 0)
    # 0 times NaN or infinity is NaN.
    zero = 0 * tl.load(loss + memory) + 0 * norm + 0 * forget + 0 * keep + 0 * rate
    new_moment = keep * old_moment - rate * tl.minimum(limit / norm, 1.0) * slope
    inside = at < tl.where(zero == 0, SIZE, 0)
    tl.store(moment, new_moment, inside)
    tl.store(weight, (1 - forget) * old_weight + new_moment, inside)


@triton.jit
def _update_phase_3(
    w: tl.tuple,
    momentum: tl.tuple,
    grads: tl.tensor,
    squares: tl.tensor,
    loss: tl.tensor,
    norms: tl.tensor,
    alpha: tl.tensor,
    eta: tl.tensor,
    theta: tl.tensor,
    limit: tl.tensor,
    M: tl.tensor,
    D: tl.constexpr,
    H: tl.constexpr,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Clipping, momentum and weights."""
    CHUNKS: tl.constexpr = (D * H + TILE - 1) // TILE
    CHUNKS_H: tl.constexpr = (H + TILE - 1) // TILE
    CHUNKS_D: tl.constexpr = (D + TILE - 1) // TILE
    WORK: tl.constexpr = 2 * CHUNKS + CHUNKS_H + CHUNKS_D
    number = tl.program_id(0)
    while number < M * WORK:
        memory = (number // WORK).to(tl.int64)
        chunk = number % WORK
        grad = grads + memory * (2 * D * H + D + H)
        if chunk < CHUNKS:
            _apply(w[0], momentum[0], grad, squares, loss, norms, alpha, eta, theta, limit, memory, chunk, True, D * H,
                   ITEMS, PARTS, TILE)  # fmt: skip
        elif chunk < 2 * CHUNKS:
            _apply(w[2], momentum[2], grad + D * H + H, squares, loss, norms, alpha, eta, theta, limit, memory,
                   chunk - CHUNKS, False, D * H, ITEMS, PARTS, TILE)  # fmt: skip
        elif chunk < 2 * CHUNKS + CHUNKS_H:
            _apply(w[1], momentum[1], grad + D * H, squares, loss, norms, alpha, eta, theta, limit, memory,
                   chunk - 2 * CHUNKS, False, H, ITEMS, PARTS, TILE)  # fmt: skip
        else:
            _apply(w[3], momentum[3], grad + 2 * D * H + H, squares, loss, norms, alpha, eta, theta, limit, memory,
                   chunk - 2 * CHUNKS - CHUNKS_H, False, D, ITEMS, PARTS, TILE)  # fmt: skip
        number += tl.num_programs(0)


@triton.jit(do_not_specialize=["M", "N"])  # 1 is a number like others
def update_kernel(
    z1: tl.tensor,
    h: tl.tensor,
    k: tl.tensor,
    error: tl.tensor,
    w2_copy: tl.tensor,
    error_sums: tl.tensor,
    dz1: tl.tensor,
    scratch: tl.tensor,
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
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    PHASE: tl.constexpr,
) -> None:
    """PHASE: which one, or 0 for all in one launch whose programs run at once.

    scratch: the gradients of each memory, then the tiles' sums of dz1, then parts of the squared norm.
    """
    grads = scratch
    dz1_sums = grads + M.to(tl.int64) * (2 * D * H + D + H)
    squares = dz1_sums + M.to(tl.int64) * tl.cdiv(N, HEIGHT) * H
    if PHASE == 0:
        _prefetch(s_w1, M.to(tl.int64) * D * H, 128)
        _prefetch(s_w2, M.to(tl.int64) * D * H, 128)
    if PHASE == 0 or PHASE == 1:
        _update_phase_1(z1, error, w2_copy, dz1, dz1_sums, M, N, D, H, PRECISION, HEIGHT, WIDTH, INNER, WHOLE)
    if PHASE == 0:
        _wait_for_all(counters)
    if PHASE == 0 or PHASE == 2:
        _update_phase_2(
            k, h, error, error_sums, dz1, dz1_sums, grads, squares, M, N, D, H, PRECISION, HEIGHT, SIDE, TOKENS, BIAS,
            16, WHOLE,
        )  # fmt: skip
    if PHASE == 0:
        _wait_for_all(counters)
    if PHASE == 0 or PHASE == 3:
        _update_phase_3(
            (w1, b1, w2, b2), (s_w1, s_b1, s_w2, s_b2), grads, squares, loss, norms, alpha, eta, theta, limit, M, D, H,
            ITEMS, PARTS, TILE,
        )  # fmt: skip
