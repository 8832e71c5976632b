"""Attention of separate q, k and v, by the kernels of the model's own self-attention.

Those read q, k and v out of one projection, as the model has it. Three tensors that are the parts of one projection
are taken as they lie; others are packed by a copy first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.context import RotaryTables
from hrm.kernels.naive import rotate
from hrm.kernels.ops.operator import check_shape, check_tensors, is_traced, operation, runs_triton, triton_kernels

_HEAD_SIZES = (16, 32, 64, 128)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    rotary: RotaryTables | None = None,
    *,
    consecutive: bool = False,
) -> Tensor:
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-3, -2)


@torch.library.custom_op("hrm::attention_of_parts", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, differentiable: bool, consecutive: bool
) -> tuple[Tensor, Tensor]:
    """The result [B, T, N, K] and what the backward needs of it besides, as `hrm::attention` has it."""
    triton_kernels("attention", q)  # makes the operators below known
    gluon = consecutive and cos is not None and _on_hopper(q)
    packed = torch.ops.hrm.attention(_projection(q, k, v), cos, sin, q.shape[2], differentiable, gluon)
    return packed[0].view(q.shape), packed[1]


@_attention.register_fake
def _results(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, differentiable: bool, consecutive: bool
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    if not differentiable or _holds_head(q):
        return out, q.new_empty(0)
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("hrm::attention_of_parts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """The gradients in q, k and v as one, [B, T, 3, N, K]."""
    batch, tokens, heads, size = q.shape
    triton_kernels("attention", q)
    d_qkv: Tensor = torch.ops.hrm.attention_backward(
        grad.flatten(2), _projection(q, k, v), cos, sin, None if out is None else out.flatten(2), lse, heads
    )
    return d_qkv.view(batch, tokens, 3, heads, size)


@_backward.register_fake
def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
) -> Tensor:
    batch, tokens, heads, size = q.shape
    return q.new_empty(batch, tokens, 3, heads, size)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cos, sin, *_ = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, cos, sin, None if _holds_head(q) else out, lse)
    ctx.set_materialize_grads(False)  # lse has no gradient


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_backward(grad, *ctx.saved_tensors).unbind(2), *[None] * 4


_attention.register_autograd(_differentiate, setup_context=_save)


@operation(naive)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    rotary: RotaryTables | None = None,
    *,
    consecutive: bool = False,
) -> Tensor:
    """softmax(q kᵀ / sqrt(K)) v of every head, q and k rotated first by their positions if tables are given.

    The model's kernels take self-attention that is not causal, with heads of 16, 32, 64 or 128 features. They have no
    mask: causal attention, keys of another number than queries and other heads run the definition, which is PyTorch's
    scaled_dot_product_attention, on every device.

    Args:
        q: [..., T, N, K], N heads of K features for each of T tokens; bfloat16, float16 or float32.
        k: [..., S, N, K], as `q`. Where q, k and v are the parts of one projection [..., T, 3, N, K] they are read as
            they lie (see `projection_parts`), otherwise copied into one.
        v: as `k`.
        causal: let token i attend to tokens 0 to i only.
        rotary: tables for T tokens and K features, as `hrm.kernels.naive.rotary_tables` makes them, if S is T.
        consecutive: the tables are those of positions 0, 1, 2 and so on. Kernels for Hopper GPUs, which rotate on from
            token to token, take long sequences then.

    Returns:
        [..., T, N, K] in the dtype of `q`. Differentiable in q, k and v. Their gradients lie as the parts of one
        projection: where q, k and v are from `projection_parts`, no copy puts them together.

    Raises:
        UserError: shapes do not belong together, or dtypes or devices are others.

    Source: Vaswani et al., 1706.03762, eq. 1; rotation by Su et al., RoFormer, 2104.09864; kernels after Dao,
    FlashAttention-2, 2307.08691.
    """
    check_tensors("attention", q=q, k=k, v=v)
    if q.ndim < 3:
        raise UserError(f"attention: q is {list(q.shape)}; give [..., tokens, heads, features].")
    keys = k.shape[-3] if k.ndim == q.ndim else q.shape[-3]
    check_shape("attention", "k", k, (*q.shape[:-3], keys, *q.shape[-2:]), "as q but for the number of tokens")
    check_shape("attention", "v", v, k.shape, "as k")
    if rotary is not None:
        check_shape("attention", "q", q, k.shape, "as k, where there are rotary tables")
        for name, table in zip(("rotary.cos", "rotary.sin"), rotary, strict=True):
            check_shape("attention", name, table, (q.shape[-3], q.shape[-1]), "tokens by features of a head")
    made_for = not causal and q.shape == k.shape and q.shape[-1] in _HEAD_SIZES and q.numel() > 0
    if not (made_for and runs_triton(q)):
        return naive(q, k, v, causal, rotary)
    cos, sin = (None, None) if rotary is None else rotary
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    sequences = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    out: Tensor = _attention(*sequences, cos, sin, differentiable, consecutive)[0]
    return out.view(q.shape)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projection.view(*projection.shape[:-1], 3, heads, -1).unbind(-3)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        shape = grads[0].shape
        sequences = [grad.reshape(-1, *shape[-3:]) for grad in grads]
        if is_traced(grads[0]):  # addresses are not known
            return torch.stack(sequences, dim=2).view(*shape[:-2], -1), None
        return _projection(*sequences).view(*shape[:-2], -1), None


def projection_parts(projection: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `attention` takes them, views of one projection.

    As `unbind`, whose gradient copies three into one; this one takes those of `attention` as they lie.

    Args:
        projection: [..., T, 3 N K]: all heads of q, then of k, then of v.
        heads: N.

    Returns:
        Three of [..., T, N, K].

    Raises:
        UserError: the last dimension is not 3 times that many heads.
    """
    if projection.ndim < 2 or heads < 1 or projection.shape[-1] % (3 * heads):
        raise UserError(
            f"projection_parts: projection is {list(projection.shape)}; give [..., tokens, 3 * {heads} * features]."
        )
    q, k, v = _Parts.apply(projection, heads)  # type: ignore[no-untyped-call]
    return q, k, v


def _projection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, 3 N K] that holds all heads of q, then k, then v; not copied where they are such parts."""
    batch, tokens, heads, size = q.shape
    width = heads * size
    strides = (tokens * 3 * width, 3 * width, size, 1)
    begin = q.storage_offset()
    storage = q.untyped_storage().data_ptr()
    if all(
        part.stride() == strides
        and part.storage_offset() == begin + i * width
        and part.untyped_storage().data_ptr() == storage
        for i, part in enumerate((q, k, v))
    ):
        return q.as_strided((batch, tokens, 3 * width), (tokens * 3 * width, 3 * width, 1))
    return torch.stack((q, k, v), dim=2).flatten(2)


def _holds_head(q: Tensor) -> bool:
    from hrm.kernels.ops.triton.attention.short import holds_head

    return holds_head(q)


def _on_hopper(q: Tensor) -> bool:
    from hrm.kernels.ops.hopper import device

    return device.why_not(q.device) is None
