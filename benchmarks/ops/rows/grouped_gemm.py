from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.row import Bar, Call, Row, Work, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """Experts of a mixture: tokens are unevenly shared, 4096 of them on average, or 492."""
    K, N = (32, 48) if toy else (512, 1536)
    for count, tokens in [(3, 60)] if toy else [(8, 32768), (64, 31488)]:
        shares = [1 + i % 7 for i in range(count)]
        heights = [tokens * share // sum(shares) for share in shares]
        total = sum(heights)
        cost: dict[str, Any] = {"bytes": 2 * (total * K + count * K * N + total * N), "flops": 2 * total * K * N}
        shape = f"{count} experts, {total}x{K}x{N}"
        yield Row(shape, "forward", partial(_forward, heights, K, N), Bar(times_rival=1.0), **cost)
        twice: dict[str, Any] = {"bytes": 2 * cost["bytes"], "flops": 2 * cost["flops"]}
        yield Row(shape, "backward", partial(_backward, heights, K, N), Bar(times_rival=1.0), **twice)


def _operands(heights: Sequence[int], K: int, N: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    xs = [random(device, height, K) for height in heights]
    return xs, [random(device, K, N, scale=K**-0.5) for _ in heights]


def _forward(heights: Sequence[int], K: int, N: int, device: torch.device) -> Work:
    xs, ws = ([x.detach() for x in part] for part in _operands(heights, K, N, device))

    def library() -> Call:
        x = torch.cat(xs)
        w = torch.stack([w.T.contiguous() for w in ws]).mT  # the layout that it takes everywhere
        ends = torch.tensor(heights, device=device).cumsum(0).int()
        return lambda: torch._grouped_mm(x, w, offs=ends)

    loop: Call = lambda: ops.grouped_gemm.naive(xs, ws)  # noqa: E731
    return Work(lambda: ops.grouped_gemm(xs, ws), {"loop of cublas": lambda: loop, "torch._grouped_mm": library})


def _backward(heights: Sequence[int], K: int, N: int, device: torch.device) -> Work:
    xs, ws = _operands(heights, K, N, device)
    grads = [random(device, height, N).detach() for height in heights]

    def call_of(outs: Sequence[Tensor]) -> Call:
        return lambda: torch.autograd.grad(outs, [*xs, *ws], grads, retain_graph=True)

    ours = call_of(ops.grouped_gemm(xs, ws))
    return Work(ours, {"loop of cublas": lambda: call_of(ops.grouped_gemm.naive(xs, ws))})
