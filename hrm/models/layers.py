"""Parameter holders of HRM: how weights are named, initialised and cast. The maths of a block is in `hrm.kernels`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hrm.models.size_guard import claim


def truncated_normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Numbers from a normal distribution cut at two sigma whose *actual* standard deviation is `std`.

    Cutting makes a distribution narrower; the sigma of the uncut one is widened to make up for it, as JAX's
    initialisers do (and unlike `torch.nn.init.trunc_normal_`).
    """
    claim(shape)
    cut = 2.0
    density = math.exp(-(cut**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(cut / math.sqrt(2))
    sigma = std / math.sqrt(1 - 2 * cut * density / inside)
    uniform = torch.empty(shape).uniform_(-inside, inside, generator=generator)
    return (uniform.erfinv_() * (math.sqrt(2) * sigma)).clamp_(-cut * sigma, cut * sigma)


@dataclass(frozen=True)
class WeightCopy:
    """A weight in the compute dtype, kept by the optimizer that wrote it; valid while the weight stays as it is."""

    values: Tensor
    version: int  # of the weight when the copy was made, as autograd counts changes
    address: int  # of the weight's memory then

    def is_current(self, weight: Tensor) -> bool:
        return self.version == weight._version and self.address == weight.data_ptr()


def keep_copy(weight: Tensor, values: Tensor) -> None:
    """Say that `values` is what `weight` is now, in another dtype."""
    weight.copy_in_compute_dtype = WeightCopy(values, weight._version, weight.data_ptr())  # type: ignore[attr-defined]


def kept_copy(weight: Tensor) -> WeightCopy | None:
    """The copy of a weight last kept, current or not."""
    return getattr(weight, "copy_in_compute_dtype", None)


@contextmanager
def copies_at_hand(weights: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Have `in_dtype` use copies in the body, which must leave the weights alone, instead of casting at every call.

    They count no longer at the end, for a CUDA graph of a training step may later change the weights without autograd's
    notice. But their memory stays for the next time: a graph recorded in the body reads it there. Copies that an
    optimizer keeps stay, brought up to date.
    """
    made = []
    for weight in weights:
        copy = kept_copy(weight)
        if copy is not None and copy.values.dtype == dtype:
            if not copy.is_current(weight):
                keep_copy(weight, copy.values.copy_(weight.detach()))
        elif copy is None and weight.dtype != dtype:
            keep_copy(weight, _memory_for_copy(weight, dtype).copy_(weight.detach()))
            made.append(weight)
    try:
        yield
    finally:
        for weight in made:
            del weight.copy_in_compute_dtype  # type: ignore[attr-defined]


def _memory_for_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a copy of a weight, the same every time."""
    memory: Tensor | None = getattr(weight, "memory_for_copy", None)
    if memory is None or memory.dtype != dtype or memory.device != weight.device or memory.shape != weight.shape:
        memory = torch.empty_like(weight, dtype=dtype)
        weight.memory_for_copy = memory  # type: ignore[attr-defined]
    return memory


def in_dtype(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weights of one dtype in another, with a launch for all of them; their gradients come back in their own.

    Where an optimizer keeps a copy in `dtype` (see `hrm.optim.Adam`) and the weight has not changed since, the copy
    serves and nothing is launched. What autograd sees of changes counts, such as operations in place and
    `load_state_dict`; writing through `weight.data` or by a collective is not seen.
    """
    if weights[0].dtype == dtype:
        return tuple(weights)
    cast: tuple[Tensor, ...] = _InDtype.apply(dtype, *weights)  # type: ignore[no-untyped-call]
    return cast


class _InDtype(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        cast, made, missing = [], [], []
        for weight in weights:
            copy = kept_copy(weight)
            if copy is not None and copy.values.dtype == dtype and copy.is_current(weight):
                cast.append(copy.values.detach())  # autograd marks what is returned here: not the copy itself
            else:
                cast.append(torch.empty_like(weight, dtype=dtype))
                made.append(cast[-1])
                missing.append(weight)
        if missing:
            torch._foreach_copy_(made, missing)
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {i: grad for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[i + 1]}
        wide = {i: grad.new_empty(grad.shape, dtype=ctx.dtype) for i, grad in given.items()}
        if wide:
            torch._foreach_copy_(list(wide.values()), list(given.values()))
        return None, *(wide.get(i) for i in range(len(grads)))


# Matrices of 16 bits whose rows are whole 16 bytes: for others the library's kernels take several times as long.
_ALIGNED = 8


class Linear(nn.Module):
    """`x @ weight.T + bias`, the float32 master weights cast to the dtype of `x`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.linear(x, *in_dtype([self.weight, self.bias], x.dtype))
        (weight,) = in_dtype([self.weight], x.dtype)
        if x.element_size() == 2 and len(weight) % _ALIGNED:
            return F.linear(x, F.pad(weight, (0, 0, 0, -len(weight) % _ALIGNED)))[..., : len(weight)]
        return F.linear(x, weight)

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


# Rows of a table whose gradient is faster as a matmul with ones and zeros than by sorting what was read from where. The
# matmul also sums in the same order every time.
_SMALL_TABLE = 256


class _SmallEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        rows = torch.arange(ctx.num_rows + -ctx.num_rows % _ALIGNED, device=ids.device, dtype=ids.dtype)
        is_read = (ids.flatten()[:, None] == rows).to(grad.dtype)
        return None, (is_read.T @ grad.flatten(0, -2))[: ctx.num_rows]


class Embedding(nn.Module):
    """A table of vectors with the parameter name of the published checkpoints."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(weight)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        (table,) = in_dtype([self.embedding_weight], dtype)
        if len(table) <= _SMALL_TABLE:
            return _SmallEmbedding.apply(ids, table)  # type: ignore[no-any-return, no-untyped-call]
        return F.embedding(ids, table)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.embedding_weight.shape)


class SparseEmbedding(nn.Module):
    """A table too large for a dense gradient: in training, only the rows of the batch get one.

    After a training forward, `local_ids` [B] says which rows of `weights` were read and `local_weights` [B, ndim] is a
    leaf that collects the gradient, one row per sequence; `hrm.optim.SparseSignSGD` writes the update back.

    Attributes:
        is_frozen: the rows get no gradient.
    """

    weights: Tensor
    is_frozen: bool = False

    def __init__(self, num_embeddings: int, ndim: int) -> None:
        super().__init__()
        claim((num_embeddings, ndim))
        self.register_buffer("weights", torch.zeros(num_embeddings, ndim))
        self.local_ids: Tensor | None = None
        self.local_weights: Tensor | None = None

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.weights[ids]
        if self.training and torch.is_grad_enabled() and not self.is_frozen:
            rows.requires_grad_()
            self.local_ids, self.local_weights = ids, rows
        return rows.to(dtype)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weights.shape)
