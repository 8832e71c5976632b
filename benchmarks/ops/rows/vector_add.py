from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.row import BEYOND_CACHE, HRM_STATES, Bar, Row, compiled, forward, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    """Forward only: the gradient is that of the sum as it is, and moves nothing."""
    rivals = {"eager": plain(ops.vector_add.naive), "compile": compiled(ops.vector_add.naive)}
    for shape in [(24, 32)] if toy else [HRM_STATES, BEYOND_CACHE]:
        moved = 3 * 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", partial(_inputs, shape), ops.vector_add, rivals, Bar(0.9), moved)


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    return [random(device, *shape), random(device, *shape)]
