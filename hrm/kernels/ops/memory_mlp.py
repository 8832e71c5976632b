"""The neural memory of Titans (Behrouz et al. 2025, arXiv 2501.00663): loss, gradients and update of an MLP, by hand.

A memory is an MLP of two layers that maps keys to values. Writing to it is a step of gradient descent with momentum and
weight decay on how badly it does so (section 3.1, equations 9 to 14).

Shapes: N tokens, D width of keys and values, H hidden width; leading dimensions are memories of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import (
    check_shape,
    check_tensors,
    dtype_name,
    is_traced,
    operation,
    runs_triton,
    triton_kernels,
)

MOST_ROWS = 128  # of a tile


class MemoryWeights(NamedTuple):
    """Weights of memories, or their momentum, float32: the memory is y = w2 silu(w1 k + b1) + b2."""

    w1: Tensor  # [..., H, D]
    b1: Tensor  # [..., H]
    w2: Tensor  # [..., D, H]
    b2: Tensor  # [..., D]


class MemorySaved(NamedTuple):
    """What the forward pass computed, and what the backward pass needs of it."""

    loss: Tensor  # [...], float32: mean of (y - v)²
    z1: Tensor  # [..., N, H], as k: k w1ᵀ + b1
    h: Tensor  # [..., N, H], as k: silu(z1)
    y: Tensor  # [..., N, D], as k: h w2ᵀ + b2
    k: Tensor  # [..., N, D]
    error: Tensor  # [..., N, D], as k: y - v, rounded once
    w2_copy: Tensor  # w2 in the dtype of k; empty where the kernels read w2 itself
    error_sums: Tensor  # of the kernels: error summed over the rows of each tile
    counters: Tensor  # of the kernels: where programs count how many of them have come so far


# ---- the definition, which is differentiable


def naive_forward_loss(k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> MemorySaved:
    dtype, wide = k.dtype, torch.promote_types(k.dtype, torch.float32)
    w2_copy = w2.to(dtype)
    z1 = k @ w1.to(dtype).mT + b1.to(dtype).unsqueeze(-2)
    h = F.silu(z1)
    y = h @ w2_copy.mT + b2.to(dtype).unsqueeze(-2)
    error = y - v
    loss = error.to(wide).square().mean((-2, -1))
    nothing = k.new_empty(0)
    return MemorySaved(loss, z1, h, y, k, error, w2_copy, nothing, nothing)


def naive_gradients(saved: MemorySaved) -> MemoryWeights:
    """The gradients of the loss with respect to the weights, in float32 at least."""
    error, z1 = saved.error, saved.z1
    dtype, wide = error.dtype, torch.promote_types(error.dtype, torch.float32)
    # The factor comes last: in float16 the gradient of y itself would vanish.
    scale = 2 / max(error.shape[-2] * error.shape[-1], 1)
    sigmoid = z1.to(wide).sigmoid()
    silu_slope = sigmoid * (1 + z1.to(wide) * (1 - sigmoid))
    dz1 = ((error @ saved.w2_copy).to(wide) * silu_slope).to(dtype)
    return MemoryWeights(
        w1=scale * (dz1.mT @ saved.k).to(wide),
        b1=scale * dz1.to(wide).sum(-2),
        w2=scale * (error.mT @ saved.h).to(wide),
        b2=scale * error.to(wide).sum(-2),
    )


def naive_updated(
    saved: MemorySaved,
    w: MemoryWeights,
    momentum: MemoryWeights,
    alpha: float | Tensor,
    eta: float | Tensor,
    theta: float | Tensor,
    max_grad_norm: float | None = None,
) -> tuple[MemoryWeights, MemoryWeights, Tensor]:
    """New weights, new momentum and the gradients' norm; the arguments stay as they are. See the update in place."""
    grads = naive_gradients(saved)
    memories = saved.loss.shape
    norms = [torch.linalg.vector_norm(grad.flatten(len(memories)), dim=-1) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor = 1.0 if max_grad_norm is None else max_grad_norm / norm.clamp(min=max_grad_norm)
    gates = [torch.as_tensor(gate, dtype=norm.dtype, device=norm.device) for gate in (alpha, eta, theta)]
    is_finite = torch.stack([x.broadcast_to(memories).isfinite() for x in (saved.loss, norm, *gates)]).all(0)

    def spread(x: Tensor, like: Tensor) -> Tensor:
        return x.broadcast_to(memories).reshape(*memories, *[1] * (like.ndim - len(memories)))

    new_w, new_momentum = [], []
    for weight, moment, grad in zip(w, momentum, grads, strict=True):
        keep, step, forget = spread(gates[1], grad), spread(gates[2] * factor, grad), spread(gates[0], grad)
        new_moment = keep * moment - step * grad
        updated = (1 - forget) * weight + new_moment
        new_w.append(torch.where(spread(is_finite, grad), updated, weight))
        new_momentum.append(torch.where(spread(is_finite, grad), new_moment, moment))
    return MemoryWeights(*new_w), MemoryWeights(*new_momentum), norm


@torch.no_grad()
def naive_backward_update_(
    saved: MemorySaved,
    w: MemoryWeights,
    momentum: MemoryWeights,
    alpha: float | Tensor,
    eta: float | Tensor,
    theta: float | Tensor,
    max_grad_norm: float | None = None,
) -> Tensor:
    new_w, new_momentum, norm = naive_updated(saved, w, momentum, alpha, eta, theta, max_grad_norm)
    for old, new in zip([*w, *momentum], [*new_w, *new_momentum], strict=True):
        old.copy_(new)
    return norm


# ---- the operators


def row_tile(tokens: int) -> int:
    """Tokens of a tile of the kernels, which add up the rows of each: a power of two, at least 16."""
    return min(MOST_ROWS, max(16, 1 << (tokens - 1).bit_length()))


@torch.library.custom_op("hrm::memory_mlp_forward_loss", mutates_args=())
def _forward_loss(
    k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    found = triton_kernels("memory_mlp", k).forward_loss(k, v, w1, b1, w2, b2)
    return found


@_forward_loss.register_fake
def _forward_results(
    k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *memories, tokens, width = k.shape
    hidden, count = w1.shape[-2], math.prod(memories)
    return (
        w1.new_empty(memories),
        k.new_empty(*memories, tokens, hidden),
        k.new_empty(*memories, tokens, hidden),
        torch.empty_like(k),
        torch.empty_like(k),
        k.new_empty(0) if w2.dtype == k.dtype else torch.empty_like(w2, dtype=k.dtype),
        w1.new_empty(count, -(-tokens // row_tile(tokens)), width),
        w1.new_empty(1 + count, dtype=torch.int32),
    )


@torch.library.custom_op(
    "hrm::memory_mlp_backward_update_",
    mutates_args=("counters", "w1", "b1", "w2", "b2", "s_w1", "s_b1", "s_w2", "s_b2"),
)
def _backward_update_(
    loss: Tensor,
    z1: Tensor,
    h: Tensor,
    k: Tensor,
    error: Tensor,
    w2_copy: Tensor,
    error_sums: Tensor,
    counters: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    s_w1: Tensor,
    s_b1: Tensor,
    s_w2: Tensor,
    s_b2: Tensor,
    gates: list[float],
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor | None,
    max_grad_norm: float,
) -> Tensor:
    norm: Tensor = triton_kernels("memory_mlp", k).backward_update_(
        (loss, z1, h, k, error, w2_copy, error_sums, counters),
        MemoryWeights(w1, b1, w2, b2),
        MemoryWeights(s_w1, s_b1, s_w2, s_b2),
        [fixed if gate is None else gate for fixed, gate in zip(gates, (alpha, eta, theta), strict=True)],
        max_grad_norm,
    )
    return norm


@_backward_update_.register_fake
def _norms(loss: Tensor, *others: object) -> Tensor:
    return torch.empty_like(loss)


# ---- the public functions


@operation(naive_forward_loss)
def memory_mlp_forward_loss(k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> MemorySaved:
    """How badly memories map keys to values: z1 = k w1ᵀ + b1; h = silu(z1); y = h w2ᵀ + b2; loss = mean of (y - v)².

    Titans (arXiv 2501.00663), equation 12, with the mean over tokens and features. Matmuls are in the dtype of `k` and
    add up in float32; for float32 they are in TF32 where `torch.get_float32_matmul_precision()` is not `highest`. Two
    launches, and no wait for the device. Without gradients: `memory_mlp_forward_loss.naive` is differentiable.

    Args:
        k, v: [..., N, D]; bfloat16, float16 or float32.
        w1, b1, w2, b2: [..., H, D], [..., H], [..., D, H], [..., D], float32: of each memory, as `MemoryWeights`.

    Returns:
        loss [...] in float32; z1, h and y as `k`; and what `memory_mlp_backward_update_` takes besides.

    Raises:
        UserError: a shape, dtype or device is another one.
    """
    name = "memory_mlp_forward_loss"
    check_tensors(name, k=k, v=v)
    _check_weights(name, k, w1.shape[-2] if w1.ndim >= 2 else 0, {"": (w1, b1, w2, b2)}, overwritten=False)
    check_shape(name, "v", v, k.shape, "as k")
    if not runs_triton(k) or not k.numel() or not b1.numel():
        with torch.no_grad():
            return naive_forward_loss(k, v, w1, b1, w2, b2)
    k, v = k.detach().contiguous(), v.contiguous()
    if is_traced(k):
        with torch.no_grad():
            loss, z1, h, y, *others = _forward_loss(k, v, w1, b1, w2, b2)
    else:
        loss, z1, h, y, *others = triton_kernels("memory_mlp", k).forward_loss(k, v, w1, b1, w2, b2)
    return MemorySaved(loss, z1, h, y, k, *others)


@operation(naive_backward_update_)
def memory_mlp_backward_update_(
    saved: MemorySaved,
    w: MemoryWeights,
    momentum: MemoryWeights,
    alpha: float | Tensor,
    eta: float | Tensor,
    theta: float | Tensor,
    max_grad_norm: float | None = None,
) -> Tensor:
    """One step of descent for memories, in place: g = clipped gradients; S = eta S - theta g; W = (1 - alpha) W + S.

    Titans (arXiv 2501.00663), equations 13 and 14. Where a memory's loss, the norm of its gradients or one of its gates
    is NaN or infinite, its weights and momentum stay bit for bit as they were; that is decided on the device. One
    launch, and no wait for the device. Sums are in a fixed order: equal arguments give equal bits.

    Args:
        saved: from `memory_mlp_forward_loss` with the same weights.
        w, momentum: contiguous float32 weights W and momentum S, overwritten.
        alpha, eta, theta: how much is forgotten, how much momentum is kept, and the step size: numbers, or tensors
            [...] or of one number, a gate for each memory.
        max_grad_norm: the gradients of a memory are scaled down to this norm, above 0, where theirs is larger; None:
            never.

    Returns:
        The norm [...] of each memory's gradients before the clipping.

    Raises:
        UserError: a shape, dtype or device is another one, or what is to be overwritten is not contiguous.
    """
    name = "memory_mlp_backward_update_"
    k = saved.k
    _check_weights(name, k, saved.z1.shape[-1], {"w.": w, "momentum.": momentum}, overwritten=True)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UserError(f"{name}: max_grad_norm={max_grad_norm} is too small; give more than 0, or None.")
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    device = k.device
    for which, gate in gates.items():
        if isinstance(gate, Tensor):
            if gate.numel() != 1:
                check_shape(name, which, gate, saved.loss.shape, "one number for each memory, or one for all")
            if gate.device != device:
                raise UserError(f"{name}: {which} is on {gate.device} and k is on {k.device}; move both to one device.")
    if not saved.counters.numel():  # the definition made it
        return naive_backward_update_(saved, w, momentum, alpha, eta, theta, max_grad_norm)
    loss, z1, h, _, k, error, w2_copy, error_sums, counters = saved
    limit = float("inf") if max_grad_norm is None else float(max_grad_norm)
    if not is_traced(k):
        kept = (loss, z1, h, k, error, w2_copy, error_sums, counters)
        each = [_gate_of_each(x, loss) if isinstance(x, Tensor) else float(x) for x in (alpha, eta, theta)]
        found: Tensor = triton_kernels("memory_mlp", k).backward_update_(kept, w, momentum, each, limit)
        torch.autograd.graph.increment_version((*w, *momentum))
        return found
    tensors = [_gate_of_each(gate, loss) if isinstance(gate, Tensor) else None for gate in gates.values()]
    fixed = [0.0 if isinstance(gate, Tensor) else float(gate) for gate in gates.values()]
    with torch.no_grad():
        norm: Tensor = _backward_update_(
            loss, z1, h, k, error, w2_copy, error_sums, counters, *w, *momentum, fixed, *tensors, limit
        )
    return norm


def _gate_of_each(gate: Tensor, loss: Tensor) -> Tensor:
    """A gate as the kernels read it: float32, one for each memory."""
    if gate.dtype == torch.float32 and gate.shape == loss.shape and gate.is_contiguous():
        return gate
    return gate.detach().float().expand(loss.shape).contiguous()


def _check_weights(
    name: str, k: Tensor, hidden: int, groups: Mapping[str, Sequence[Tensor]], *, overwritten: bool
) -> None:
    """Refuse weights that are not those of memories of this hidden width for `k` [..., N, D].

    A group's key begins the names of its arguments. What is `overwritten` has to be contiguous.
    """
    if k.ndim < 2:
        raise UserError(f"{name}: k is {list(k.shape)} and should be [..., N, D].")
    *memories, _, width = k.shape
    device = k.device
    shapes = ((*memories, hidden, width), (*memories, hidden), (*memories, width, hidden), (*memories, width))
    for prefix, weights in groups.items():
        for i, weight in enumerate(weights):
            if (
                weight.shape == shapes[i]
                and weight.dtype is torch.float32
                and weight.device == device
                and (not overwritten or weight.is_contiguous())
            ):
                continue  # all there is to say takes longer than to see that it is not needed
            which = prefix + MemoryWeights._fields[i]
            check_shape(name, which, weight, shapes[i], f"for k [..., N, D] = {list(k.shape)} and H = {hidden}")
            if weight.dtype != torch.float32 and not (weight.dtype == k.dtype == torch.float64):
                raise UserError(f"{name}: {which} is {dtype_name(weight.dtype)}; give float32.")
            if weight.device != device:
                raise UserError(f"{name}: {which} is on {weight.device} and k is on {device}; move both to one device.")
            if overwritten and not weight.is_contiguous():
                raise UserError(f"{name}: {which} is overwritten and not contiguous; give {which}.contiguous().")
