"""An exponential moving average of the weights: usually the better ones to evaluate, and steadier from step to step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hrm.models import ACTLossHead


class WeightAverage:
    """A second model whose weights follow a model's: `average = decay * average + (1 - decay) * weights`.

    It starts at the weights as they are. `update` reads and writes tensors that stay in place and does not wait for the
    device, so it may be part of a CUDA graph.
    """

    def __init__(self, model: ACTLossHead, decay: float) -> None:
        kernels = model.model.inner.kernels
        self.model = copy.deepcopy(model, {id(kernels): kernels}).eval().requires_grad_(False)
        self._decay = decay
        self._weights = list(model.state_dict().values())
        self._averages = list(self.model.state_dict().values())

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Take one step towards the weights; to be called after each step of the optimizers.

        Args:
            found_inf: 0-dimensional; when not 0, the average stays as it is.
        """
        if found_inf is None:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
            return
        moved = torch._foreach_lerp(self._averages, self._weights, 1 - self._decay)
        for average, new in zip(self._averages, moved, strict=True):
            torch.where(found_inf > 0, average, new, out=average)
