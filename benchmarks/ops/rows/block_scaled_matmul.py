from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.ops.row import HRM_STATES, Bar, Call, Row, Work, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """Blocks of 128 beside a product in bfloat16: with quantising both operands, and with both given; then MX's 32."""
    sizes = [(40, 256, 48)] if toy else [(8192, 8192, 8192), (HRM_STATES[0], 512, 3072), (HRM_STATES[0], 1536, 512)]
    for M, K, N in sizes:
        cost: dict[str, Any] = {"bytes": M * K + K * N + 2 * M * N, "flops": 2 * M * N * K}
        for block, format, given in ((128, "mxfp8", True), (128, "mxfp8", False), (32, "mxfp8", True)):
            what = f"{M}x{K}x{N} {format}/{block} {'quantised before' if given else 'quantising'}"
            bar = Bar(times_rival=1.0) if block == 128 else Bar()
            yield Row(what, "forward", partial(_work, M, K, N, block, format, given), bar, **cost)


def _work(M: int, K: int, N: int, block: int, format: str, given: bool, device: torch.device) -> Work:
    a, b = random(device, M, K).detach(), random(device, N, K, scale=K**-0.5).detach().T
    quantize: Callable[..., ops.BlockScaled] = partial(ops.quantize_blocks, block=block, format=format)
    left, right = (quantize(a), quantize(b.T)) if given else (a, b)
    rival: Call = lambda: a @ b  # noqa: E731
    return Work(lambda: ops.block_scaled_matmul(left, right, block, format), {"cublas bf16": lambda: rival})
