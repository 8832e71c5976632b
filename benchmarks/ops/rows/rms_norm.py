from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.row import HRM_STATES, Bar, Function, Row, backward, compiled, forward, imported, plain, random
from hrm.kernels import ops

_EPS = 1e-5


def rows(toy: bool) -> Iterator[Row]:
    """With weights: the HRM's width, and two that more warps share."""
    rivals = {"eager": plain(_pytorch), "compile": compiled(_pytorch), "quack": _quack}
    bar = Bar(times_rival=1, rivals=("compile", "quack"))
    for shape in [(24, 32)] if toy else [HRM_STATES, (2**15, 2**12), (2**13, 2**14)]:
        inputs, moved = partial(_inputs, shape), 2 * shape[0] * shape[1]
        yield forward(f"{shape[0]}x{shape[1]}", inputs, ops.rms_norm, rivals, bar, 2 * moved)
        yield backward(f"{shape[0]}x{shape[1]}", inputs, ops.rms_norm, rivals, bar, 3 * moved)


def _pytorch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, _EPS)


def _quack() -> Function:
    return partial(imported("quack", "rmsnorm")(), eps=_EPS)


def _inputs(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    return [random(device, *shape), random(device, shape[1])]
