"""What several backends need: each function gives the reason why it is not there, as the end of a sentence, or None."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from hrm.kernels.backend import KernelRequest


def why_not_triton(request: KernelRequest) -> str | None:
    """Kernels in Triton that know no heads: in 16 or 32 bit, on an NVIDIA GPU or in the interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.device.type != "cuda" and not interpreted:
        return f"Triton needs an NVIDIA GPU, not {request.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if request.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no kernels for {str(request.dtype).removeprefix('torch.')}"
    return None


def why_not_triton_attention(request: KernelRequest) -> str | None:
    """Kernels of attention in Triton, for the sizes of heads that they know."""
    if reason := why_not_triton(request):
        return reason
    if request.head_size not in (16, 32, 64, 128):
        return f"it has kernels for heads of 16, 32, 64 and 128, not {request.head_size}"
    return None


def why_not_compiled(request: KernelRequest) -> str | None:
    """What torch.compile lacks on the device."""
    return why_no_inductor(request.device)


def why_no_inductor(device: torch.device) -> str | None:
    """What the compiler behind torch.compile and AOTInductor lacks on a device."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if device.type == "cpu":
        return None if shutil.which("c++") or shutil.which("g++") or shutil.which("cl") else "there is no C++ compiler"
    return "torch.compile is not supported there"


def is_hopper(device: torch.device) -> bool:
    """Whether it is one of NVIDIA's Hopper GPUs. (Some of AMD's have the same number.)"""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def is_measured(request: KernelRequest) -> bool:
    """Whether our kernels run on the device and were found faster there than torch.compile: on Hopper GPUs."""
    return is_hopper(request.device) and why_not_triton(request) is None
