"""Rows of `memory_mlp_forward_loss` and `memory_mlp_backward_update_`: one update of a Titans memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from benchmarks.ops.row import Bar, Call, Row, Work, compiled, plain, random
from hrm.kernels.ops import MemoryWeights, memory_mlp_backward_update_, memory_mlp_forward_loss

BAR = Bar(times_rival=3.0, rivals=("torch.func, compile",))
MAX_GRAD_NORM = 1.0


def rows(toy: bool) -> Iterator[Row]:
    # The interpreter's matmul misreads bfloat16.
    tokens, width, dtype, suffix = (64, 32, torch.float32, " float32") if toy else (2048, 512, torch.bfloat16, "")
    weights = 2 * width * width + 2 * width
    # Two products forward and three backward; keys and values, and weights and momentum both ways.
    for way in ("from a graph", "from Python"):
        yield Row(
            f"N {tokens}, D = H = {width}{suffix}, {way}",
            "step",
            partial(_work, tokens, width, dtype),
            BAR,
            bytes=2 * tokens * width * dtype.itemsize + 4 * weights * 4,
            flops=5 * 2 * tokens * width * width,
            from_python=way == "from Python",
        )


def by_torch_func(
    k: Tensor, v: Tensor, w: MemoryWeights, momentum: MemoryWeights, alpha: Tensor, eta: Tensor, theta: Tensor
) -> Tensor:
    """The same update by `torch.func`, matmuls in the dtype of `k`, guarded on the device too."""

    def loss_of(w: tuple[Tensor, ...]) -> Tensor:
        w1, b1, w2, b2 = (weight.to(k.dtype) for weight in w)
        y = F.linear(F.silu(F.linear(k, w1, b1)), w2, b2)
        return (y.float() - v.float()).square().mean()

    grads, loss = grad_and_value(loss_of)(tuple(w))
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    is_finite = (loss + norm + alpha + eta + theta).isfinite()
    rate = theta * (MAX_GRAD_NORM / norm.clamp(min=MAX_GRAD_NORM))
    for weight, moment, grad in zip(w, momentum, grads, strict=True):
        new_moment = eta * moment - rate * grad
        new_weight = (1 - alpha) * weight + new_moment
        moment.copy_(torch.where(is_finite, new_moment, moment))
        weight.copy_(torch.where(is_finite, new_weight, weight))
    return loss  # type: ignore[no-any-return]


def by_kernels(
    k: Tensor, v: Tensor, w: MemoryWeights, momentum: MemoryWeights, alpha: Tensor, eta: Tensor, theta: Tensor
) -> Tensor:
    saved = memory_mlp_forward_loss(k, v, *w)
    memory_mlp_backward_update_(saved, w, momentum, alpha, eta, theta, MAX_GRAD_NORM)
    return saved.loss


def _work(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Work:
    k, v = (random(device, tokens, width, dtype=dtype).detach() for _ in range(2))

    def group(scale: float) -> MemoryWeights:
        shapes = ((width, width), (width,), (width, width), (width,))
        return MemoryWeights(*(random(device, *shape, scale=scale, dtype=torch.float32).detach() for shape in shapes))

    gates = [torch.tensor(gate, device=device) for gate in (0.01, 0.9, 0.1)]

    def call_of(function: Callable[..., Tensor]) -> Call:
        return partial(function, k, v, group(width**-0.5), group(0.0), *gates)

    def rival(make: Callable[[], Callable[..., Tensor]]) -> Callable[[], Call]:
        return lambda: call_of(make())

    rivals = {"torch.func": rival(plain(by_torch_func)), "torch.func, compile": rival(compiled(by_torch_func))}
    return Work(call_of(by_kernels), rivals)
