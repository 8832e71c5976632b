from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.ops.row import Bar, Call, Row, Work, random
from hrm.optim import FusedAdamW

Shapes = Sequence[tuple[int, ...]]
HRM_V1: Shapes = [(12, 512), (2, 512), (2,)] + [(1536, 512), (512, 512), (3072, 512), (512, 1536)] * 8
MANY: Shapes = [(768, 768), (768,)] * 100  # of a small transformer: a launch for each 64 of them


def rows(toy: bool) -> Iterator[Row]:
    """Whole steps of the optimizer, the counting included."""
    cases: dict[str, Shapes] = {"toy": [(3, 40), (5,)]} if toy else {"HRM v1": HRM_V1, "200 weights": MANY}
    for name, shapes in cases.items():
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        work = partial(_work, shapes)
        yield Row(f"{name}, {numbers:,} float32", "step", work, Bar(times_rival=1.0, rivals=("fused",)), 28 * numbers)


def _work(shapes: Shapes, device: torch.device) -> Work:
    params = [nn.Parameter(random(device, *shape, dtype=torch.float32).detach()) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)

    def of_torch(**options: Any) -> Call:
        capturable = device.type == "cuda"
        rate = torch.tensor(1e-4, device=device)
        return torch.optim.AdamW(params, rate, capturable=capturable, **options).step

    rate = torch.tensor(1e-4, device=device, dtype=torch.float64)
    ours = FusedAdamW(params, rate)
    return Work(ours.step, {"fused": partial(of_torch, fused=True), "foreach": partial(of_torch, foreach=True)})
