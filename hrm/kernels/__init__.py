"""The maths of a reasoning module, once per backend.

A backend is a function with the signature and the meaning of `naive.reasoning_module`. To add one, write a file with
such a function, name it in `BACKENDS`, and add a preset to `config/kernels/`.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hrm.config import KernelsConfig, neighbours
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.naive import BlockWeights, RotaryTables


class ReasoningModule(Protocol):
    """See `hrm.kernels.naive.reasoning_module`."""

    def __call__(
        self,
        state: Tensor,
        injection: Tensor,
        blocks: Sequence[BlockWeights],
        rotary: RotaryTables | None,
        num_heads: int,
        eps: float,
    ) -> Tensor: ...


BACKENDS: dict[str, ReasoningModule] = {"naive": naive.reasoning_module}


def resolve(config: KernelsConfig, device: torch.device) -> KernelsConfig:
    """The choice with `auto` replaced by the fastest backend and switches that run on `device`.

    Raises:
        UserError: a switch is set beside `auto`.
    """
    if config.backend != "auto":
        return config
    if config.compile or config.cuda_graphs:
        raise UserError("kernels=auto chooses every switch itself: set kernels.backend too, or drop the switch.")
    fast = device.type == "cuda" and _why_not_compiled(device) is None
    return KernelsConfig(backend="naive", compile=fast, cuda_graphs=device.type == "cuda")


def make_reasoning_module(config: KernelsConfig, device: torch.device) -> ReasoningModule:
    """The function that computes reasoning modules under `config` on `device`.

    Raises:
        UserError: the backend does not exist, or cannot run here; the sentence gives the reason.
    """
    config = resolve(config, device)
    if config.backend not in BACKENDS:
        raise UserError(f"kernels.backend={config.backend} is not one; {neighbours(config.backend, BACKENDS)}")
    if config.cuda_graphs and device.type != "cuda":
        raise UserError(f"kernels.cuda_graphs=true needs an NVIDIA GPU, not {device.type}; take kernels=naive.")
    backend = BACKENDS[config.backend]
    if not config.compile:
        return backend
    if reason := _why_not_compiled(device):
        raise UserError(f"kernels.compile=true cannot run on {device.type}: {reason}; take kernels=naive.")
    return _compiled(config.backend)


@functools.cache
def _compiled(backend: str) -> ReasoningModule:
    # Shapes are static within a run, so each gets code of its own. With fullgraph, too many of them (PyTorch's limit
    # is 8) are an error instead of a silent fall back to uncompiled code.
    compiled: ReasoningModule = torch.compile(BACKENDS[backend], dynamic=False, fullgraph=True)
    return compiled


def _why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks for `device`, or None."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if device.type == "cpu":
        return None if shutil.which("c++") or shutil.which("g++") or shutil.which("cl") else "there is no C++ compiler"
    return "torch.compile is not supported there"
