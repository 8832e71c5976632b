"""Blocks that mix tokens by a gated MLP over them, forward, in Triton; `mixer_backward` has their gradients.

The half of a block that mixes tokens needs no other features than its own: one program reads some features of a
sequence, all its tokens, and computes both projections, the gate, the residual and the norm without leaving the chip.
On Hopper GPUs that is `hrm.kernels.ops.hopper.mixer`.

Of the other half, the gate is in the epilogue of the first matmul. As sigmoid(g) * g = silu(g), a normed gate
(`naive.norm_gated`) is silu(g) * u divided by the root mean square of g * u, one number for a token, which commutes
with the second matmul: the epilogue sums the squares, and the kernel that adds the residual divides.

Shapes: B sequences, T tokens, D features, M = B T rows, G and F inner widths of the MLPs over tokens and features.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hrm.kernels.blocks import MixerWeights, NormGatedMixerWeights
from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.common import multiprocessor_count, row_wise, shared_memory, stages, tile_rows

# As in `ops.triton.linear`, which says why.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 64, 64
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Among the fastest on an H200 (384 sequences of 88 tokens, width 512): fixed ones, so that sums have one order.
_FEATURES, _HIDDEN = 64, 64
MOST_TOKENS = 128  # of a sequence, which one program holds whole


@triton.jit
def _mix_tokens_kernel(
    state: tl.tensor,
    injection: tl.tensor,
    gate_up: tl.tensor,
    down: tl.tensor,
    out: tl.tensor,
    rounded: tl.tensor,
    total: tl.tensor,
    kept: tl.tensor,
    rstd: tl.tensor,
    factors: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    NORMED: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> None:
    tokens = tl.arange(0, TOKENS)
    features = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    inside = (tokens < T)[:, None] & (features < D)[None, :]
    at = tl.program_id(1).to(tl.int64) * (T * D) + tokens[:, None] * D + features[None, :]
    x = tl.load(state + at, inside, 0)
    if injection is not None:
        x = (x.to(tl.float32) + tl.load(injection + at, inside, 0).to(tl.float32)).to(x.dtype)
    if total is not None:
        tl.store(total + at, x, inside)
    # With features as rows, what the first matmul leaves in registers is the left operand of the second.
    x = x.T
    mixed = tl.zeros((FEATURES, TOKENS), tl.float32)
    squares = tl.zeros((FEATURES,), tl.float32)
    for begin in range(0, G, HIDDEN):
        hidden = begin + tl.arange(0, HIDDEN)
        weight_at = hidden[:, None] * T + tokens[None, :]
        known = (hidden < G)[:, None] & (tokens < T)[None, :]
        gate = tl.dot(x, tl.load(gate_up + weight_at, known, 0).T, input_precision="ieee")
        up = tl.dot(x, tl.load(gate_up + G * T + weight_at, known, 0).T, input_precision="ieee")
        product = gate * up
        squares += tl.sum(product * product, 1)
        inner = (product * tl.sigmoid(gate)).to(x.dtype)
        down_at = tokens[:, None] * G + hidden[None, :]
        known_down = (tokens < T)[:, None] & (hidden < G)[None, :]
        mixed = tl.dot(inner, tl.load(down + down_at, known_down, 0).T, mixed, input_precision="ieee")
    of_features = tl.program_id(1) * D + features
    if NORMED:
        factor = tl.rsqrt(squares / G + eps)
        mixed = mixed * factor[:, None]
        if kept is not None:
            tl.store(kept + at, mixed.to(x.dtype).T, inside)
            tl.store(factors + of_features, factor, features < D)
    mixed += x.to(tl.float32)  # columns from T on are zeros
    scale = tl.rsqrt(tl.sum(mixed * mixed, 1) / T + eps)
    if rstd is not None:
        tl.store(rstd + of_features, scale, features < D)
    y = (mixed * scale[:, None]).T
    tl.store(out + at, y, inside)
    if rounded is not None:
        tl.store(rounded + at, y.to(rounded.dtype.element_ty), inside)


@triton.jit
def _gated_kernel(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    out: tl.tensor_descriptor,
    gates: tl.tensor_descriptor,
    ups: tl.tensor_descriptor,
    squares: tl.tensor,
    M: tl.tensor,
    K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # As `ops.triton.linear._linear_swiglu_kernel`, which says why.
    for i in tl.range(0, TILES_PER_PROGRAM, flatten=True):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        m = tile // TILES_N * BLOCK_M
        n = tile % TILES_N * BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            both = weight.load([0, n, k]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x.load([m, k]), both.T, acc)
        gate, up = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        product = gate * up
        if NORMED:
            rows = m + tl.arange(0, BLOCK_M)
            tl.store(squares + (tile % TILES_N) * M + rows, tl.sum(product * product, 1), rows < M)
        if gates is not None:
            gates.store([m, n], gate.to(gates.dtype))
            ups.store([m, n], up.to(ups.dtype))
        out.store([m, n], (product * tl.sigmoid(gate)).to(out.dtype))


@triton.jit
def _add_scaled_rms_kernel(
    x: tl.tensor,
    mixed: tl.tensor,
    squares: tl.tensor,
    out: tl.tensor,
    rstd: tl.tensor,
    factors: tl.tensor,
    M: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M)[:, None] & (columns < D)
    at = rows.to(tl.int64)[:, None] * D + columns
    wide = tl.load(mixed + at, inside, 0).to(tl.float32)
    if NORMED:
        total = tl.zeros((ROWS,), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(squares + part * M + rows, rows < M, 0)
        factor = tl.rsqrt(total / F + eps)
        wide = wide * factor[:, None]
        if factors is not None:
            tl.store(factors + rows, factor, rows < M)
    wide += tl.load(x + at, inside, 0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)
    if rstd is not None:
        tl.store(rstd + rows, scale, rows < M)
    tl.store(out + at, wide * scale[:, None], inside)


def mix_tokens(
    state: Tensor,
    injection: Tensor | None,
    weights: MixerWeights | NormGatedMixerWeights,
    eps: float,
    rounded: Tensor | None = None,
) -> Tensor:
    """`naive.mix_tokens` of the sum of `state` and `injection`, each [B, T, D] and contiguous, T up to MOST_TOKENS.

    With `rounded`, [B, T, D] in another format, the same is written there too.
    """
    gate_up, down = weights.token_gate_up.contiguous(), weights.token_down.contiguous()
    normed = isinstance(weights, NormGatedMixerWeights)
    return mix_tokens_and_save(state, injection, gate_up, down, normed, eps, rounded)


class Saved(NamedTuple):
    """Room for what a backward of `mix_tokens` needs, or None for what it does not."""

    total: Tensor | None = None  # [B, T, D]: the sum of state and injection
    kept: Tensor | None = None  # [B, T, D]: of a normed gate, what the MLP adds to it
    rstd: Tensor | None = None  # [B, D], float32: 1 / rms of the sum of both, over tokens
    factors: Tensor | None = None  # [B, D], float32: of a normed gate, 1 / rms of its product over hidden units


_NOTHING = Saved()


def mix_tokens_and_save(
    state: Tensor,
    injection: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    normed: bool,
    eps: float,
    rounded: Tensor | None = None,
    saved: Saved = _NOTHING,
) -> Tensor:
    """`mix_tokens` by contiguous matrices [2 G, T] and [T, G], which writes what there is room for in `saved`."""
    B, T, D = state.shape
    if hopper.why_not(state.device) is None:
        from hrm.kernels.ops.hopper import mixer as hopper_mixer

        if hopper_mixer.fits(state, injection, gate_up, down):
            return hopper_mixer.mix_tokens(state, injection, gate_up, down, normed, eps, rounded, *saved)
    out = torch.empty_like(state)
    _mix_tokens_kernel[(triton.cdiv(D, _FEATURES), B)](
        state,
        injection,
        gate_up,
        down,
        out,
        rounded,
        *saved,
        eps,
        T,
        D,
        down.shape[1],
        normed,
        tile_rows(T, MOST_TOKENS),
        _FEATURES,
        _HIDDEN,
        num_warps=4,
        num_stages=2 if shared_memory(state.device) >= 116 * 1024 else 1,
    )
    return out


def mix_features(x: Tensor, weights: MixerWeights | NormGatedMixerWeights, eps: float) -> Tensor:
    """The second half of a block, the MLP over features, of rows `x` [M, D], contiguous."""
    normed = isinstance(weights, NormGatedMixerWeights)
    inner, squares, _ = gated(x, weights.gate_up.contiguous(), normed, save=False)
    return residual_rms(x, inner, weights.down.contiguous(), squares, eps, save=False)[0]


def _hopper(x: Tensor) -> ModuleType | None:
    """The kernels made for Hopper if they run on the device of `x`."""
    if hopper.why_not(x.device):
        return None
    from hrm.kernels.ops.hopper import mixer_features

    return mixer_features


def gated(x: Tensor, gate_up: Tensor, normed: bool, save: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gated MLP between its matmuls, before its norm.

    Args:
        x: [M, D], contiguous.
        gate_up: [2 F, D], contiguous.
        normed: whether the norm of gate times up is wanted.
        save: whether the projections are.

    Returns:
        silu(gate) * up [M, F]; with `normed`, sums [parts, M] of the squares of gate * up, float32; with `save`,
        gate and up [M, 2 F].
    """
    kernels = _hopper(x)
    if kernels is not None and kernels.pays_for_gated(x, gate_up):
        found: tuple[Tensor, Tensor | None, Tensor | None] = kernels.gated(x, gate_up, normed, save)
        return found
    M, D = x.shape
    F = gate_up.shape[0] // 2
    parts = triton.cdiv(F, _BLOCK_N)
    inner = x.new_empty(M, F)
    squares = x.new_empty(parts, M, dtype=torch.float32) if normed else None
    projected = x.new_empty(M, 2 * F) if save else None
    gates = ups = None
    if projected is not None:
        gates = TensorDescriptor.from_tensor(projected[:, :F], [_BLOCK_M, _BLOCK_N])
        ups = TensorDescriptor.from_tensor(projected[:, F:], [_BLOCK_M, _BLOCK_N])
    tiles = triton.cdiv(M, _BLOCK_M) * parts
    programs = min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessor_count(x.device))
    _gated_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(gate_up.view(2, F, D), [2, _BLOCK_N, _BLOCK_K]),
        TensorDescriptor.from_tensor(inner, [_BLOCK_M, _BLOCK_N]),
        gates,
        ups,
        squares,
        M,
        D,
        parts,
        triton.cdiv(tiles, programs),
        normed,
        _BLOCK_M,
        _BLOCK_N,
        _BLOCK_K,
        num_warps=4,
        num_stages=stages(x.device),
    )
    return inner, squares, projected


