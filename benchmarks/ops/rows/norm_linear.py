from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.row import HRM_STATES, Bar, Row, backward, compiled, forward, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    M, K = (24, 32) if toy else HRM_STATES
    qkv, gate_up = (48, 96) if toy else (1536, 3072)
    for outputs, kind, weighted in (
        (qkv, "rms", False),
        (qkv, "rms", True),
        (qkv, "layer", True),
        (gate_up, "rms", True),
    ):
        cost: dict[str, Any] = {"bytes": 2 * (M * K + K * outputs + M * outputs), "flops": 2 * M * K * outputs}
        shape = f"{M}x{K}x{outputs} {kind}{', weights' * weighted}"
        inputs, ours = partial(_inputs, M, K, outputs, weighted), partial(ops.norm_linear, kind=kind)
        rivals = {"compile": compiled(_naive(kind)), "eager": plain(_naive(kind))}
        yield forward(shape, inputs, ours, rivals, Bar(times_rival=1.1, rivals=("compile",)), **cost)
        if weighted and outputs == qkv:
            twice: dict[str, Any] = {"bytes": 2 * cost["bytes"], "flops": 2 * cost["flops"]}
            yield backward(shape, inputs, ours, rivals, Bar(times_rival=1.0, rivals=("compile",)), **twice)


def _inputs(M: int, K: int, outputs: int, weighted: bool, device: torch.device) -> list[Tensor]:
    tensors = [random(device, M, K), random(device, outputs, K, scale=K**-0.5)]
    return [*tensors, random(device, K)] if weighted else tensors


def _naive(kind: str) -> Callable[..., Tensor]:
    return partial(ops.norm_linear.naive, kind=kind)
