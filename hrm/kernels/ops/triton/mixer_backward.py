"""Blocks that mix tokens by a gated MLP over them, with gradients, in Triton: each half is one autograd function.

Over tokens, nothing of the hidden units is kept: they are as many as 2 G / T times the state, and are computed again
from it by each of two kernels. One gives the gradient of the state, a program for some features of a sequence. The
other one gives those of the weights: a program goes over many sequences with some hidden units, whose sums stay in
registers, and what the programs found is added up in one order.

Over features, the projections are kept. The product with the second matrix, backward, has the gate in its epilogue:
it reads gate and up and writes their gradients. The other matmuls are the library's.

Neither half sums over hidden units for the normed gate (`naive.norm_gated`), backward. With q = silu(g) u and p = g u,
the MLP's result is m = r W q, r = 1 / sqrt(mean(p²) + eps) for each token (or feature). For a gradient d of m,
    dp = sigmoid(g) e - p r² <d, m> / F,  e = r transpose(W) d,
where m stands for all F hidden units. It is kept in place of the half's result, which the last norm gives again from
the sum of m and the state.

Shapes: B sequences, T tokens, D features, M = B T rows, G and F inner widths of the MLPs over tokens and features.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton import mixer
from hrm.kernels.ops.triton.common import differentiates, multiprocessor_count, row_wise


class _Tile(NamedTuple):
    """Of a kernel: features (or rows) and hidden units (or columns) at a time, loads ahead, warps."""

    features: int
    hidden: int
    stages: int
    warps: int
    registers: int | None = None


_STATE_TILE = _Tile(64, 32, 2, 4, 168)
_WEIGHTS_TILE = _Tile(32, 64, 3, 4)
_WEIGHTS_PROGRAMS = 2  # for each multiprocessor
_GATE_TILE = _Tile(64, 128, 3, 4)


@triton.jit
def _pack_kernel(
    gate_up: tl.tensor,
    down: tl.tensor,
    packed: tl.tensor,
    T: tl.constexpr,
    G: tl.constexpr,
    HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    part = tl.program_id(1)
    hidden = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    tokens = tl.arange(0, COLUMNS)[None, :]
    inside = (hidden < G) & (tokens < T)
    if part == 2:
        value = tl.load(down + tokens * G + hidden, inside, 0)
    else:
        value = tl.load(gate_up + (part * G + hidden) * T + tokens, inside, 0)
    tl.store(packed + (part * HIDDEN + hidden) * TOKENS + tokens, value, (hidden < HIDDEN) & (tokens < TOKENS))


@triton.jit
def _products(
    left: tl.tensor,
    right: tl.tensor,
    weights_left: tl.tensor,
    weights_right: tl.tensor,
) -> tl.tensor:
    """left @ weights_left.T + right @ weights_right.T"""
    return tl.dot(right, weights_right.T, tl.dot(left, weights_left.T, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _tokens_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    kept: tl.tensor,
    weights_left: tl.tensor_descriptor,
    weights_right: tl.tensor_descriptor,
    rstd: tl.tensor,
    factors: tl.tensor,
    dx: tl.tensor,
    d_mixed: tl.tensor,
    shares: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    ALL_HIDDEN: tl.constexpr,
    NORMED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    tokens = tl.arange(0, LEFT)
    later = LEFT + tl.arange(0, RIGHT)
    start = tl.program_id(1).to(tl.int64) * (T * D)
    at_left = start + tokens[:, None] * D + features[None, :]
    at_right = start + later[:, None] * D + features[None, :]
    in_left = (tokens < T)[:, None] & (features < D)[None, :]
    in_right = (later < T)[:, None] & (features < D)[None, :]
    feature_at = tl.program_id(1) * D + features
    left = tl.load(x + at_left, in_left, 0)
    right = tl.load(x + at_right, in_right, 0)
    d_left = tl.load(dy + at_left, in_left, 0).to(tl.float32)
    d_right = tl.load(dy + at_right, in_right, 0).to(tl.float32)
    kept_left = tl.load(kept + at_left, in_left, 0).to(tl.float32)
    kept_right = tl.load(kept + at_right, in_right, 0).to(tl.float32)
    scale = tl.load(rstd + feature_at, features < D, 0)[None, :]
    y_left = (left.to(tl.float32) + kept_left) * scale if NORMED else kept_left
    y_right = (right.to(tl.float32) + kept_right) * scale if NORMED else kept_right
    along = ((tl.sum(d_left * y_left, 0) + tl.sum(d_right * y_right, 0)) / T)[None, :]
    # Gradients of the sum before the norm, from here on.
    d_left = scale * (d_left - y_left * along)
    d_right = scale * (d_right - y_right * along)
    acc_left = d_left.T
    acc_right = d_right.T
    share = tl.zeros((FEATURES,), tl.float32)
    if NORMED:
        factor = tl.load(factors + feature_at, features < D, 0)
        share = (tl.sum(d_left * kept_left, 0) + tl.sum(d_right * kept_right, 0)) * factor * factor / G
        tl.store(shares + feature_at, share, features < D)
        d_left *= factor[None, :]
        d_right *= factor[None, :]
    narrow_left = d_left.to(left.dtype)
    narrow_right = d_right.to(left.dtype)
    tl.store(d_mixed + at_left, narrow_left, in_left)
    tl.store(d_mixed + at_right, narrow_right, in_right)
    left = left.T
    right = right.T
    narrow_left = narrow_left.T
    narrow_right = narrow_right.T
    for begin in tl.range(0, ALL_HIDDEN, HIDDEN, num_stages=STAGES):
        gate_left = weights_left.load([begin, 0])
        gate_right = weights_right.load([begin, LEFT])
        up_left = weights_left.load([ALL_HIDDEN + begin, 0])
        up_right = weights_right.load([ALL_HIDDEN + begin, LEFT])
        gate = _products(left, right, gate_left, gate_right)
        up = _products(left, right, up_left, up_right)
        at_down = 2 * ALL_HIDDEN + begin
        d_inner = _products(
            narrow_left, narrow_right, weights_left.load([at_down, 0]), weights_right.load([at_down, LEFT])
        )
        sigmoid = tl.sigmoid(gate)
        product = gate * up
        outer = sigmoid * d_inner
        d_product = outer - share[:, None] * product if NORMED else outer
        d_gate = (up * d_product + product * (1 - sigmoid) * outer).to(left.dtype)
        d_up = (gate * d_product).to(left.dtype)
        acc_left = tl.dot(d_gate, gate_left, acc_left, input_precision="ieee")
        acc_left = tl.dot(d_up, up_left, acc_left, input_precision="ieee")
        acc_right = tl.dot(d_gate, gate_right, acc_right, input_precision="ieee")
        acc_right = tl.dot(d_up, up_right, acc_right, input_precision="ieee")
    tl.store(dx + at_left, acc_left.to(left.dtype).T, in_left)
    tl.store(dx + at_right, acc_right.to(left.dtype).T, in_right)


@triton.jit
def _token_weights_kernel(
    x_left: tl.tensor_descriptor,
    x_right: tl.tensor_descriptor,
    d_mixed_left: tl.tensor_descriptor,
    d_mixed_right: tl.tensor_descriptor,
    shares: tl.tensor,
    weights_left: tl.tensor_descriptor,
    weights_right: tl.tensor_descriptor,
    sums: tl.tensor,
    B: tl.tensor,
    D: tl.constexpr,
    ALL_HIDDEN: tl.constexpr,
    NORMED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of HIDDEN rows of each of the packed matrices, from one of so many parts of the batch."""
    begin = tl.program_id(0) * HIDDEN
    gate_left = weights_left.load([begin, 0])
    gate_right = weights_right.load([begin, LEFT])
    up_left = weights_left.load([ALL_HIDDEN + begin, 0])
    up_right = weights_right.load([ALL_HIDDEN + begin, LEFT])
    down_left = weights_left.load([2 * ALL_HIDDEN + begin, 0])
    down_right = weights_right.load([2 * ALL_HIDDEN + begin, LEFT])
    d_gate_left = tl.zeros((HIDDEN, LEFT), tl.float32)
    d_gate_right = tl.zeros((HIDDEN, RIGHT), tl.float32)
    d_up_left = tl.zeros((HIDDEN, LEFT), tl.float32)
    d_up_right = tl.zeros((HIDDEN, RIGHT), tl.float32)
    d_down_left = tl.zeros((HIDDEN, LEFT), tl.float32)
    d_down_right = tl.zeros((HIDDEN, RIGHT), tl.float32)
    TILES: tl.constexpr = (D + FEATURES - 1) // FEATURES
    for tile in tl.range(tl.program_id(1), B * TILES, tl.num_programs(1), num_stages=STAGES):
        sequence = tile // TILES
        first = tile % TILES * FEATURES
        left = x_left.load([sequence, 0, first]).reshape(LEFT, FEATURES).T
        right = x_right.load([sequence, LEFT, first]).reshape(RIGHT, FEATURES).T
        grad_left = d_mixed_left.load([sequence, 0, first]).reshape(LEFT, FEATURES).T
        grad_right = d_mixed_right.load([sequence, LEFT, first]).reshape(RIGHT, FEATURES).T
        gate = _products(gate_left, gate_right, left, right)
        up = _products(up_left, up_right, left, right)
        d_inner = _products(down_left, down_right, grad_left, grad_right)
        sigmoid = tl.sigmoid(gate)
        product = gate * up
        outer = sigmoid * d_inner
        if NORMED:
            features = first + tl.arange(0, FEATURES)
            share = tl.load(shares + sequence * D + features, features < D, 0)
            d_product = outer - share[None, :] * product
        else:
            d_product = outer
        d_gate = (up * d_product + product * (1 - sigmoid) * outer).to(left.dtype)
        d_up = (gate * d_product).to(left.dtype)
        inner = (product * sigmoid).to(left.dtype)
        d_gate_left = tl.dot(d_gate, left, d_gate_left, input_precision="ieee")
        d_gate_right = tl.dot(d_gate, right, d_gate_right, input_precision="ieee")
        d_up_left = tl.dot(d_up, left, d_up_left, input_precision="ieee")
        d_up_right = tl.dot(d_up, right, d_up_right, input_precision="ieee")
        d_down_left = tl.dot(inner, grad_left, d_down_left, input_precision="ieee")
        d_down_right = tl.dot(inner, grad_right, d_down_right, input_precision="ieee")
    TOKENS: tl.constexpr = LEFT + RIGHT
    rows = tl.program_id(1) * (3 * ALL_HIDDEN) + begin + tl.arange(0, HIDDEN)[:, None]
    at_left = rows * TOKENS + tl.arange(0, LEFT)[None, :]
    at_right = rows * TOKENS + LEFT + tl.arange(0, RIGHT)[None, :]
    MATRIX: tl.constexpr = ALL_HIDDEN * TOKENS
    tl.store(sums + at_left, d_gate_left)
    tl.store(sums + at_right, d_gate_right)
    tl.store(sums + at_left + MATRIX, d_up_left)
    tl.store(sums + at_right + MATRIX, d_up_right)
    tl.store(sums + at_left + 2 * MATRIX, d_down_left)
    tl.store(sums + at_right + 2 * MATRIX, d_down_right)


