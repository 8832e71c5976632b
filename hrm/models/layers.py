"""Parameter holders of HRM: how weights are named, initialised and cast. The maths of a block is in `hrm.kernels`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def truncated_normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Numbers from a normal distribution cut at two sigma whose *actual* standard deviation is `std`.

    Cutting makes a distribution narrower; the sigma of the uncut one is widened to make up for it, as JAX's
    initialisers do (and unlike `torch.nn.init.trunc_normal_`).
    """
    cut = 2.0
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(cut / math.sqrt(2))
    sigma = std / math.sqrt(1 - 2 * cut * density / inside)
    uniform = torch.empty(shape).uniform_(-inside, inside, generator=generator)
    return (uniform.erfinv_() * (math.sqrt(2) * sigma)).clamp_(-cut * sigma, cut * sigma)


class Linear(nn.Module):
    """`x @ weight.T + bias`, the float32 master weights cast to the dtype of `x`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    """A table of vectors with the parameter name of the published checkpoints."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(weight)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.embedding_weight.to(dtype))


class SparseEmbedding(nn.Module):
    """A table too large for a dense gradient: in training, only the rows of the batch in hand get one.

    After a training forward, `local_ids` [B] says which rows of `weights` were read and `local_weights` [B, ndim] is a
    leaf that collects the gradient, one row per sequence; `hrm.optim.SparseSignSGD` writes the update back.
    """

    weights: Tensor

    def __init__(self, num_embeddings: int, ndim: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(num_embeddings, ndim))
        self.local_ids: Tensor | None = None
        self.local_weights: Tensor | None = None

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.weights[ids]
        if self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            self.local_ids, self.local_weights = ids, rows
        return rows.to(dtype)
