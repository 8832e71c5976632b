"""Attention for any number of tokens, by `short` or `long`, as operators.

torch.compile calls operators as they are, and autograd knows how they differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm.kernels.naive import RotaryTables
from hrm.kernels.ops.triton.attention.common import check_projection, empty_result
from hrm.kernels.ops.triton.attention.long import long_backward, long_forward
from hrm.kernels.ops.triton.attention.short import holds_head, short_backward, short_forward


@torch.library.custom_op("hrm::attention", mutates_args=())
def _attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, differentiable: bool, gluon: bool
) -> tuple[Tensor, Tensor]:
    """The result and what the backward needs of it besides: `lse` for the tiled form, else nothing."""
    if holds_head(qkv):
        return short_forward(qkv, cos, sin, num_heads), qkv.new_empty(0)
    out, lse = long_forward(qkv, cos, sin, num_heads, save_lse=differentiable, gluon=gluon)
    return out, qkv.new_empty(0) if lse is None else lse


@_attention.register_fake
def _attention_shapes(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, differentiable: bool, gluon: bool
) -> tuple[Tensor, Tensor]:
    if holds_head(qkv) or not differentiable:
        return empty_result(qkv), qkv.new_empty(0)
    return empty_result(qkv), qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1], dtype=torch.float32)


@torch.library.custom_op("hrm::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor | None, lse: Tensor, num_heads: int
) -> Tensor:
    grad = grad.contiguous()
    if out is None:
        return short_backward(grad, qkv, cos, sin, num_heads)
    return long_backward(grad, qkv, cos, sin, out, lse, num_heads)


@_attention_backward.register_fake
def _attention_backward_shapes(
    grad: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor | None, lse: Tensor, num_heads: int
) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, ctx.num_heads, *_ = inputs
    out, lse = output
    ctx.save_for_backward(qkv, cos, sin, None if holds_head(qkv) else out, lse)
    ctx.set_materialize_grads(False)  # lse has no gradient


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return _attention_backward(grad, *ctx.saved_tensors, ctx.num_heads), *[None] * 5


_attention.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor, rotary: RotaryTables | None, num_heads: int, *, gluon: bool = False) -> Tensor:
    """Non-causal self-attention of projected tokens.

    Args:
        qkv: [B, T, 3 D], the features of all heads of q, then k, then v; bfloat16, float16 or float32.
        rotary: tables as `naive.rotary_tables` makes them (the halves of a row alike), for T tokens and heads of
            D / num_heads features, or None.
        num_heads: heads of 16, 32, 64 or 128 features.
        gluon: use the kernel made for Hopper in Gluon where it pays, for long sequences.

    Returns:
        [B, T, D] in the dtype of `qkv`, differentiable in `qkv`.

    Raises:
        UserError: a shape or dtype that the kernels are not made for.
    """
    check_projection(qkv, rotary, num_heads)
    cos, sin = (None, None) if rotary is None else rotary
    differentiable = torch.is_grad_enabled() and qkv.requires_grad
    result: Tensor = _attention(qkv.contiguous(), cos, sin, num_heads, differentiable, gluon)[0]
    return result


def attention_in_e4m3(qkv: Tensor, rotary: RotaryTables | None, num_heads: int, *, gluon: bool = False) -> Tensor:
    """The result of `attention` rounded to torch.float8_e4m3fn once, from float32; it cannot be differentiated."""
    check_projection(qkv, rotary, num_heads)
    qkv = qkv.contiguous()
    cos, sin = (None, None) if rotary is None else rotary
    if holds_head(qkv):
        return short_forward(qkv, cos, sin, num_heads, torch.float8_e4m3fn)
    return long_forward(qkv, cos, sin, num_heads, save_lse=False, dtype=torch.float8_e4m3fn, gluon=gluon)[0]
