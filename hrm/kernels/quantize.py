"""The option `quantize`: passes without gradient in 8 bit, where the device has instructions for that."""

from __future__ import annotations

from dataclasses import replace

import torch

from hrm.config import KernelsConfig
from hrm.config.checks import choice
from hrm.config.entry import QUANTIZE
from hrm.errors import UserError
from hrm.kernels.dtypes import AUTO

_FP8_FROM = (8, 9)  # compute capability, Ada and Hopper
_INT8_FROM = (7, 5)


def quantized(kernels: KernelsConfig, quantize: str, device: torch.device) -> KernelsConfig:
    """The choice of kernels with all modules in the precision that `quantize`, one of `QUANTIZE`, names.

    Raises:
        UserError: it is unknown, or the device cannot compute so.
    """
    choice("quantize", quantize, QUANTIZE)
    if quantize == "none":
        return kernels
    if reason := why_not_quantized(quantize, device):
        raise UserError(f"quantize={quantize} cannot run: {reason}.")
    return replace(kernels, int8="all") if quantize == "int8" else replace(kernels, fp8="all")


def why_not_quantized(quantize: str, device: torch.device) -> str | None:
    """Why a device cannot compute in int8 or fp8, as the end of a sentence, or None."""
    least = _FP8_FROM if quantize == "fp8" else _INT8_FROM
    if device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found >= least:
            return None
        here = "this GPU has {}.{}".format(*found)
    elif device.type == "cpu" and quantize == "int8":
        return None
    else:
        here = f"this is {device.type}"
    wanted = "an NVIDIA GPU of compute capability {}.{} or later".format(*least)
    if quantize == "fp8":
        return f"it needs {wanted} (Ada, Hopper), and {here}; take quantize=int8 or none"
    return f"it needs a CPU or {wanted}, and {here}; take quantize=none"


def dtype_beside(quantize: str, dtype: str, device: torch.device) -> str:
    """What else is computed in where `dtype` is auto: on a CPU, integers become float32 faster than bfloat16."""
    return "float32" if dtype == AUTO and quantize == "int8" and device.type == "cpu" else dtype
