"""Projections, alone or with SwiGLU fused in, forward and backward, in Triton.

Forward, `linear` and `linear_swiglu` take the fastest of these ways, as measured on an H200:

- the kernel of `hrm.kernels.ops.hopper.linear`, in 16 bit, where there are rows enough to fill the GPU;
- SwiGLU in the epilogue of a Triton matmul, in 16 bit, for other widths and GPUs;
- matmul by the library, then one pointwise kernel: in float32, and for few rows.

Backward, the pointwise part is one kernel and the matmuls are the library's. Nothing waits for the device.

Shapes: M rows, K inputs, F inner width of the gated MLP.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.ops.triton.common import differentiates, multiprocessor_count, stages

# 128 rows by 64 gates and their 64 ups, so that two programs share a multiprocessor: one multiplies while the other one
# finishes its tile. 64 inputs of 16 bits are the 128 bytes over which Hopper's copy engine swizzles.
_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 64, 64
_PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit
def _linear_swiglu_kernel(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    out: tl.tensor_descriptor,
    gates: tl.tensor_descriptor,
    ups: tl.tensor_descriptor,
    K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    # Flattened with the loop over K, so that a tile's epilogue overlaps with loads for the next one. Tiles past the
    # last one are read as zeros and not written.
    for i in tl.range(0, TILES_PER_PROGRAM, flatten=True):
        tile = tl.program_id(0) + i * tl.num_programs(0)
        m = tile // TILES_N * BLOCK_M
        n = tile % TILES_N * BLOCK_N
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            # Gates and their ups as one operand: half as many matrix instructions, each twice as wide.
            both = weight.load([0, n, k]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x.load([m, k]), both.T, acc)
        gate, up = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        if SAVE:
            gates.store([m, n], gate.to(gates.dtype))
            ups.store([m, n], up.to(ups.dtype))
        out.store([m, n], (gate * tl.sigmoid(gate) * up).to(out.dtype))


@triton.jit
def _swiglu_kernel(
    gate_up: tl.tensor, out: tl.tensor, M: tl.tensor, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M) & (columns < F)
    at = rows.to(tl.int64) * F + columns
    gate_at = gate_up + rows.to(tl.int64) * (2 * F) + columns
    gate = tl.load(gate_at, inside).to(tl.float32)
    up = tl.load(gate_at + F, inside).to(tl.float32)
    tl.store(out + at, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward_kernel(
    d_out: tl.tensor,
    gate_up: tl.tensor,
    d_gate_up: tl.tensor,
    M: tl.tensor,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < M) & (columns < F)
    gate_at = rows.to(tl.int64) * (2 * F) + columns
    gate = tl.load(gate_up + gate_at, inside).to(tl.float32)
    up = tl.load(gate_up + gate_at + F, inside).to(tl.float32)
    grad = tl.load(d_out + rows.to(tl.int64) * F + columns, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(d_gate_up + gate_at, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), inside)
    tl.store(d_gate_up + gate_at + F, grad * gate * sigmoid, inside)


def _linear_swiglu_forward(x: Tensor, gate_up: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """The result [M, F] and, with `save`, x @ gate_up.T [M, 2 F]."""
    M, K = x.shape
    F = gate_up.shape[0] // 2
    tiles = triton.cdiv(M, _BLOCK_M) * triton.cdiv(F, 2 * _BLOCK_N)
    # Descriptors want rows of whole 16 bytes, and in the interpreter of Triton 3.5 of whole 16 numbers.
    whole_vectors = K % 16 == 0 and F % 16 == 0
    if x.dtype.itemsize == 2 and whole_vectors and tiles >= multiprocessor_count(x.device):
        kernels = _hopper(x)
        if kernels is not None and kernels.fits_swiglu(K):
            out, projected = kernels.linear_swiglu(x, gate_up, save)
            return out, projected
        return _fused_linear_swiglu(x, gate_up, save)
    projected = x @ gate_up.T
    out = x.new_empty(M, F)
    grid, tile = _pointwise(M, F)
    _swiglu_kernel[grid](projected, out, M, F, **tile)
    return out, projected


def _fused_linear_swiglu(x: Tensor, gate_up: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    M, K = x.shape
    F = gate_up.shape[0] // 2
    out = x.new_empty(M, F)
    projected = x.new_empty(M, 2 * F) if save else None
    gates = ups = out_tiles = TensorDescriptor.from_tensor(out, [_BLOCK_M, _BLOCK_N])
    if projected is not None:
        gates = TensorDescriptor.from_tensor(projected[:, :F], [_BLOCK_M, _BLOCK_N])
        ups = TensorDescriptor.from_tensor(projected[:, F:], [_BLOCK_M, _BLOCK_N])
    tiles_n = triton.cdiv(F, _BLOCK_N)
    tiles = triton.cdiv(M, _BLOCK_M) * tiles_n
    programs = min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * multiprocessor_count(x.device))
    _linear_swiglu_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(gate_up.view(2, F, K), [2, _BLOCK_N, _BLOCK_K]),
        out_tiles,
        gates,
        ups,
        K,
        tiles_n,
        triton.cdiv(tiles, programs),
        save,
        _BLOCK_M,
        _BLOCK_N,
        _BLOCK_K,
        num_warps=4,
        num_stages=stages(x.device),
    )
    return out, projected


def _swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of silu(gate) * up with respect to `gate_up` [M, 2 F], from that of the product [M, F]."""
    M, F = d_out.shape
    d_gate_up = torch.empty_like(gate_up)
    grid, tile = _pointwise(M, F)
    _swiglu_backward_kernel[grid](d_out, gate_up, d_gate_up, M, F, **tile)
    return d_gate_up


