"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def learning_rate(step: int, base_lr: float, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Linear warm-up, then a cosine from `base_lr` down to `min_ratio * base_lr` at `total_steps`.

    Args:
        step: counted from 1; step `warmup_steps` is the first at the full rate.
    """
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return base_lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_lr(group: dict[str, Any], lr: float, holder: float | Tensor | None = None) -> None:
    """Set a group's rate, in `holder` or else in what holds it now: a tensor, for CUDA graphs, is filled and stays."""
    holder = group["lr"] if holder is None else holder
    group["lr"] = holder.fill_(lr) if isinstance(holder, Tensor) else lr
