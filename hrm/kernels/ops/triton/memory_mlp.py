"""Launches of `hrm.kernels.ops.memory_mlp_forward_loss`, two, and `memory_mlp_backward_update_`, one.

`memory_mlp_kernels` has the kernels and says what each does; here sizes are shared out over tiles and programs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrm.kernels.ops.memory_mlp import MemoryWeights, row_tile
from hrm.kernels.ops.triton.common import launch, multiprocessor_count, ordered, shared_memory
from hrm.kernels.ops.triton.memory_mlp_kernels import error_kernel, hidden_kernel, update_kernel

_APPLY_TILE = 4096  # weights that a program updates at a time
_BIAS_CHUNK = 256  # numbers of a bias's gradient that a program adds up at a time


class _Tiles(NamedTuple):
    """Tiles of the matmuls, for matrices of 16 bits; those of 32 bits take half as many columns at a time."""

    columns: int = 64  # of a tile of z1, y and the gradient of z1, beside `row_tile` rows
    inner: int = 64  # columns of both operands that are multiplied at a time
    weight: int = 64  # rows and columns of a tile of a weight's gradient
    tokens: int = 64  # of both operands of such a tile that are multiplied at a time
    warps: int = 4  # of a program forward
    update_warps: int = 4
    stages: int = 4
    programs: int = 1  # of the update, for each multiprocessor


TILES = _Tiles()


class _Plan(NamedTuple):
    """How sizes are shared out, found once for each."""

    hidden: int  # programs of `hidden_kernel`
    error: int
    update: int
    row_tiles: int
    loss_parts: int
    scratch: int  # numbers that phases leave to one another
    hidden_constants: tuple[Any, ...]
    error_constants: tuple[Any, ...]
    update_constants: dict[int, tuple[Any, ...]]  # of a phase
    forward_options: dict[str, Any]
    update_options: dict[str, Any]
    known: dict[Any, Any]  # compiled kernels


@functools.lru_cache(maxsize=256)
def _plan(
    tiles: _Tiles, height: int, M: int, N: int, D: int, H: int, dtype: torch.dtype, exact: bool, device: torch.device
) -> _Plan:
    """`exact`: products of float32 are not in TF32."""

    def count(size: int, tile: int) -> int:
        return -(-size // tile)

    on_gpu, size = device.type == "cuda", dtype.itemsize
    copies = dtype != torch.float32
    row_tiles, inner = count(N, height), tiles.inner * 2 // size
    matrices = 2 * count(H, tiles.weight) * count(D, tiles.weight)
    items = matrices + count(H, _BIAS_CHUNK) + count(D, _BIAS_CHUNK)
    constants = {
        "D": D,
        "H": H,
        "COPY": copies,
        "COPY_TILE": 2048,
        "PRECISION": "tf32x3" if exact and on_gpu else "tf32",
        "HEIGHT": height,
        "WIDTH": tiles.columns,
        "INNER": inner,
        "WHOLE": N % 128 == 0,  # a multiple of all that is read of them at a time
        "ITEMS": items,
        "SIDE": tiles.weight,
        "TOKENS": tiles.tokens * 2 // size,
        "BIAS": _BIAS_CHUNK,
        "TILE": _APPLY_TILE,
        "PARTS": 256,
    }
    tiles_h, tiles_d = (M * row_tiles * count(columns, tiles.columns) for columns in (H, D))
    stage_bytes = inner * (height * size + tiles.columns * 4)  # w1 is of 32 bits, and in 16 takes room beside
    stages = max(1, min(tiles.stages, (shared_memory(device) - 8192) // stage_bytes))
    return _Plan(
        hidden=max(tiles_h, M + 1),
        error=tiles_d,
        # In the interpreter programs take several tiles.
        update=tiles.programs * multiprocessor_count(device) if on_gpu else max(1, tiles_h // 2),
        row_tiles=row_tiles,
        loss_parts=tiles_d,
        scratch=M * (2 * D * H + D + H + row_tiles * H + items),
        hidden_constants=ordered(hidden_kernel, 10, constants),
        error_constants=ordered(error_kernel, 11, constants),
        update_constants={phase: ordered(update_kernel, 25, constants | {"PHASE": phase}) for phase in range(4)},
        forward_options={"num_warps": tiles.warps, "num_stages": stages},
        update_options={"num_warps": tiles.update_warps, "num_stages": stages},
        known={},
    )


def _plan_of(k: Tensor, hidden: int) -> _Plan:
    *memories, N, D = k.shape
    exact = k.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return _plan(TILES, row_tile(N), math.prod(memories), N, D, hidden, k.dtype, exact, k.device)


def _run_at_once(k: Tensor) -> bool:
    """Whether programs of a launch can wait for one another: not in the interpreter."""
    return k.is_cuda


def forward_loss(
    k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, z1, h, y, error, the copy of w2, the tiles' sums of the error, and counters, all 0."""
    *memories, N, D = k.shape
    H, M = w1.shape[-2], math.prod(memories)
    plan = _plan_of(k, H)
    w1, b1, w2, b2 = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    y, error = torch.empty_like(k), torch.empty_like(k)
    z1 = torch.empty_like(k) if H == D else k.new_empty(*memories, N, H)
    h = torch.empty_like(z1)
    copies = w2.dtype != k.dtype
    w2_copy = torch.empty_like(w2, dtype=k.dtype) if copies else k.new_empty(0)
    error_sums = w1.new_empty(M, plan.row_tiles, D)
    loss = w1.new_empty(memories)
    loss_parts = w1.new_empty(plan.loss_parts)
    counters = torch.empty(1 + M, dtype=torch.int32, device=k.device)
    launch(
        hidden_kernel, plan.known, "hidden", plan.hidden, (k, w1, b1, w2, z1, h, w2_copy, counters),
        (M, N, *plan.hidden_constants), **plan.forward_options,
    )  # fmt: skip
    launch(
        error_kernel, plan.known, "error", plan.error,
        (h, v, w2_copy if copies else w2, b2, y, error, error_sums, loss_parts, loss, counters),
        (N, *plan.error_constants), **plan.forward_options,
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
    N, H, M = k.shape[-2], z1.shape[-1], loss.numel()
    plan = _plan_of(k, H)
    dz1, norms = torch.empty_like(z1), torch.empty_like(loss)
    scratch = loss.new_empty(plan.scratch)
    at_once = _run_at_once(k)
    if not at_once:  # the interpreter leaves numbers as Python has them
        gates = [gate if isinstance(gate, Tensor) else torch.full_like(loss, gate) for gate in gates]
    tensors = (
        *(z1, h, k, error, w2_copy if w2_copy.numel() else w.w2, error_sums, dz1, scratch, loss, norms, counters),
        *w,
        *momentum,
    )
    kinds = tuple(map(type, gates))
    for phase in (0,) if at_once else (1, 2, 3):
        launch(
            update_kernel, plan.known, (phase, kinds), plan.update, tensors,
            (*gates, max_grad_norm, M, N, *plan.update_constants[phase]),
            launch_cooperative_grid=at_once, **plan.update_options,
        )  # fmt: skip
    return norms
