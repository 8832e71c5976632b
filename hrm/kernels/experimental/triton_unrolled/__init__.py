"""A recurrence of two states without gradient, in one launch: a slow one, and a fast one that takes a constant too.

Where few rows leave most of a GPU idle, a step is bound by the latency of its launches. Here a program on each
multiprocessor stays for all updates, and the phases of a block

    qkv | attention | o + residual | gate_up + SwiGLU | down + residual

are separated by a barrier in global memory. A matrix that a program multiplies with next does not depend on what the
others do: its first columns are on their way to registers before the program waits. Norms cost no phase: a row is
stored as it is before its norm, and who reads it as a factor sums its squares on the way.

Small models fit on chip, state and all, and need no barrier: `on_chip`. What is too large for either takes the
launches of the backend `triton`.

It does not pay: the five barriers of a block cost as much as five launches from a CUDA graph. One puzzle takes 12.7 ms
on an H100 where `triton` takes 10.5 (docs/kernels.md).

Shapes: B sequences, T tokens, M = B T rows, D hidden size, N heads of size K, F inner width of the gated MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.backend import Backend
from hrm.kernels.backends import triton as triton_module
from hrm.kernels.context import KernelContext
from hrm.kernels.experimental.triton_unrolled.on_chip import as_bits, fits_on_chip, select, update_on_chip
from hrm.kernels.naive import BlockWeights
from hrm.kernels.ops.triton.attention.common import HEAD_SIZES, LOG2_E, load_head, load_rotated
from hrm.kernels.ops.triton.common import DTYPES, multiprocessor_count, tile_rows
from hrm.kernels.requirements import why_not_triton_attention
from hrm.kernels.schedule import Schedule, States


@triton.jit
def _arrive(arrived: tl.tensor) -> None:
    tl.debug_barrier()  # one thread speaks for all: their stores come first
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def _wait(arrived: tl.tensor, phase: tl.tensor) -> None:
    """Until every program has arrived `phase` times. The count only grows, so that no program can miss a phase."""
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < phase * tl.num_programs(0):
        pass


@triton.jit
def _inject(
    x: tl.tensor,
    state: tl.tensor,
    constant: tl.tensor,
    finished: tl.tensor,
    is_slow: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """End the update of state `finished` (0 fast, 1 slow, -1 none), then put the next one's input into `x`."""
    columns = tl.arange(0, COLUMNS)[None, :]
    start = tl.program_id(0) * ROWS
    while start < M:
        rows = start + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < D)
        at = rows[:, None].to(tl.int64) * D + columns
        slow_at = state + M.to(tl.int64) * D + at
        fast = tl.load(state + at, inside, 0.0)
        slow = tl.load(slow_at, inside, 0.0)
        if finished >= 0:
            last = tl.load(x + at, inside, 0.0).to(tl.float32)
            normed = (last * tl.rsqrt(tl.sum(last * last, 1) / D + eps)[:, None]).to(fast.dtype)
            fast = tl.where(finished == 0, normed, fast)
            slow = tl.where(finished == 1, normed, slow)
            tl.store(state + at, fast, inside)
            tl.store(slow_at, slow, inside)
        injection = (slow + tl.load(constant + at, inside, 0.0)).to(fast.dtype)
        tl.store(x + at, tl.where(is_slow == 0, fast + injection, slow + fast), inside)
        start += tl.num_programs(0) * ROWS


