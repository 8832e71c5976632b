"""What the public operations share: the definition beside the function, the choice of implementation, the checks."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from hrm.errors import UserError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels read and write; they add up in float32."""

# Found once: torch.compile, which traces the choice, sees two constants.
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

P = ParamSpec("P")
R = TypeVar("R")


class Operation(Protocol[P, R]):
    """A function of the library, with its definition in plain PyTorch as `naive`."""

    naive: Callable[P, R]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def operation(naive: Callable[P, R]) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Decorator of a public function: makes it an `Operation` defined by `naive`, which has the same signature."""

    def attach(function: Callable[P, R]) -> Operation[P, R]:
        operation = cast("Operation[P, R]", function)
        operation.naive = naive
        return operation

    return attach


def runs_triton(tensor: Tensor) -> bool:
    """Whether kernels take `tensor`: on an NVIDIA GPU beside Triton, or on a CPU in Triton's interpreter."""
    return (_HAS_TRITON and tensor.is_cuda) or (_INTERPRETED and tensor.device.type == "cpu")


def is_traced(tensor: Tensor) -> bool:
    """Whether somebody writes down which operators are called on `tensor`: torch.compile, torch.export, a mode.

    Where nobody does and there is no gradient, kernels may be launched without their operator, which takes the host
    longer than the launch.
    """
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def triton_kernels(name: str, tensor: Tensor) -> ModuleType:
    """The file of kernels `hrm.kernels.ops.triton.<name>`, for an operator that was called on `tensor`.

    Raises:
        UserError: they cannot run there. Public functions do not come here: they run the definition instead.
    """
    if not runs_triton(tensor):
        raise UserError(f"torch.ops.hrm.{name} needs a CUDA tensor and Triton; call hrm.kernels.ops instead.")
    return _file_of_kernels(name)


@functools.cache
def _file_of_kernels(name: str) -> ModuleType:
    return importlib.import_module(f"hrm.kernels.ops.triton.{name}")


# ---- checks: each refuses bad arguments in one sentence that names the operation and the argument


def check_tensors(operation: str, **tensors: Tensor | None) -> None:
    """Refuse tensors, by the names of their arguments, unless all have one device and one dtype of `DTYPES`.

    Arguments that are None are left out.
    """
    first, *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    name, tensor = first
    if tensor.dtype not in DTYPES:
        raise UserError(
            f"{operation}: {name} is {dtype_name(tensor.dtype)}; give float32, float16 or bfloat16"
            f" ({operation}.naive takes others)."
        )
    for other, second in others:
        if second.dtype != tensor.dtype:
            raise UserError(
                f"{operation}: {other} is {dtype_name(second.dtype)} and {name} is {dtype_name(tensor.dtype)};"
                " give both one dtype."
            )
        if second.device != tensor.device:
            raise UserError(
                f"{operation}: {other} is on {second.device} and {name} is on {tensor.device}; move both to one device."
            )


def check_shape(operation: str, name: str, tensor: Tensor | None, shape: Sequence[int], reason: str) -> None:
    """Refuse an argument that has not `shape`; `reason` ends the sentence, as in "as x has" or "one for a column".

    None passes.
    """
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{operation}: {name} is {list(tensor.shape)} and should be {list(shape)}, {reason}.")


def check_rows(operation: str, x: Tensor) -> None:
    """Refuse an `x` that has no last dimension."""
    if x.ndim == 0:
        raise UserError(f"{operation}: x is []; give at least one dimension.")


def check_gain(operation: str, name: str, gain: Tensor | None, x: Tensor) -> None:
    """Refuse a weight or bias of a norm that is not [D] for x [..., D], in its dtype or float32, on its device."""
    if gain is None:
        return
    check_shape(operation, name, gain, x.shape[-1:], "one for each column of x")
    if gain.dtype not in (x.dtype, torch.float32):
        wanted = " or ".join(dict.fromkeys((dtype_name(x.dtype), "float32")))
        raise UserError(f"{operation}: {name} is {dtype_name(gain.dtype)}; give {wanted}.")
    if gain.device != x.device:
        raise UserError(f"{operation}: {name} is on {gain.device} and x is on {x.device}; move both to one device.")


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")