def _pointwise(rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    # 2048 numbers a program: two vectors of 16 bytes in flight for each of 128 threads and each operand.
    width = min(512, triton.next_power_of_2(columns))
    height = 2048 // width
    return (triton.cdiv(columns, width), triton.cdiv(rows, height)), {"ROWS": height, "COLUMNS": width}


def _hopper(x: Tensor) -> ModuleType | None:
    """The kernels made for Hopper if they run on the device of `x`."""
    if hopper.why_not(x.device):
        return None
    from hrm.kernels.ops.hopper import linear as hopper_linear

    return hopper_linear


def deferred_norm_linear(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x) @ weight.T and the norm's factors [M], without gradient, where `defers_norm` says so."""
    return _hopper(x).norm_linear(x, weight, eps)  # type: ignore[union-attr, no-any-return]


class _LinearAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return linear(x, weight), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return _linear_backward(ctx, x, weight, d_out, d_input)


class _LinearSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        out, projected = _linear_swiglu_forward(x, gate_up, save=True)
        ctx.save_for_backward(x, gate_up, projected)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_input: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, projected = ctx.saved_tensors
        return _linear_backward(ctx, x, weight, _swiglu_backward(d_out.contiguous(), projected), d_input)


def _linear_backward(
    ctx: Any, x: Tensor, weight: Tensor, d_projected: Tensor, d_input: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight. That of x is added up in the memory of `d_input`, by the matmul itself."""
    d_x = d_input.addmm_(d_projected, weight) if ctx.needs_input_grad[0] else None
    d_weight = d_projected.T @ x if ctx.needs_input_grad[1] else None
    return d_x, d_weight


def linear_swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), the activation in float32.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        gate_up: [2 F, K] of the same dtype: the rows of gate, then those of up.

    Returns:
        [M, F]. For a backward, x and the two projections [M, 2 F] are kept.
    """
    return linear_swiglu_and_input(x, gate_up)[0]


def linear_swiglu_and_input(x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_swiglu` and x, to go on as a residual: see `linear_and_input`."""
    x, gate_up = x.contiguous(), gate_up.contiguous()
    if differentiates(x, gate_up):
        return _LinearSwiGLU.apply(x, gate_up)  # type: ignore[no-any-return, no-untyped-call]
    return _linear_swiglu_forward(x, gate_up, save=False)[0], x


def linear_and_input(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x @ weight.T, and x [M, K] again, to go on as a residual.

    The backward pass then adds up the gradients of both in its matmul, in the memory of the residual's: so the residual
    must go to `linear_residual_rms` and nowhere else.
    """
    x, weight = x.contiguous(), weight.contiguous()
    if differentiates(x, weight):
        return _LinearAndInput.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]
    return linear(x, weight), x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of contiguous operands, without gradient."""
    kernels = _hopper(x)
    if kernels is not None and kernels.pays_for_linear(x, weight):
        return kernels.linear(x, weight)  # type: ignore[no-any-return]
    return x @ weight.T


def runs_on_hopper(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these operands takes the kernel for Hopper."""
    kernels = _hopper(x)
    return kernels is not None and kernels.pays_for_linear(x, weight)