@triton.jit
def _unpack_sums_kernel(
    sums: tl.tensor,
    d_gate_up: tl.tensor,
    d_down: tl.tensor,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    ALL_HIDDEN: tl.constexpr,
    TOKENS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    matrix = tl.program_id(1)
    hidden = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    tokens = tl.arange(0, COLUMNS)[None, :]
    inside = (hidden < G) & (tokens < T)
    at = (matrix * ALL_HIDDEN + hidden) * TOKENS + tokens
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, PARTS, AT_ONCE):
        for part in tl.static_range(AT_ONCE):
            here = inside & (first + part < PARTS)
            total += tl.load(sums + (first + part) * (3 * ALL_HIDDEN * TOKENS) + at, here, 0)
    if matrix == 2:
        tl.store(d_down + tokens * G + hidden, total, inside)
    else:
        tl.store(d_gate_up + (matrix * G + hidden) * T + tokens, total, inside)


@triton.jit
def _scaled_rms_backward_kernel(
    dy: tl.tensor,
    x: tl.tensor,
    kept: tl.tensor,
    rstd: tl.tensor,
    factors: tl.tensor,
    d_total: tl.tensor,
    d_mixed: tl.tensor,
    shares: tl.tensor,
    M: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows.to(tl.int64)[:, None] * D + columns
    grad = tl.load(dy + at, inside, 0).to(tl.float32)
    value = tl.load(kept + at, inside, 0).to(tl.float32)
    scale = tl.load(rstd + rows, rows < M, 0)[:, None]
    y = value
    factor = tl.zeros((ROWS,), tl.float32)
    if NORMED:
        factor = tl.load(factors + rows, rows < M, 0)
        value *= factor[:, None]
        y = (tl.load(x + at, inside, 0).to(tl.float32) + value) * scale
    grad = scale * (grad - y * (tl.sum(grad * y, 1) / D)[:, None])
    tl.store(d_total + at, grad, inside)
    if NORMED:
        tl.store(shares + rows, tl.sum(grad * value, 1) * factor * factor / F, rows < M)
        tl.store(d_mixed + at, grad * factor[:, None], inside)


@triton.jit
def _gate_backward_kernel(
    d_mixed: tl.tensor_descriptor,
    down: tl.tensor_descriptor,
    gates: tl.tensor_descriptor,
    ups: tl.tensor_descriptor,
    shares: tl.tensor,
    d_gates: tl.tensor_descriptor,
    d_ups: tl.tensor_descriptor,
    M: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    TILES_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // TILES_N * BLOCK_M
    n = tl.program_id(0) % TILES_N * BLOCK_N
    rows = m + tl.arange(0, BLOCK_M)
    d_inner = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        d_inner = tl.dot(d_mixed.load([m, k]), down.load([k, n]), d_inner, input_precision="ieee")
    gate = gates.load([m, n]).to(tl.float32)
    up = ups.load([m, n]).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    product = gate * up
    outer = sigmoid * d_inner
    if NORMED:
        share = tl.load(shares + rows, rows < M, 0)
        d_product = outer - share[:, None] * product
    else:
        d_product = outer
    d_gates.store([m, n], (up * d_product + product * (1 - sigmoid) * outer).to(d_gates.dtype))
    d_ups.store([m, n], (gate * d_product).to(d_ups.dtype))


class _Packed(NamedTuple):
    """The matrices of the MLP over tokens, one row for each hidden unit, with zeros to whole tiles."""

    matrices: Tensor  # [3 ALL_HIDDEN, TOKENS]: gate, up, down transposed
    hidden: int  # ALL_HIDDEN
    left: int  # LEFT
    right: int  # RIGHT: LEFT + RIGHT = TOKENS

    def tiles(self, hidden: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        return (
            TensorDescriptor.from_tensor(self.matrices, [hidden, self.left]),
            TensorDescriptor.from_tensor(self.matrices, [hidden, self.right]),
        )


_HIDDEN_MULTIPLE = 64  # to which packed matrices are padded: whole tiles of every kernel


def _parts(tokens: int) -> tuple[int, int]:
    """Two powers of two, the sizes of tiles, that hold so many tokens together: 64 and 32 take 88 better than 128."""
    return next(
        (left, right)
        for left, right in ((16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64))
        if tokens <= left + right
    )


def _pack(gate_up: Tensor, down: Tensor) -> _Packed:
    T, G = down.shape
    left, right = _parts(T)
    tokens = left + right
    hidden = triton.cdiv(G, _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE
    packed = gate_up.new_empty(3 * hidden, tokens)
    _pack_kernel[(hidden // 16, 3)](gate_up, down, packed, T, G, hidden, tokens, 16, triton.next_power_of_2(tokens))
    return _Packed(packed, hidden, left, right)


class _MixTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: Tensor, injection: Tensor | None, gate_up: Tensor, down: Tensor, eps: float, normed: bool
    ) -> Tensor:
        gate_up, down = gate_up.contiguous(), down.contiguous()
        x = state if injection is None else torch.empty_like(state)
        rstd = state.new_empty(state[:, 0].shape, dtype=torch.float32)
        kept, factors = (torch.empty_like(state), torch.empty_like(rstd)) if normed else (None, None)
        saved = mixer.Saved(None if injection is None else x, kept, rstd, factors)
        y = mixer.mix_tokens_and_save(state, injection, gate_up, down, normed, eps, saved=saved)
        ctx.save_for_backward(x, kept if normed else y, rstd, factors, gate_up, down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, rstd, factors, gate_up, down = ctx.saved_tensors
        packed, G = _pack(gate_up, down), down.shape[1]
        dx, d_mixed, shares = tokens_backward(dy.contiguous(), x, kept, rstd, factors, packed, G)
        d_gate_up = d_down = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            d_gate_up, d_down = token_weights_backward(x, d_mixed, shares, packed, G)
        return (
            dx if ctx.needs_input_grad[0] else None,
            dx if ctx.needs_input_grad[1] else None,
            d_gate_up if ctx.needs_input_grad[2] else None,
            d_down if ctx.needs_input_grad[3] else None,
            None,
            None,
        )


def tokens_backward(
    dy: Tensor, x: Tensor, kept: Tensor, rstd: Tensor, factors: Tensor | None, packed: _Packed, G: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the half over tokens hands back to its input, and what the gradients of its weights need.

    Args:
        dy, x, kept: [B, T, D], contiguous: x the sum of state and injection, `kept` what the MLP adds to it where its
            gate is normed, else the half's result.
        rstd, factors: as in `mixer.Saved`.
        G: hidden units, without the zeros of `packed`.

    Returns:
        The gradients of x and, times `factors`, of what the MLP adds, both [B, T, D]; with `factors`, r² <d, m> / G as
        above, [B, D] float32: the shares of the gate's norm.
    """
    if (kernels := _hopper(x)) and kernels.fits(x, packed.matrices):
        return kernels.state_backward(dy, x, kept, rstd, factors, packed.matrices, packed[2:], G)  # type: ignore[no-any-return]
    B, T, D = x.shape
    dx, d_mixed = torch.empty_like(x), torch.empty_like(x)
    shares = None if factors is None else torch.empty_like(factors)
    tile = _STATE_TILE
    _tokens_backward_kernel[(triton.cdiv(D, tile.features), B)](
        dy,
        x,
        kept,
        *packed.tiles(tile.hidden),
        rstd,
        factors,
        dx,
        d_mixed,
        shares,
        T,
        D,
        G,
        packed.hidden,
        factors is not None,
        packed.left,
        packed.right,
        tile.features,
        tile.hidden,
        tile.stages,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    return dx, d_mixed, shares


def token_weights_backward(
    x: Tensor, d_mixed: Tensor, shares: Tensor | None, packed: _Packed, G: int
) -> tuple[Tensor, Tensor]:
    """Gradients of both matrices, [2 G, T] and [T, G], from x and from what `tokens_backward` found besides dx."""
    sums = _weight_sums(x, d_mixed, shares, packed)
    T, tokens = x.shape[1], packed.left + packed.right
    d_gate_up, d_down = x.new_empty(2 * G, T), x.new_empty(T, G)
    rows, at_once = 4, min(8, len(sums))
    _unpack_sums_kernel[(triton.cdiv(G, rows), 3)](
        sums,
        d_gate_up,
        d_down,
        len(sums),
        T,
        G,
        packed.hidden,
        tokens,
        at_once,
        rows,
        triton.next_power_of_2(tokens),
    )
    return d_gate_up, d_down


def _weight_sums(x: Tensor, d_mixed: Tensor, shares: Tensor | None, packed: _Packed) -> Tensor:
    """Gradients of the packed matrices, float32 [P, 3 ALL_HIDDEN, TOKENS]: P sums, each of some of the batch."""
    B, _, D = x.shape
    tile = _WEIGHTS_TILE
    kinds = packed.hidden // tile.hidden
    wanted = max(1, _WEIGHTS_PROGRAMS * multiprocessor_count(x.device) // kinds)
    parts = min(wanted, B * triton.cdiv(D, tile.features))
    tokens = packed.left + packed.right
    sums = x.new_empty(parts, 3 * packed.hidden, tokens, dtype=torch.float32)
    blocks = [1, packed.left, tile.features], [1, packed.right, tile.features]
    _token_weights_kernel[(kinds, parts)](
        *(TensorDescriptor.from_tensor(x, block) for block in blocks),
        *(TensorDescriptor.from_tensor(d_mixed, block) for block in blocks),
        shares,
        *packed.tiles(tile.hidden),
        sums,
        B,
        D,
        packed.hidden,
        shares is not None,
        packed.left,
        packed.right,
        tile.features,
        tile.hidden,
        tile.stages,
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    return sums


def _hopper(x: Tensor) -> ModuleType | None:
    """The kernels made for Hopper if they run on the device of `x`."""
    if hopper.why_not(x.device):
        return None
    from hrm.kernels.ops.hopper import mixer_backward as hopper_mixer_backward

    return hopper_mixer_backward


class _MixFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, eps: float, normed: bool) -> Tensor:
        gate_up, down = gate_up.contiguous(), down.contiguous()
        inner, squares, projected = mixer.gated(x, gate_up, normed, save=True)
        y, mixed, rstd, factors = mixer.residual_rms(x, inner, down, squares, eps, save=True)
        ctx.save_for_backward(x, projected, inner, mixed if normed else y, rstd, factors, gate_up, down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, inner, kept, rstd, factors, gate_up, down = ctx.saved_tensors
        d_total, d_mixed, shares = scaled_rms_backward(dy.contiguous(), x, kept, rstd, factors, down.shape[1])
        d_x = d_gate_up = d_down = None
        if ctx.needs_input_grad[2]:
            d_down = d_mixed.T @ inner
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            d_projected = gate_backward(d_mixed, down, projected, shares)
            if ctx.needs_input_grad[1]:
                d_gate_up = d_projected.T @ x
            if ctx.needs_input_grad[0]:
                d_x = d_total.addmm_(d_projected, gate_up)
        return d_x, d_gate_up, d_down, None, None


def scaled_rms_backward(
    dy: Tensor, x: Tensor, kept: Tensor, rstd: Tensor, factors: Tensor | None, F: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `tokens_backward`, of rows: the gradients, [M, D], stop before the second matmul.

    Args:
        dy, x, kept: [M, D], contiguous; `kept` is the second matmul's product where the gate is normed, else the half's
            result.
        rstd, factors: [M], float32: 1 / rms of the rows of the sum and, where the gate is normed, of its F units.

    Returns:
        The gradients of the sum before the norm and, times `factors`, of the product; the shares of the gate's norm,
        [M] float32.
    """
    M, D = x.shape
    d_total = torch.empty_like(x)
    d_mixed, shares = (d_total, None) if factors is None else (torch.empty_like(x), torch.empty_like(factors))
    grid, tile = row_wise(M, D)
    _scaled_rms_backward_kernel[grid](
        dy, x, kept, rstd, factors, d_total, d_mixed, shares, M, D, F, factors is not None, **tile
    )
    return d_total, d_mixed, shares


def gate_backward(d_mixed: Tensor, down: Tensor, projected: Tensor, shares: Tensor | None) -> Tensor:
    """The gradient of gate and up, `projected` [M, 2 F], from what `scaled_rms_backward` found besides d_total."""
    if (kernels := _hopper(d_mixed)) and kernels.fits_gate(d_mixed, down):
        return kernels.gate_backward(d_mixed, down, projected, shares)  # type: ignore[no-any-return]
    M, D = d_mixed.shape
    F = down.shape[1]
    d_projected = torch.empty_like(projected)
    tile, block_k = _GATE_TILE, 64
    block = [tile.features, tile.hidden]
    _gate_backward_kernel[(triton.cdiv(M, tile.features) * triton.cdiv(F, tile.hidden),)](
        TensorDescriptor.from_tensor(d_mixed, [tile.features, block_k]),
        TensorDescriptor.from_tensor(down, [block_k, tile.hidden]),
        TensorDescriptor.from_tensor(projected[:, :F], block),
        TensorDescriptor.from_tensor(projected[:, F:], block),
        shares,
        TensorDescriptor.from_tensor(d_projected[:, :F], block),
        TensorDescriptor.from_tensor(d_projected[:, F:], block),
        M,
        D,
        F,
        shares is not None,
        tile.features,
        tile.hidden,
        block_k,
        num_warps=tile.warps,
        maxnreg=tile.registers,
        num_stages=tile.stages,
    )
    return d_projected


def mix_tokens(
    state: Tensor, injection: Tensor | None, weights: MixerWeights | NormGatedMixerWeights, eps: float
) -> Tensor:
    """`mixer.mix_tokens`, differentiable once; state and injection need not be contiguous."""
    gate_up, down = weights.token_gate_up, weights.token_down
    inputs = [state, gate_up, down] if injection is None else [state, injection, gate_up, down]
    state = state.contiguous()
    injection = None if injection is None else injection.contiguous()
    if not differentiates(*inputs):
        return mixer.mix_tokens(state, injection, weights, eps)
    normed = isinstance(weights, NormGatedMixerWeights)
    return _MixTokens.apply(state, injection, gate_up, down, eps, normed)  # type: ignore[no-any-return, no-untyped-call]


def mix_features(x: Tensor, weights: MixerWeights | NormGatedMixerWeights, eps: float) -> Tensor:
    """`mixer.mix_features`, differentiable once."""
    if not differentiates(x, weights.gate_up, weights.down):
        return mixer.mix_features(x, weights, eps)
    normed = isinstance(weights, NormGatedMixerWeights)
    return _MixFeatures.apply(x.contiguous(), weights.gate_up, weights.down, eps, normed)  # type: ignore[no-any-return, no-untyped-call]
