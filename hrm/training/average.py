"""An exponential moving average of the weights: usually the better ones to evaluate, and steadier from step to step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hrm.models import ACTLossHead
from hrm.models.layers import SparseEmbedding


class WeightAverage:
    """A second model whose weights follow a model's: `average = decay * average + (1 - decay) * weights`.

    It starts at the weights as they are, and until step `start` it is the weights themselves. `update` reads and writes
    tensors that stay in place and does not wait for the device, so it may be part of a CUDA graph.

    What is not learned, and the puzzle table where the architecture's published code leaves it out (its
    `averages_puzzle_table`), is not averaged but shared: `shared` names it as `state_dict()` does.
    """

    def __init__(self, model: ACTLossHead, decay: float, start: int = 0) -> None:
        inner, weights = model.model.inner, model.state_dict()
        averaged = {name for name, _ in model.named_parameters()}
        if inner.averages_puzzle_table:
            averaged |= {
                f"{name}.weights" for name, module in model.named_modules() if isinstance(module, SparseEmbedding)
            }
        self.shared = frozenset(weights.keys() - averaged)
        buffers = dict(model.named_buffers())
        kept = (inner.kernels, *(buffers[name] for name in self.shared))
        self.model = copy.deepcopy(model, {id(part): part for part in kept}).eval().requires_grad_(False)
        self._decay, self._start = decay, start
        # Of the weights in the new average. A recorded CUDA graph reads it, so it changes where it lies.
        self._share = torch.ones((), device=next(model.parameters()).device)
        averages = self.model.state_dict()
        self._weights = [tensor for name, tensor in weights.items() if name not in self.shared]
        self._averages = [tensor for name, tensor in averages.items() if name not in self.shared]

    def at_step(self, step: int) -> None:
        """The host's part of training step `step`, counted from 1, before `update`."""
        if self._start:
            self._share.fill_(1.0 if step <= self._start else 1 - self._decay)

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Take one step towards the weights; to be called after each step of the optimizers.

        Args:
            found_inf: 0-dimensional; when not 0, the average stays as it is.
        """
        if self._start:
            moved = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(moved, self._share)
            torch._foreach_add_(moved, self._averages)
            if found_inf is None:
                torch._foreach_copy_(self._averages, moved)
                return
        elif found_inf is None:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
            return
        else:
            moved = torch._foreach_lerp(self._averages, self._weights, 1 - self._decay)
        for average, new in zip(self._averages, moved, strict=True):
            torch.where(found_inf > 0, average, new, out=average)
