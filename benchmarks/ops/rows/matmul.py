from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.row import HRM_STATES, Bar, Row, backward, compiled, forward, plain, random
from hrm.kernels import ops

Size = tuple[int, int, int]  # M, K, N
TOKENS = HRM_STATES[0]
SIZES: dict[str, Size] = {
    "qkv": (TOKENS, 512, 1536),
    "o": (TOKENS, 512, 512),
    "gate_up": (TOKENS, 512, 3072),
    "down": (TOKENS, 1536, 512),
}


def rows(toy: bool) -> Iterator[Row]:
    """x @ weight.T, as a model projects, and x @ b of rows that lie dense; then with bias and activation."""
    sizes: dict[str, Size] = {"toy": (40, 32, 48)} if toy else SIZES
    for name, size in sizes.items():
        M, K, N = size
        cost: dict[str, Any] = {"bytes": 2 * (M * K + K * N + M * N), "flops": 2 * M * N * K}
        label = f"{name} {M}x{K}x{N}"
        inputs = partial(_inputs, size)
        yield forward(label, inputs, _ours(None), {"cublas": plain(_naive(None))}, Bar(times_rival=0.9), **cost)
        by_rows = partial(_inputs, size, by_rows=True)
        rivals = {"cublas": plain(ops.matmul.naive)}
        yield forward(f"{label} b by rows", by_rows, ops.matmul, rivals, Bar(times_rival=0.9), **cost)
        with_bias = partial(_inputs, size, bias=True)
        # silu and relu at one size: they cost what gelu does, or less.
        for activation in ("gelu", "silu", "relu") if name in ("toy", "qkv") else ("gelu",):
            rivals = {"cublas": plain(_naive(activation)), "compile": compiled(_naive(activation))}
            if activation == "relu":
                rivals["cublasLt epilogue"] = plain(_library_relu)
            yield forward(f"{label} {activation}", with_bias, _ours(activation), rivals, Bar(times_rival=1.0), **cost)
        if name in ("toy", "qkv"):
            twice: dict[str, Any] = {"bytes": 2 * cost["bytes"], "flops": 2 * cost["flops"]}
            bar = Bar(times_rival=1.0, rivals=("compile",))
            rivals = {"compile": compiled(_naive("gelu"))}
            yield backward(f"{label} gelu", with_bias, _ours("gelu"), rivals, bar, **twice)


def _inputs(size: Size, device: torch.device, by_rows: bool = False, bias: bool = False) -> list[Tensor]:
    M, K, N = size
    weight = random(device, *((K, N) if by_rows else (N, K)), scale=K**-0.5)
    return [random(device, M, K), weight] + ([random(device, N)] if bias else [])


def _ours(activation: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: ops.matmul(x, weight.T, bias, activation)


def _naive(activation: str | None) -> Callable[..., Tensor]:
    return lambda x, weight, bias=None: ops.matmul.naive(x, weight.T, bias, activation)


def _library_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.T)
