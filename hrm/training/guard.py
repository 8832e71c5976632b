"""Steps whose loss or gradients are not finite: skipped and counted without waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hrm.models import Carry


class NonFiniteGuard:
    """Counts the steps that are skipped, and keeps what they computed out of the metrics and the carry.

    Attributes:
        in_a_row: the steps skipped since the last that was not; 0-dimensional, on the device.
    """

    def __init__(self, abort_after: int | None, device: torch.device, *, masks: bool) -> None:
        """Give up after `abort_after` skipped steps in a row; None: never.

        Args:
            masks: the optimizers run at every step and mask what they write, so that the host need not know. Else the
                host reads the flag and leaves them out, which is free on the CPU.
        """
        self.masks = masks
        self._abort_after = abort_after
        self.in_a_row = torch.zeros((), device=device)

    def count(self, found: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The step's metrics, all 0 if it is skipped, with `skipped` and `gave_up` (1 when this is one too many)."""
        self.in_a_row.add_(1).mul_(found)
        wide = torch.float32 if found.device.type == "mps" else torch.float64
        values = torch.stack([value.to(wide) for value in metrics.values()])
        kept = dict(zip(metrics, torch.where(found > 0, 0, values).unbind(), strict=True))
        gave_up = torch.zeros_like(found) if self._abort_after is None else self.in_a_row == self._abort_after
        return kept | {"skipped": found, "gave_up": gave_up}


def halt_nonfinite(carry: Carry, q_halt: Tensor) -> Carry:
    """Let sequences whose state is not finite make place for new ones.

    Args:
        q_halt: [B], read off the first token of each state: attention brings what is not finite to all tokens.
    """
    return replace(carry, halted=carry.halted | ~torch.isfinite(q_halt))
