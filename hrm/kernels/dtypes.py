"""Which dtype a model computes in: the one it was made for, but where the processor would only imitate it."""

from __future__ import annotations

import os
import platform

import torch

AUTO = "auto"
_X86 = ("x86_64", "amd64", "i386", "i686")
# oneDNN's names of instruction sets with products of bfloat16; it can be told to use no better one than a name.
_WITH_BF16 = ("AVX2_VNNI_2", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX512_CORE_AMX", "DEFAULT", "ALL")


def has_bf16_matmul(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 by instructions of its own.

    A CPU without them (before AVX-512 BF16 and AMX on x86) converts every operand, and takes several times as long as
    in float32.
    """
    if device.type != "cpu":
        return True
    if platform.machine().lower() not in _X86:
        has_mkldnn = torch._C._has_mkldnn
        return bool(has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not limit.upper().startswith(_WITH_BF16):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def computing_dtype(wanted: str, made_for: str, device: torch.device) -> str:
    """The dtype to compute in, by its name.

    Args:
        wanted: a dtype, or auto.
        made_for: what the architecture says, `forward_dtype`.
    """
    if wanted != AUTO:
        return wanted
    in_16_bit = made_for in ("bfloat16", "float16")
    return "float32" if in_16_bit and not has_bf16_matmul(device) else made_for


def describe_dtype(dtype: str, made_for: str, device: torch.device) -> str:
    """A dtype in a few words, with the reason where it is not the one that the model is made for."""
    if dtype == made_for:
        return dtype
    imitated = dtype == "float32" and not has_bf16_matmul(device)
    return f"{dtype} (this CPU has no instructions for {made_for})" if imitated else f"{dtype} (not {made_for})"
