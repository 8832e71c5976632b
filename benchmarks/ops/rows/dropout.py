from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.ops.row import BEYOND_CACHE, HRM_STATES, Bar, Row, backward, compiled, forward, plain, random
from hrm.kernels import ops

_P, _SEED = 0.1, 7


def rows(toy: bool) -> Iterator[Row]:
    """Beside PyTorch's dropout, which keeps a mask for its backward when it is not compiled."""
    rivals = {"eager": plain(_pytorch), "compile": compiled(_pytorch)}
    for shape in [(24, 32)] if toy else [HRM_STATES, BEYOND_CACHE]:
        inputs, moved = partial(_inputs, shape), 2 * 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", inputs, ops.dropout, rivals, Bar(0.9), moved)
        yield backward(f"{shape[0]}x{shape[1]}", inputs, ops.dropout, rivals, Bar(0.9), moved)


def _pytorch(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    return F.dropout(x, p)


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Any]:
    return [random(device, *shape), _P, _SEED]