def residual_rms(
    x: Tensor, inner: Tensor, down: Tensor, squares: Tensor | None, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """rms_norm(x + inner @ down.T), of which the product's rows have their own norm first where `squares` are given.

    Args:
        x: [M, D], contiguous.
        inner, squares: as `gated` gives them, [M, F].
        down: [D, F], contiguous.
        save: whether what a backward needs is wanted too.

    Returns:
        [M, D]; with `save` and `squares` the product [M, D]; with `save`, float32 [M], 1 / rms of the rows of the sum
        and of the F units, if those have a norm.
    """
    kernels = _hopper(x)
    if kernels is not None and kernels.pays_for_residual_rms(inner, down):
        found: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
        found = kernels.residual_rms(x, inner, down, squares, eps, save)
        return found
    product = inner @ down.T
    y, rstd, factors = add_scaled_rms(x, product, squares, down.shape[1], eps, save)
    return y, product, rstd, factors


def add_scaled_rms(
    x: Tensor, mixed: Tensor, squares: Tensor | None, F: int, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """rms_norm(x + mixed), of which the rows of `mixed` have their own norm first where `squares` are given.

    Args:
        x, mixed: [M, D], contiguous.
        squares: sums of squares as `gated` gives them, of F units in all.
        save: whether the norms' factors are wanted.

    Returns:
        [M, D], and with `save`, float32 [M], 1 / rms of the rows of the sum and of the F units, if those have a norm.
    """
    M, D = x.shape
    out = torch.empty_like(x)
    rstd = x.new_empty(M, dtype=torch.float32) if save else None
    factors = x.new_empty(M, dtype=torch.float32) if save and squares is not None else None
    parts = 0 if squares is None else len(squares)
    grid, tile = row_wise(M, D)
    _add_scaled_rms_kernel[grid](
        x, mixed, squares, out, rstd, factors, M, eps, D, F, parts, squares is not None, **tile
    )
    return out, rstd, factors
