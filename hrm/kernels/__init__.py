"""The maths of a reasoning module, once per backend.

A backend is a function with the signature and the meaning of `naive.reasoning_module`. To add one, write a file with
such a function, name it in `BACKENDS`, and add a preset to `config/kernels/`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hrm.config import KernelsConfig, neighbours
from hrm.errors import UserError
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


class Place(NamedTuple):
    """Where and on what a reasoning module is to run."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    head_size: int
    rotary: bool = True


class Backend(NamedTuple):
    """A module of this package with a function `reasoning_module`, imported when it is asked for."""

    module: str
    why_not: Callable[[Place], str | None]  # the reason why it cannot run there, or None


def _anywhere(place: Place) -> str | None:
    return None


def _why_not_triton(place: Place) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if place.device.type != "cuda" and not interpreted:
        return f"Triton needs an NVIDIA GPU, not {place.device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if place.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it has no kernels for {str(place.dtype).removeprefix('torch.')}"
    if place.head_size not in (16, 32, 64, 128):
        return f"it has kernels for heads of 16, 32, 64 and 128, not {place.head_size}"
    return None


def _is_measured(place: Place) -> bool:
    """Whether the Triton backend was run and found faster there: on Hopper, with rotary positions."""
    return place.rotary and torch.cuda.get_device_capability(place.device) == (9, 0)


BACKENDS = {
    "naive": Backend("hrm.kernels.naive", _anywhere),
    "triton": Backend("hrm.kernels.triton_module", _why_not_triton),
}


def resolve(config: KernelsConfig, place: Place) -> KernelsConfig:
    """The choice with `auto` replaced by the fastest backend and switches that run at `place`.

    Raises:
        UserError: a backend or a switch does not exist or cannot run there; the sentence gives the reason.
    """
    on_cuda = place.device.type == "cuda"
    if config.backend == "auto":
        if config.compile or config.cuda_graphs:
            raise UserError("kernels=auto chooses every switch itself: set kernels.backend too, or drop the switch.")
        if on_cuda and _why_not_triton(place) is None and _is_measured(place):
            return KernelsConfig("triton", cuda_graphs=True)
        return KernelsConfig("naive", compile=on_cuda and _why_not_compiled(place) is None, cuda_graphs=on_cuda)
    if config.backend not in BACKENDS:
        raise UserError(f"kernels.backend={config.backend} is not one; {neighbours(config.backend, BACKENDS)}")
    if reason := BACKENDS[config.backend].why_not(place):
        raise UserError(f"kernels.backend={config.backend} cannot run: {reason}; take kernels=naive.")
    if config.compile and (reason := _why_not_compiled(place)):
        raise UserError(f"kernels.compile=true cannot run on {place.device.type}: {reason}; take kernels=naive.")
    if config.cuda_graphs and not on_cuda:
        raise UserError(f"kernels.cuda_graphs=true needs an NVIDIA GPU, not {place.device.type}; take kernels=naive.")
    return config


@functools.cache
def _load(backend: str, compiled: bool) -> ReasoningModule:
    module: ReasoningModule = importlib.import_module(BACKENDS[backend].module).reasoning_module
    # Shapes are static within a run, so each gets code of its own. With fullgraph, too many of them (PyTorch's limit
    # is 8) are an error instead of a silent fall back to uncompiled code.
    return torch.compile(module, dynamic=False, fullgraph=True) if compiled else module


def make_reasoning_module(config: KernelsConfig) -> ReasoningModule:
    """The function that computes reasoning modules under a choice that `resolve` returned."""
    return _load(config.backend, config.compile)


def _why_not_compiled(place: Place) -> str | None:
    """What torch.compile lacks on a device, or None."""
    if place.device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if place.device.type == "cpu":
        return None if shutil.which("c++") or shutil.which("g++") or shutil.which("cl") else "there is no C++ compiler"
    return "torch.compile is not supported there"