@triton.jit
def _load_columns(
    weight: tl.tensor, n: tl.tensor, k: tl.tensor, N: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Rows `n` [BLOCK_N] of `weight` [N, K], BLOCK_K of their columns from `k` on; zeros outside."""
    columns = k + tl.arange(0, BLOCK_K)
    at = weight + n[:, None] * K + columns[None, :]
    if K % BLOCK_K == 0:
        return tl.load(at, (n < N)[:, None], 0.0)
    else:
        return tl.load(at, (n < N)[:, None] & (columns < K)[None, :], 0.0)


@triton.jit
def _load_ahead(
    weight: tl.tensor,
    tile: tl.tensor,
    tiles: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
) -> tl.tuple:
    """The first AHEAD blocks of columns for `tile`, if there is such a tile; gated, the up projection's alternate."""
    n = tile % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(tile < tiles, n, N)
    blocks: tl.tuple = ()
    for i in tl.static_range(AHEAD):
        blocks += (_load_columns(weight, n, i * BLOCK_K, N, K, BLOCK_K),)
        if GATED:
            blocks += (_load_columns(weight + N * K, n, i * BLOCK_K, N, K, BLOCK_K),)
    return blocks


@triton.jit
def _linear(
    arrived: tl.tensor,
    phase: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    residual: tl.tensor,
    rstd: tl.tensor,
    is_normed: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """A phase: `out` [M, N] from `x` [M, K].

    Without a residual, rows of `x` lack their norm, and its factors are left in `rstd` [M]; they are 1 where the rows
    are not `is_normed`. GATED, `weight` [2 N, K] is gate and up projection, and `out` their SwiGLU. With a residual
    [M, N], that is what lacks the factors in `rstd`, and `out` is its sum with the product.
    """
    TILES_N: tl.constexpr = tl.cdiv(N, BLOCK_N)
    NORMS: tl.constexpr = residual is None
    tiles = tl.cdiv(M, BLOCK_M) * TILES_N
    tile = tl.program_id(0)
    ahead = _load_ahead(weight, tile, tiles, N, K, GATED, BLOCK_N, BLOCK_K, AHEAD)
    _wait(arrived, phase)
    while tile < tiles:
        rows = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        at = rows[:, None].to(tl.int64) * N + n[None, :]
        inside = (rows < M)[:, None] & (n < N)[None, :]
        if not NORMS:
            row_factor = tl.load(rstd + rows, rows < M, 0.0)
            before = tl.load(residual + at, inside, 0.0)
        x_rows: tl.tuple = ()
        for i in tl.static_range(AHEAD):
            x_rows += (_load_columns(x, rows.to(tl.int64), i * BLOCK_K, M, K, BLOCK_K),)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(AHEAD):
            a = x_rows[i]
            if NORMS:
                squares += a.to(tl.float32) * a.to(tl.float32)
            if GATED:
                acc = tl.dot(a, tl.trans(ahead[2 * i]), acc, input_precision="ieee")
                acc_up = tl.dot(a, tl.trans(ahead[2 * i + 1]), acc_up, input_precision="ieee")
            else:
                acc = tl.dot(a, tl.trans(ahead[i]), acc, input_precision="ieee")
        if AHEAD * BLOCK_K < K:
            # Not pipelined: what Triton 3.6 makes of that inside the loop over tiles gives other results at every run.
            for k in tl.range(AHEAD * BLOCK_K, K, BLOCK_K, num_stages=1):
                a = _load_columns(x, rows.to(tl.int64), k, M, K, BLOCK_K)
                if NORMS:
                    squares += a.to(tl.float32) * a.to(tl.float32)
                b = _load_columns(weight, n, k, N, K, BLOCK_K)
                acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
                if GATED:
                    b = _load_columns(weight + N * K, n, k, N, K, BLOCK_K)
                    acc_up = tl.dot(a, tl.trans(b), acc_up, input_precision="ieee")
        if NORMS:
            row_factor = tl.where(is_normed, tl.rsqrt(tl.sum(squares, 1) / K + eps), 1.0)
            if tile % TILES_N == 0:
                tl.store(rstd + rows, row_factor, rows < M)
            acc *= row_factor[:, None]
            if GATED:
                acc = acc * tl.sigmoid(acc) * (acc_up * row_factor[:, None])
        else:
            acc += (before.to(tl.float32) * row_factor[:, None]).to(before.dtype).to(tl.float32)
        tl.store(out + at, acc.to(out.dtype.element_ty), inside)
        tile += tl.num_programs(0)
        ahead = _load_ahead(weight, tile, tiles, N, K, GATED, BLOCK_N, BLOCK_K, AHEAD)
    _arrive(arrived)


@triton.jit
def _attention(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    B: tl.tensor,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Tiles of ROWS queries of a head, past which its keys stream in tiles of KEYS (online softmax)."""
    D: tl.constexpr = N * K
    SCALE: tl.constexpr = LOG2_E * K**-0.5
    TILES: tl.constexpr = tl.cdiv(T, ROWS)
    tile = tl.program_id(0)
    while tile < B * N * TILES:
        head = tile // TILES
        token = (head // N).to(tl.int64) * T
        q_at = qkv + token * (3 * D) + head % N * K
        rows = tile % TILES * ROWS + tl.arange(0, ROWS)
        q = load_rotated(q_at, cos, sin, rows, T, 3 * D, K)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        mixed = tl.zeros((ROWS, K), tl.float32)
        for start in tl.range(0, T, KEYS, num_stages=1):  # as in `_linear`
            keys = start + tl.arange(0, KEYS)
            k = load_rotated(q_at + D, cos, sin, keys, T, 3 * D, K)
            v = load_head(q_at + 2 * D, keys, T, 3 * D, K)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
            scores = tl.where((keys < T)[None, :], scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            p = tl.exp2(scores - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(p, 1)
            mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
            peak = new_peak
        at = out + (token + rows)[:, None] * D + head % N * K + tl.arange(0, K)[None, :]
        tl.store(at, (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty), mask=(rows < T)[:, None])
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["slow_updates", "num_updates", "B"])
def _persistent_kernel(
    state: tl.tensor,
    constant: tl.tensor,
    qkv_weights: tl.tuple,
    o_weights: tl.tuple,
    gate_up_weights: tl.tuple,
    down_weights: tl.tuple,
    cos: tl.tensor,
    sin: tl.tensor,
    x: tl.tensor,
    middle: tl.tensor,
    qkv: tl.tensor,
    mixed: tl.tensor,
    hidden: tl.tensor,
    rstd: tl.tensor,
    arrived: tl.tensor,
    slow_updates: tl.tensor,
    num_updates: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    FAST_LAYERS: tl.constexpr,
    SLOW_LAYERS: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    INJECT_ROWS: tl.constexpr,
    INJECT_COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    QKV: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    GATE_UP: tl.constexpr,
    DOWN: tl.constexpr,
) -> None:
    """Bit i of `slow_updates` says that update i is of the slow state; `state` is [2, M, D], fast and slow. The rest
    are work buffers.

    QKV, O, GATE_UP and DOWN: BLOCK_M, BLOCK_N, BLOCK_K and AHEAD of `_linear`.
    """
    D: tl.constexpr = N * K
    M = B * T
    phase = 0
    is_slow = -1
    update = 0
    while update <= num_updates:
        finished = is_slow
        is_slow = (slow_updates >> update) & 1
        _wait(arrived, phase)
        _inject(x, state, constant, finished, is_slow, M, eps, D, INJECT_ROWS, INJECT_COLUMNS)
        _arrive(arrived)
        phase += 1
        block = is_slow * FAST_LAYERS
        first = block
        end = first + FAST_LAYERS + is_slow * (SLOW_LAYERS - FAST_LAYERS)
        # After the last update there is one more round, up to here, for its norm.
        while (block < end) & (update < num_updates):
            _linear(
                arrived, phase, x, select(qkv_weights, block), qkv, None, rstd, block > first, M, eps,
                3 * D, D, False, QKV[0], QKV[1], QKV[2], QKV[3],
            )  # fmt: skip
            _wait(arrived, phase + 1)
            _attention(qkv, cos, sin, mixed, B, T, N, K, QUERIES, KEYS)
            _arrive(arrived)
            _linear(
                arrived, phase + 2, mixed, select(o_weights, block), middle, x, rstd, True, M, eps,
                D, D, False, O[0], O[1], O[2], O[3],
            )  # fmt: skip
            _linear(
                arrived, phase + 3, middle, select(gate_up_weights, block), hidden, None, rstd, True, M, eps,
                F, D, True, GATE_UP[0], GATE_UP[1], GATE_UP[2], GATE_UP[3],
            )  # fmt: skip
            _linear(
                arrived, phase + 4, hidden, select(down_weights, block), x, middle, rstd, True, M, eps,
                D, F, False, DOWN[0], DOWN[1], DOWN[2], DOWN[3],
            )  # fmt: skip
            phase += 5
            block += 1
        update += 1


# ---- launchers


# With more, launches are short beside what they do, and the backend `triton` does it faster.
_MOST_ROWS = 1024
# Of both operands in the registers of a program, 256 KiB in all.
_BYTES_AHEAD = 144 * 1024


@functools.cache
def _tile(rows: int, outputs: int, inputs: int, matrices: int, itemsize: int, programs: int) -> tuple[int, ...]:
    """BLOCK_M, BLOCK_N, BLOCK_K and AHEAD for products of `rows` with `matrices` of [`outputs`, `inputs`]."""
    if itemsize == 4:  # without matrix units, and with twice the registers a number
        return 32, 32, 32, 0

    def fits(tile: tuple[int, int]) -> bool:
        m, n = tile
        return (m + matrices * n) * inputs * itemsize <= _BYTES_AHEAD

    def time(tile: tuple[int, int]) -> float:
        # Bound by what a multiprocessor reads. Weights count half if it reads them while it waits.
        m, n = tile
        waves = triton.cdiv(triton.cdiv(rows, m) * triton.cdiv(outputs, n), programs)
        return float(waves * (m + matrices * n * (0.5 if fits(tile) else 1.0)))

    heights = [m for m in (16, 32, 64, 128) if m <= tile_rows(rows, 128)]
    widths = [n for n in (16, 32, 64, 128) if n <= tile_rows(outputs, 128)]
    # 128 x 128 accumulators in float32 are a quarter of the registers.
    tile = min(((m, n) for m in heights for n in widths if m * n * matrices <= 128 * 128), key=time)
    block_k = tile_rows(inputs, 128 if fits(tile) else 64)
    return *tile, block_k, triton.cdiv(inputs, block_k) if fits(tile) else 0


def _update_persistently(
    state: Tensor,
    constant: Tensor,
    blocks: list[BlockWeights],
    fast_layers: int,
    slow_updates: Sequence[bool],
    context: KernelContext,
) -> None:
    """As `on_chip.update_on_chip`, for any width."""
    _, batch, tokens, width = state.shape
    inner = blocks[0].down.shape[1]
    rows = batch * tokens
    cos, sin = (None, None) if context.rotary is None else context.rotary
    programs = multiprocessor_count(state.device)
    itemsize = state.element_size()
    queries = 32 if itemsize == 4 else _queries(batch * context.num_heads, tokens, programs)
    _persistent_kernel[(programs,)](
        state,
        constant,
        *zip(*blocks, strict=True),
        cos,
        sin,
        *(state.new_empty(rows, columns) for columns in (width, width, 3 * width, width, inner)),
        state.new_empty(rows, dtype=torch.float32),
        # Zeroed for every call, in a CUDA graph at every replay: no launch sees what another one counted.
        state.new_zeros(1, dtype=torch.int32),
        as_bits(slow_updates),
        len(slow_updates),
        batch,
        context.eps,
        FAST_LAYERS=fast_layers,
        SLOW_LAYERS=len(blocks) - fast_layers,
        T=tokens,
        N=context.num_heads,
        K=width // context.num_heads,
        F=inner,
        INJECT_ROWS=max(1, 1024 // triton.next_power_of_2(width)),
        INJECT_COLUMNS=triton.next_power_of_2(width),
        QUERIES=queries,
        KEYS=32 if itemsize == 4 else tile_rows(tokens, 128) if tokens <= 128 else 64,
        QKV=_tile(rows, 3 * width, width, 1, itemsize, programs),
        O=_tile(rows, width, width, 1, itemsize, programs),
        GATE_UP=_tile(rows, inner, width, 2, itemsize, programs),
        DOWN=_tile(rows, width, inner, 1, itemsize, programs),
        num_warps=8,
        # All programs run at once, or the launch fails: a barrier would wait for ever for one that has no room.
        launch_cooperative_grid=state.is_cuda,
    )


def _queries(heads: int, tokens: int, programs: int) -> int:
    """The longest tile of queries that leaves no program without one, if there is such a tile.

    Not 64: what Triton 3.6 makes of it, for 8 warps, gave wrong results on an H200.
    """
    return 32 if tokens > 16 and heads * triton.cdiv(tokens, 32) >= programs else 16


class _Roles(NamedTuple):
    """Which states and modules of a schedule are the kernels'."""

    fast: str  # fast = fast_module(fast, slow + constant)
    slow: str  # slow = slow_module(slow, fast)
    constant: str
    fast_module: str | None  # None where the schedule has no such update
    slow_module: str | None


def _roles(schedule: Schedule) -> _Roles | None:
    """Those of a schedule of at most 31 updates that fit the kernels, or None."""
    kinds = set(schedule)
    fast_ones, slow_ones = [u for u in kinds if len(u.inputs) == 2], [u for u in kinds if len(u.inputs) == 1]
    if not 1 <= len(schedule) <= 31 or len(kinds) != len(fast_ones[:1]) + len(slow_ones[:1]):
        return None
    if not fast_ones:
        (slow,) = slow_ones
        return _Roles(slow.inputs[0], slow.state, slow.inputs[0], None, slow.module)
    (fast,) = fast_ones
    slow_name, constant = fast.inputs
    roles = _Roles(fast.state, slow_name, constant, fast.module, None)
    if slow_ones:
        (slow,) = slow_ones
        if slow.state == roles.constant:
            roles = roles._replace(slow=roles.constant, constant=roles.slow)
        if (slow.state, slow.inputs) != (roles.slow, (roles.fast,)):
            return None
        roles = roles._replace(slow_module=slow.module)
    return roles if len({roles.fast, roles.slow, roles.constant}) == 3 else None


def run(
    states: States, schedule: Schedule, modules: Mapping[str, Sequence[BlockWeights]], context: KernelContext
) -> dict[str, Tensor]:
    """As `hrm.kernels.schedule.Run`, on the blocks of `naive`, all of one inner width. There is no gradient.

    States are of one shape and dtype: bfloat16, float16 or float32, in heads of 16, 32, 64 or 128 features. Schedules
    that the kernels are not made for, and batches for which they do not pay, take the launches of `backends.triton`.

    Raises:
        UserError: a shape or dtype that the kernels are not made for.
    """
    _check(states, context)
    roles = _roles(schedule)
    fast_blocks = modules[roles.fast_module] if roles and roles.fast_module else []
    slow_blocks = modules[roles.slow_module] if roles and roles.slow_module else []
    blocks = [BlockWeights(*(matrix.contiguous() for matrix in block)) for block in (*fast_blocks, *slow_blocks)]
    has_all = roles is not None and all(modules[update.module] for update in schedule)
    if roles is None or not has_all or (kernel := _choose(states[roles.fast], blocks, context)) is None:
        return triton_module.run(states, schedule, modules, context)
    state = torch.stack((states[roles.fast], states[roles.slow]))
    slow_updates = [update.state == roles.slow for update in schedule]
    kernel(state, states[roles.constant].contiguous(), blocks, len(fast_blocks), slow_updates, context)
    return {**states, roles.fast: state[0], roles.slow: state[1]}


def _choose(z: Tensor, blocks: Sequence[BlockWeights], context: KernelContext) -> Callable[..., None] | None:
    """The faster kernel, or None where neither pays."""
    # A program per sequence has to make up for the multiprocessors that get none.
    many = 4 * len(z) >= multiprocessor_count(z.device)
    if many and fits_on_chip(z, blocks[0].down.shape[1], z.shape[-1] // context.num_heads):
        return update_on_chip
    return _update_persistently if z.shape[0] * z.shape[1] <= _MOST_ROWS else None


def _check(states: States, context: KernelContext) -> None:
    (first_name, first), *others = states.items()
    if first.dtype not in DTYPES:
        raise UserError(f"the unrolled recurrence has no {first.dtype} kernel; take bfloat16, float16 or float32.")
    for name, tensor in others:
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise UserError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"it must be like {first_name}, {first.dtype} of shape {tuple(first.shape)}."
            )
    (tokens, width), num_heads = first.shape[1:], context.num_heads
    if width % num_heads or width // num_heads not in HEAD_SIZES:
        raise UserError(
            f"the unrolled recurrence has no kernel for {num_heads} heads of {width} features together; "
            "choose hidden_size / num_heads among 16, 32, 64 and 128, or kernels=naive."
        )
    if context.rotary is not None and context.rotary.cos.shape != (tokens, width // num_heads):
        raise UserError(
            f"rotary tables have shape {tuple(context.rotary.cos.shape)}; "
            f"{first_name} needs (T, head size) = {(tokens, width // num_heads)}."
        )


BACKEND = Backend(
    triton_module.reasoning_module,
    triton_module.first_token_block,
    run=run,
    why_not=why_not_triton_attention,
    eight_bit=False,
)
