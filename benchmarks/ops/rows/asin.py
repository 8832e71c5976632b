from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.row import BEYOND_CACHE, HRM_STATES, Bar, Row, backward, compiled, forward, plain, random
from hrm.kernels import ops


def rows(toy: bool) -> Iterator[Row]:
    rivals = {"eager": plain(ops.asin.naive), "compile": compiled(ops.asin.naive)}
    for shape in [(24, 32)] if toy else [HRM_STATES, BEYOND_CACHE]:
        inputs, moved = partial(_inputs, shape), 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", inputs, ops.asin, rivals, Bar(0.9), 2 * moved)
        yield backward(f"{shape[0]}x{shape[1]}", inputs, ops.asin, rivals, Bar(0.9), 3 * moved)


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    return [random(device, *shape, scale=0.2)]
