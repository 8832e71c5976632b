from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.row import HRM_STATES, Bar, Row, backward, compiled, forward, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    for name, outputs in {"toy": 48}.items() if toy else {"qkv": 1536, "gate_up": 3072}.items():
        M, K = (24, 32) if toy else HRM_STATES
        cost = {"bytes": 2 * (M * K + K * outputs + M * outputs), "flops": 2 * M * K * outputs}
        for kind in ("rms", "layer"):
            for weighted in (False, True):
                shape = f"{name} {M}x{K}x{outputs} {kind}{', weights' * weighted}"
                inputs = partial(_inputs, M, K, outputs, weighted)
                rivals = {"compile": compiled(_naive(kind)), "eager": plain(_naive(kind))}
                bar = Bar(times_rival=1.1, rivals=("compile",))
                yield forward(shape, inputs, partial(ops.norm_linear, kind=kind), rivals, bar, **cost)
            twice = {"bytes": 2 * cost["bytes"], "flops": 2 * cost["flops"]}
            yield backward(
                shape,
                inputs,
                partial(ops.norm_linear, kind=kind),
                rivals,
                Bar(times_rival=1.0, rivals=("compile",)),
                **twice,
            )


def _inputs(M: int, K: int, outputs: int, weighted: bool, device: torch.device) -> list[Tensor]:
    tensors = [random(device, M, K), random(device, outputs, K, scale=K**-0.5)]
    return [*tensors, random(device, K)] if weighted else tensors


def _naive(kind: str) -> Callable[..., Tensor]:
    return partial(ops.norm_linear.naive, kind=kind)
