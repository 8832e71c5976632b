"""The maths of a reasoning module, once per backend, and the choice between them.

A backend is a module of this package with two functions of the signature and meaning of those in `naive`:
`reasoning_module` and `first_token_block`. To add one, write such a file, name it in `BACKENDS`, and add a preset to
`config/kernels/`. What may be combined with a backend, and leaves the maths alone, are switches of
`hrm.config.KernelsConfig`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hrm.config import KernelsConfig, neighbours
from hrm.errors import UserError
from hrm.kernels import attention, naive
from hrm.kernels.context import KernelContext
from hrm.kernels.naive import Attend, BlockWeights
from hrm.kernels.schedule import Module, Run, chunked, looped

ReasoningModule: TypeAlias = Module[BlockWeights]


class FirstTokenBlock(Protocol):
    """See `hrm.kernels.naive.first_token_block`."""

    def __call__(self, x: Tensor, weights: BlockWeights, context: KernelContext) -> Tensor: ...


class ResetCarry(Protocol):
    """See `hrm.kernels.naive.reset_carry`."""

    def __call__(
        self,
        states: Mapping[str, Tensor],
        initial: Mapping[str, Tensor],
        halted: Tensor,
        steps: Tensor,
        data: Mapping[str, Tensor],
        fresh: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Kernels:
    """What computes a model."""

    config: KernelsConfig  # resolved: no `auto` in it
    module: ReasoningModule  # differentiable
    run: Run  # whole schedules without gradient
    first_token_block: FirstTokenBlock
    reset_carry: ResetCarry
    fp8_modules: frozenset[str] = frozenset()  # by name, those that `run` computes in 8 bit

    def prepare(self, module: str, blocks: Sequence[BlockWeights]) -> Sequence[Any]:
        """The blocks of the module of that name as `run` wants them."""
        if module not in self.fp8_modules:
            return blocks
        from hrm.kernels.backends import fp8

        return fp8.quantize_blocks(blocks)


class Place(NamedTuple):
    """Where and on what reasoning modules are to run."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    head_size: int
    rotary: bool = True
    num_tokens: int = 82  # of a sequence, the puzzle prefix included
    batch_size: int = 384  # sequences on this rank
    width: int = 512  # hidden size
    mlp_t: bool = False  # tokens are mixed by an MLP over them
    modules: tuple[str, ...] = ()  # names of the modules that hold the blocks


class Backend(NamedTuple):
    """A module of this package, imported when it is asked for."""

    module: str
    why_not: Callable[[Place], str | None]  # the reason why it cannot run there, or None
    run: str | None = None  # a module whose function `run` computes whole schedules without gradient
    takes_attention: bool = False  # whether its functions have an argument `attend`
    compiles: bool = True  # whether torch.compile can take it into a graph
    fp8: bool = True  # whether passes without gradient can be taken over by `fp8`


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
    return None


def _why_not_triton_blocks(place: Place) -> str | None:
    if reason := _why_not_triton(place):
        return reason
    if place.mlp_t:
        return "its kernels mix tokens by attention, not by arch.mlp_t's MLP"
    if place.head_size not in (16, 32, 64, 128):
        return f"it has kernels for heads of 16, 32, 64 and 128, not {place.head_size}"
    return None


def _is_measured(place: Place) -> bool:
    """Whether our kernels were run and found faster there: on Hopper."""
    return torch.cuda.get_device_capability(place.device) == (9, 0)


def _why_not_cute(place: Place) -> str | None:
    from hrm.kernels.experimental import cute as cute_module

    return cute_module.why_not(place)


BACKENDS = {
    "naive": Backend("hrm.kernels.naive", _anywhere, takes_attention=True),
    "triton": Backend(
        "hrm.kernels.backends.triton",
        _why_not_triton_blocks,
        run="hrm.kernels.backends.triton",
        takes_attention=True,
    ),
    "triton_unrolled": Backend(
        "hrm.kernels.backends.triton",
        _why_not_triton_blocks,
        run="hrm.kernels.experimental.triton_unrolled",
        fp8=False,
    ),
    "head_parallel": Backend("hrm.kernels.experimental.head_parallel", _why_not_triton_blocks),
    "cute": Backend("hrm.kernels.experimental.cute", _why_not_cute, compiles=False),
}


