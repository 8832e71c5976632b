"""A step of AdamW for many parameters in one launch.

Source: Loshchilov & Hutter 1711.05101, in the order of operations of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hrm.errors import UserError
from hrm.kernels.ops.operator import DTYPES, check_shape, dtype_name, operation, runs_triton, triton_kernels


def naive(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    copies: Sequence[Tensor] = (),
    found_inf: Tensor | None = None,
) -> None:
    count = step.double().clamp(min=1) if isinstance(step, Tensor) else step
    beta1, beta2 = betas
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        p, g, m, v = (tensor.detach().to(dtype) for tensor in tensors)
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        update = m / (v.sqrt() / (1 - beta2**count) ** 0.5 + eps)
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1**count) * update
        for tensor, new in zip((tensors[0], *tensors[2:]), (p, m, v), strict=True):
            kept = new if found_inf is None else torch.where(found_inf != 0, tensor.detach(), new)
            tensor.detach().copy_(kept)
        if copies:
            copies[i].copy_(tensors[0].detach())


# Numbers as float, or in a tensor that is given instead.
@torch.library.custom_op("hrm::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "copies"))
def _adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor | None,
    lr: Tensor | None,
    found_inf: Tensor | None,
    number: float,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    triton_kernels("adamw", params[0]).update_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        copies,
        step=step,
        lr=lr,
        found_inf=found_inf,
        number=number,
        rate=rate,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
    )


@_adamw_.register_fake
def _nothing(*arguments: object) -> None:
    pass


@operation(naive)
@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    copies: Sequence[Tensor] = (),
    found_inf: Tensor | None = None,
) -> None:
    """Update parameters and their moments in place, in one launch for each 64 of them, without waiting for the device.

    With gradients g, betas b1 and b2, at step t, in float32:

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g²
        p = (1 - lr weight_decay) p - lr / (1 - b1^t) · m / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: any shapes, all of one dtype: float32, bfloat16 or float16. Contiguous, like all that is written.
        grads: one for each of `params`, of its shape; all of one dtype. Those that are not contiguous are copied.
        exp_avgs: the first moments m, as `grads`.
        exp_avg_sqs: the second moments v, as `grads`.
        step: t, from 1; a number, or 0-dimensional on the device (as a CUDA graph needs it, to change between replays).
        lr: the learning rate, likewise; float64 on the device keeps all digits.
        copies: one for each of `params`, of its shape, all of one dtype; the new parameters are written there too.
        found_inf: 0-dimensional; when not 0, all stays as it is and the copies are of that.

    Raises:
        UserError: the lists do not fit together, dtypes or devices differ, or what is to be written is not contiguous.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, copies)
    if not params:
        return
    if not runs_triton(params[0]):
        naive(
            params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, copies=copies, found_inf=found_inf
        )
        return
    step_on_device, number = (step, 1.0) if isinstance(step, Tensor) else (None, float(step))
    lr_on_device, rate = (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))
    _adamw_(
        list(params),
        [grad.contiguous() for grad in grads],
        list(exp_avgs),
        list(exp_avg_sqs),
        list(copies),
        step_on_device,
        lr_on_device,
        found_inf,
        number,
        rate,
        *betas,
        eps,
        weight_decay,
    )


def _check(params: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    names = ("grads", "exp_avgs", "exp_avg_sqs", "copies")
    lists = {"params": params, **dict(zip(names, others, strict=True))}
    for name, tensors in lists.items():
        if name == "copies" and not tensors:
            continue
        if len(tensors) != len(params):
            raise UserError(f"adamw_: {name} are {len(tensors)} and params {len(params)}; give one for each.")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            this = f"{name}[{i}]"
            check_shape("adamw_", this, tensor, param.shape, f"as params[{i}]")
            if tensor.dtype not in DTYPES:
                raise UserError(f"adamw_: {this} is {dtype_name(tensor.dtype)}; give float32, float16 or bfloat16.")
            if tensor.dtype != tensors[0].dtype:
                raise UserError(
                    f"adamw_: {this} is {dtype_name(tensor.dtype)} and {name}[0] is {dtype_name(tensors[0].dtype)};"
                    " give all one dtype."
                )
            if tensor.device != params[0].device:
                raise UserError(
                    f"adamw_: {this} is on {tensor.device} and params[0] on {params[0].device}; move all to one device."
                )
            if name != "grads" and not tensor.is_contiguous():
                raise UserError(f"adamw_: {this} is not contiguous and is to be written; give a contiguous one.")
