"""Dropout by a seed: the mask is drawn again where it is needed, and never lies in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import check_tensors, operation, runs_triton, triton_kernels

_WORD = 0xFFFFFFFF  # 32 bits
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7


def naive(x: Tensor, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    kept = random_bits(x.numel(), seed, offset, x.device).view(x.shape) >= _threshold(p)
    return torch.where(kept, x * _scale(p), 0.0)


def random_bits(count: int, seed: int | Tensor, offset: int, device: torch.device) -> Tensor:
    """32 random bits for each of `count` elements: [count], int64.

    Philox4x32-7 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011): of the fewest rounds that pass its
    authors' tests; with 10, a GPU draws longer than it copies. The seed is its key; its counter has the number of the
    block in the lower and `offset` in the upper 64 bits. A block is four elements in a row.
    """
    block = torch.arange(-(-count // 4), device=device)
    streams = torch.full_like(block, offset)
    a, b, c, d = block & _WORD, block >> 32, streams & _WORD, streams >> 32
    key_a, key_b = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # The product of two words has 64 bits, of which int64 has the highest for a sign.
        high_a, low_a = _halves(a * _MULTIPLIERS[0])
        high_b, low_b = _halves(c * _MULTIPLIERS[1])
        a, b, c, d = high_b ^ b ^ key_a, low_b, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_STEPS[0]) & _WORD, (key_b + _KEY_STEPS[1]) & _WORD
    return torch.stack([a, b, c, d], dim=-1).flatten()[:count]


def _halves(product: Tensor) -> tuple[Tensor, Tensor]:
    return (product >> 32) & _WORD, product & _WORD


def _threshold(p: float) -> int:
    """Elements are kept whose 32 bits are no less: a share of 1 - p, to 2^-32."""
    return min(round(p * 2**32), _WORD)


def _scale(p: float) -> float:
    """Of kept elements; with p = 1, the one in 2^32 that is kept becomes zero by it."""
    return 1 / (1 - p) if p < 1 else 0.0


@torch.library.custom_op("hrm::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, seed: int, seed_on_device: Tensor | None, offset: int) -> Tensor:
    kernels = triton_kernels("dropout", x)
    out: Tensor = kernels.forward(x, _threshold(p), _scale(p), seed, seed_on_device, offset)
    return out


@_dropout.register_fake
def _result(x: Tensor, p: float, seed: int, seed_on_device: Tensor | None, offset: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.seed, seed_on_device, ctx.offset = inputs
    ctx.save_for_backward(seed_on_device)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed_on_device,) = ctx.saved_tensors
    return _dropout(grad, ctx.p, ctx.seed, seed_on_device, ctx.offset), None, None, None, None


_dropout.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def dropout(x: Tensor, p: float, seed: int | Tensor, offset: int = 0) -> Tensor:
    """x with a share p of its elements zero and the others divided by 1 - p.

    Which elements are dropped depends on seed, offset and the place of an element in `x`, read row by row: neither on
    dtype nor on strides or device. The backward draws the same numbers again; nothing is kept for it.

    Args:
        x: any shape and strides (copied where it is not contiguous); bfloat16, float16 or float32.
        p: probability of an element to be dropped, from 0 to 1.
        seed: from 0 to 2^63 - 1, or such a number as an int64 tensor of one element on the device of `x`, which a CUDA
            graph reads anew in every replay.
        offset: chooses one of 2^63 independent streams of a seed, e.g. by the number of a layer.

    Returns:
        [*x.shape], contiguous, in the dtype of `x`. Differentiable in `x`, any number of times.

    Raises:
        UserError: p is no probability, seed or offset is out of range, or dtype or device are others.

    Source: Srivastava et al., Dropout, 2014; random numbers as in `random_bits`.
    """
    check_tensors("dropout", x=x)
    if not 0 <= p <= 1:
        raise UserError(f"dropout: p is {p:g}; give a probability from 0 to 1.")
    if not 0 <= offset < 2**63:
        raise UserError(f"dropout: offset is {offset}; give a number from 0 to 2^63 - 1.")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise UserError(
                f"dropout: seed is {list(seed.shape)} of {seed.dtype} on {seed.device};"
                f" give an int, or one element of int64 on {x.device}."
            )
    elif not 0 <= seed < 2**63:
        raise UserError(f"dropout: seed is {seed}; give a number from 0 to 2^63 - 1.")
    if not runs_triton(x):
        return naive(x, p, seed, offset)
    on_device = isinstance(seed, Tensor)
    out: Tensor = _dropout(x, p, 0 if on_device else seed, seed if on_device else None, offset)
    return out