def resolve(config: KernelsConfig, place: Place) -> KernelsConfig:
    """The choice with every `auto` replaced by the fastest that runs at `place`.

    Raises:
        UserError: a backend or a switch does not exist or cannot run there; the sentence gives the reason.
    """
    on_cuda = place.device.type == "cuda"
    if config.backend == "auto":
        if config.compile or config.cuda_graphs:
            raise UserError(
                "kernels.backend=auto chooses compile and cuda_graphs itself: name a backend too, or drop the switch."
            )
        is_measured = on_cuda and _why_not_triton(place) is None and _is_measured(place)
        if is_measured and place.rotary and _why_not_triton_blocks(place) is None:
            config = replace(config, backend="triton", cuda_graphs=True, fused_step=True)
        else:
            compiled = on_cuda and _why_not_compiled(place) is None
            fused = is_measured and place.mlp_t
            config = replace(config, backend="naive", compile=compiled, cuda_graphs=on_cuda, fused_step=fused)
    if config.backend not in BACKENDS:
        raise UserError(f"kernels.backend={config.backend} is not one; {neighbours(config.backend, BACKENDS)}")
    backend = BACKENDS[config.backend]
    if reason := backend.why_not(place):
        raise UserError(f"kernels.backend={config.backend} cannot run: {reason}; take kernels=naive.")
    if config.compile and not backend.compiles:
        raise UserError(f"kernels.compile=true does not go with kernels.backend={config.backend}: drop one of them.")
    if config.compile and (reason := _why_not_compiled(place)):
        raise UserError(f"kernels.compile=true cannot run on {place.device.type}: {reason}; take kernels=naive.")
    if config.cuda_graphs and not on_cuda:
        raise UserError(f"kernels.cuda_graphs=true needs an NVIDIA GPU, not {place.device.type}; take kernels=naive.")
    if config.fused_step and (reason := _why_not_triton(place)):
        raise UserError(f"kernels.fused_step=true cannot run: {reason}; take kernels=naive.")
    if config.fp8 != "none" and place.mlp_t:
        raise UserError(f"kernels.fp8={config.fp8} does not go with arch.mlp_t=true: drop it.")
    if config.fp8 != "none" and not backend.fp8:
        raise UserError(f"kernels.fp8={config.fp8} does not go with kernels.backend={config.backend}: take triton.")
    _fp8_modules(config.fp8, place.modules)  # refuses names that are none
    return replace(config, attention=_resolve_attention(config, backend, place))


def _fp8_modules(fp8: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that `kernels.fp8` names: `all`, or one by its name or the first part of that."""
    if fp8 == "none":
        return ()
    if fp8 == "all":
        return modules
    named = tuple(name for name in modules if fp8 in (name, name.partition("_")[0]))
    if not named:
        raise UserError(f"kernels.fp8={fp8} is not a choice; {neighbours(fp8, ['none', 'all', *modules])}")
    return named


def _resolve_attention(config: KernelsConfig, backend: Backend, place: Place) -> str:
    if place.mlp_t:
        if config.attention != "own":
            attention.check_name(config.attention)  # presets name one, which is of no use here
        return "own"
    if backend.takes_attention:
        return attention.choose(config.attention, place, compiled=config.compile)
    if config.attention not in ("auto", "own"):
        raise UserError(f"kernels.backend={config.backend} has an attention of its own: drop kernels.attention.")
    return "own"


def describe(config: KernelsConfig) -> str:
    """A resolved choice in a few words."""
    attend = [] if config.attention == "own" else [f"attention {config.attention}"]
    switches = [name for name in ("compile", "cuda_graphs", "fused_step") if getattr(config, name)]
    chunk = [f"chunks of {config.chunk}"] if config.chunk else []
    fp8 = [f"fp8 in {config.fp8}"] if config.fp8 != "none" else []
    return ", ".join([config.backend, *attend, *switches, *chunk, *fp8])


def make_kernels(config: KernelsConfig, modules: Sequence[str]) -> Kernels:
    """The functions behind a choice that `resolve` returned, for a model whose modules have these names."""
    module, first_token_block = _load(config.backend, config.attention, config.compile)
    fp8_modules = _fp8_modules(config.fp8, tuple(modules))
    backend = BACKENDS[config.backend]
    run: Run
    if backend.run and not fp8_modules and not config.compile:
        run = functools.partial(importlib.import_module(backend.run).run, **_attend(config.attention))
    elif fp8_modules:
        from hrm.kernels.backends import fp8

        run = looped(module, dict.fromkeys(fp8_modules, fp8.reasoning_module))
    else:
        run = looped(module)
    if config.chunk:
        run = chunked(run, config.chunk)
    elif config.backend == "naive" and not config.compile:
        run = chunked(run)
    reset_carry: ResetCarry = naive.reset_carry
    if config.fused_step:
        reset_carry = importlib.import_module("hrm.kernels.ops.triton.carry").reset_carry
    return Kernels(config, module, run, first_token_block, reset_carry, frozenset(fp8_modules))


def _attend(name: str) -> dict[str, Attend]:
    """The argument that gives a backend's functions the attention of that resolved name; none where it is their own."""
    return {} if name == "own" else {"attend": attention.get(name)}


@functools.cache
def _load(backend: str, attend: str, compiled: bool) -> tuple[ReasoningModule, FirstTokenBlock]:
    module = importlib.import_module(BACKENDS[backend].module)
    reasoning_module, first_token_block = module.reasoning_module, module.first_token_block
    reasoning_module = functools.partial(reasoning_module, **_attend(attend))
    if compiled:
        # Shapes are static within a run, so each gets code of its own. With fullgraph, too many of them (PyTorch's
        # limit is 8) are an error instead of a silent fall back to uncompiled code.
        reasoning_module = torch.compile(reasoning_module, dynamic=False, fullgraph=True)
        first_token_block = torch.compile(first_token_block, dynamic=False, fullgraph=True)
    return reasoning_module, first_token_block


def _why_not_compiled(place: Place) -> str | None:
    """What torch.compile lacks on a device, or None."""
    if place.device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    if place.device.type == "cpu":
        return None if shutil.which("c++") or shutil.which("g++") or shutil.which("cl") else "there is no C++ compiler"
    return "torch.compile is not supported there"
