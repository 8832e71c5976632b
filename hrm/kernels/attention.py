"""The core of attention, between its two projections, by one interface: PyTorch's, FlashAttention's packages, our own.

A provider is a function of the signature and meaning of `hrm.kernels.naive.sdpa`, named in `PROVIDERS`. Packages are
imported when they are asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from hrm.config import neighbours
from hrm.config.paths import install_hint
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.backend import KernelRequest, runs_anywhere
from hrm.kernels.naive import Attend, RotaryTables
from hrm.kernels.ops.hopper import device as hopper
from hrm.kernels.requirements import why_not_triton_attention


class Provider(NamedTuple):
    load: Callable[[], Attend]
    why_not: Callable[[KernelRequest], str | None]  # the reason why it cannot run there, or None
    compiles: bool = True  # whether torch.compile can take it into a graph


# ---- PyTorch's


def _restricted_to(backend: SDPBackend) -> Attend:
    def attend(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
        with sdpa_kernel(backend):
            return naive.sdpa(qkv, rotary, num_heads)

    return attend


def _why_not_flash(request: KernelRequest) -> str | None:
    if request.device.type == "cpu":
        return None
    return _why_not_on_cuda(request, can_use_flash_attention)


def _why_not_cudnn(request: KernelRequest) -> str | None:
    return _why_not_on_cuda(request, can_use_cudnn_attention)


def _why_not_on_cuda(request: KernelRequest, can_use: Callable[[SDPAParams], bool]) -> str | None:
    if request.device.type != "cuda":
        return f"it needs an NVIDIA GPU, not {request.device.type}"
    heads = torch.empty(
        1, 1, request.num_tokens, request.head_size, dtype=request.dtype, device=request.device, requires_grad=True
    )
    if can_use(SDPAParams(heads, heads, heads, None, 0.0, False, False)):
        return None
    device = torch.cuda.get_device_name(request.device)
    return f"PyTorch has no such kernel on {device} for heads of {request.head_size} in {_name(request.dtype)}"


# ---- the packages'


class _Package(NamedTuple):
    """A module with `flash_attn_func`, and what its kernels were written for."""

    module: str
    install: str  # how to get it
    capabilities: range  # major numbers
    largest_head: int

    def load(self) -> Attend:
        flash_attn_func = importlib.import_module(self.module).flash_attn_func

        def attend(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
            q, k, v = (heads.transpose(1, 2) for heads in naive.split_heads(qkv, rotary, num_heads))
            mixed: Tensor = flash_attn_func(q, k, v, deterministic=True)
            return mixed.flatten(2)

        return attend

    def why_not(self, request: KernelRequest) -> str | None:
        if request.device.type != "cuda":
            return f"it needs an NVIDIA GPU, not {request.device.type}"
        if not is_installed(self.module):
            return f"{self.module} is not installed ({self.install})"
        if request.dtype not in (torch.bfloat16, torch.float16):
            return f"it computes in bfloat16 and float16, not {_name(request.dtype)}"
        if request.head_size % 8 or request.head_size > self.largest_head:
            return f"it has kernels for heads of 8, 16 and so on to {self.largest_head}, not {request.head_size}"
        major, minor = torch.cuda.get_device_capability(request.device)
        if major not in self.capabilities:
            return f"it has no kernels for compute capability {major}.{minor}"
        return None


def _load_fa4() -> Attend:
    """FlashAttention 4, and a kernel that rotates from the package quack, which it needs itself."""
    from flash_attn.cute import flash_attn_func
    from quack.rotary import apply_rotary_emb

    def attend(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, num_heads, -1).unbind(2)
        if rotary is not None:
            cos, sin = (table.chunk(2, dim=-1)[0] for table in rotary)  # its halves are alike, and quack wants one
            q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        mixed: Tensor = flash_attn_func(q, k, v, deterministic=True)[0]  # the rows' normalisers come second
        return mixed.flatten(2)

    return attend


def is_installed(module: str) -> bool:
    """Whether `module`, given with its packages, can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that holds it
        return False


# ---- ours


def _load_triton() -> Attend:
    from hrm.kernels.ops.triton.attention import attention

    return attention


def _load_gluon() -> Attend:
    from hrm.kernels.ops.triton.attention import attention

    return functools.partial(attention, gluon=True)


def _why_not_gluon(request: KernelRequest) -> str | None:
    if not request.positions_in_row:  # its kernel carries angles on from token to token
        return "its kernels rotate by positions in a row, not by rows and columns"
    return why_not_triton_attention(request) or hopper.why_not(request.device)


# ---- the choice

# FlashAttention 2 leaves its folder to others' modules too, so that only an inner module tells that it is there.
_FA2 = _Package("flash_attn.flash_attn_interface", "pip install flash-attn", range(8, 13), 256)
_FA3 = _Package("flash_attn_interface", "from the folder hopper of FlashAttention's repository", range(9, 10), 256)
_FA4 = _Package("flash_attn.cute", install_hint("cute"), range(9, 13), 128)

PROVIDERS = {
    "sdpa": Provider(lambda: naive.sdpa, runs_anywhere),
    "flash": Provider(lambda: _restricted_to(SDPBackend.FLASH_ATTENTION), _why_not_flash),
    "cudnn": Provider(lambda: _restricted_to(SDPBackend.CUDNN_ATTENTION), _why_not_cudnn),
    "math": Provider(lambda: _restricted_to(SDPBackend.MATH), runs_anywhere),
    "fa2": Provider(_FA2.load, _FA2.why_not, compiles=False),
    "fa3": Provider(_FA3.load, _FA3.why_not, compiles=False),
    "fa4": Provider(_load_fa4, _FA4.why_not, compiles=False),
    "triton": Provider(_load_triton, why_not_triton_attention),
    "gluon": Provider(_load_gluon, _why_not_gluon),  # as triton, but forward by kernels for Hopper where they pay
}

# The fastest first by compute capability, for short and long sequences, forward and backward, compiled or not:
# benchmarks/results/reports/2026-11-22-attention.md. Where nothing was measured, PyTorch chooses.
_FASTEST = {(9, 0): ("gluon", "triton")}


def choose(name: str, request: KernelRequest, *, compiled: bool = False) -> str:
    """The provider that `name` stands for, with `auto` replaced by the fastest that runs.

    Args:
        compiled: whether torch.compile is to take it into its graph.

    Raises:
        UserError: there is no such provider or it cannot run there; the sentence gives the reason.
    """
    if name == "auto":
        if request.device.type != "cuda":
            return "sdpa"
        fastest = _FASTEST.get(torch.cuda.get_device_capability(request.device), ())
        return next((name for name in fastest if not _why_not(name, request, compiled)), "sdpa")
    check_name(name)
    if reason := _why_not(name, request, compiled):
        raise UserError(f"kernels.attention={name} cannot run: {reason}; take kernels.attention=auto.")
    return name


def check_name(name: str) -> None:
    """Refuse what is neither a provider nor `auto`, by a UserError."""
    if name not in ("auto", *PROVIDERS):
        raise UserError(f"kernels.attention={name} is not one; {neighbours(name, ['auto', *PROVIDERS])}")


@functools.cache
def get(name: str) -> Attend:
    """The function behind a name that `choose` returned: differentiable, with the rotation inside."""
    return PROVIDERS[name].load()


def _why_not(name: str, request: KernelRequest, compiled: bool) -> str | None:
    provider = PROVIDERS[name]
    if compiled and not provider.compiles:
        return "torch.compile cannot take it into its graph (kernels.compile=true)"
    return provider.why_not(request)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
