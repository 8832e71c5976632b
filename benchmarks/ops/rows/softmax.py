from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.row import (
    HRM_STATES,
    Bar,
    Row,
    backward,
    compiled,
    forward,
    imported,
    plain,
    random,
)
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """The HRM's logits and widths, one that more warps share, and one that registers do not hold."""
    rivals = {
        "eager": plain(ops.softmax.naive),
        "compile": compiled(ops.softmax.naive),
        "quack": imported("quack", "softmax"),
    }
    bar = Bar(times_rival=1, rivals=("compile", "quack"))
    for shape in [(24, 32)] if toy else [(384 * 82, 11), HRM_STATES, (2**15, 2**12), (2**11, 2**16)]:
        inputs, moved = partial(_inputs, shape), 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", inputs, ops.softmax, rivals, bar, 2 * moved)
        yield backward(f"{shape[0]}x{shape[1]}", inputs, ops.softmax, rivals, bar, 3 * moved)


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    return [random(device, *shape)]
