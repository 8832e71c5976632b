"""The choice of what computes a model: `auto` resolved, switches checked, and the functions behind them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from hrm.config import KernelsConfig, neighbours
from hrm.errors import UserError
from hrm.kernels import attention, naive
from hrm.kernels.backend import Backend, FirstTokenBlock, KernelRequest, ReasoningModule
from hrm.kernels.cores import WIDEST, WIDEST_IN_INT8, module_by_core, run_by_core
from hrm.kernels.naive import Attend
from hrm.kernels.recompute import recomputed
from hrm.kernels.registry import BACKENDS, backend_names, load_backend
from hrm.kernels.requirements import why_not_compiled, why_not_triton
from hrm.kernels.schedule import Run, chunked, looped

EIGHT_BIT = ("fp8", "int8")  # options of modules, computed by the file of that name


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


class EightBit(Protocol):
    """What `hrm.kernels.fp8` and `hrm.kernels.int8` have in common."""

    BLOCK_TYPES: Sequence[type]  # of weights that it computes

    def quantize_blocks(self, blocks: Sequence[Any]) -> Sequence[Any]:
        """Blocks as the modules below want them."""

    def module(self, *, compiled: bool, attend: Attend = naive.sdpa) -> ReasoningModule:
        """As `naive.reasoning_module` without gradient, through torch.compile where it gains by that."""


@dataclass(frozen=True)
class Kernels:
    """What computes a model."""

    config: KernelsConfig  # resolved: no `auto` in it
    module: ReasoningModule  # differentiable
    run: Run  # whole schedules without gradient
    first_token_block: FirstTokenBlock
    reset_carry: ResetCarry
    eight_bit: Mapping[str, EightBit] = field(default_factory=dict)  # modules that `run` computes in 8 bit, by name
    tensor_parallel: bool = False  # whether `parallel.tensor` can divide the blocks over processes

    def prepare(self, module: str, blocks: Sequence[Any]) -> Sequence[Any]:
        """The blocks of the module of that name as `run` wants them."""
        return self.eight_bit[module].quantize_blocks(blocks) if module in self.eight_bit else blocks


def resolve(config: KernelsConfig, request: KernelRequest) -> KernelsConfig:
    """The choice with every `auto` replaced by the fastest that computes what is asked for.

    Raises:
        UserError: a backend or a switch does not exist or cannot run there; the sentence gives the reason.
    """
    if config.backend == "auto":
        config = _fastest(config, request)
    if config.backend not in backend_names():
        raise UserError(f"kernels.backend={config.backend} is not one; {neighbours(config.backend, backend_names())}")
    backend = load_backend(config.backend)
    if reason := backend.reason_against(request):
        raise UserError(f"kernels.backend={config.backend} cannot run: {reason}; take kernels=naive.")
    if config.compile and not backend.compiles:
        raise UserError(
            f"kernels.compile=true cannot be combined with kernels.backend={config.backend}: drop one of them."
        )
    if config.compile and (reason := why_not_compiled(request)):
        raise UserError(f"kernels.compile=true cannot run on {request.device.type}: {reason}; take kernels=naive.")
    if config.cuda_graphs and request.device.type != "cuda":
        raise UserError(f"kernels.cuda_graphs=true needs an NVIDIA GPU, not {request.device.type}; take kernels=naive.")
    if config.fused_step and (reason := why_not_triton(request)):
        raise UserError(f"kernels.fused_step=true cannot run: {reason}; take kernels=naive.")
    _check_eight_bit(config, backend, request)
    # Cores that compile at the same time would compile the same several times over, beyond PyTorch's limit.
    by_core = config.by_core and backend.by_core and not config.compile and request.device.type == "cpu"
    return replace(config, attention=_resolve_attention(config, backend, request), by_core=by_core)


def _fastest(config: KernelsConfig, request: KernelRequest) -> KernelsConfig:
    """`kernels.backend=auto` replaced by the first backend that says of itself that it is the fastest."""
    if config.compile or config.cuda_graphs:
        raise UserError(
            "kernels.backend=auto chooses compile and cuda_graphs itself: name a backend too, or drop the switch."
        )
    backends = {name: load_backend(name) for name in backend_names(BACKENDS)}
    for name in sorted(backends, key=lambda name: -backends[name].priority):
        if backends[name].reason_against(request) is None:
            switches = backends[name].default(request)
            if switches is not None:
                return replace(config, backend=name, **switches)
    blocks = " and ".join(block.__name__ for block in request.block_types)
    raise UserError(f"no backend computes blocks of {blocks}: see docs/add-a-backend.md.")


def _check_eight_bit(config: KernelsConfig, backend: Backend, request: KernelRequest) -> None:
    for option in EIGHT_BIT:
        named = getattr(config, option)
        if not _named_modules(option, named, request.modules) and named == "none":
            continue
        known = _eight_bit(option).BLOCK_TYPES
        if unknown := [block.__name__ for block in request.block_types if block not in known]:
            raise UserError(f"kernels.{option}={named} cannot compute blocks of {' and '.join(unknown)}: drop it.")
        if not backend.eight_bit:
            others = [name for name in backend_names(BACKENDS) if load_backend(name).eight_bit]
            raise UserError(
                f"kernels.{option}={named} cannot be combined with kernels.backend={config.backend}: "
                f"take kernels.backend={' or '.join(others)}."
            )


def _eight_bit(option: str) -> EightBit:
    """What `kernels.fp8` or `kernels.int8` stands for."""
    return cast(EightBit, importlib.import_module(f"hrm.kernels.{option}"))


def _named_modules(option: str, named: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that `kernels.fp8` or `int8` names: `all`, or one by its name or the first part of that.

    Raises:
        UserError: there is none of that name.
    """
    if named == "none":
        return ()
    if named == "all":
        return modules
    found = tuple(name for name in modules if named in (name, name.partition("_")[0]))
    if not found:
        raise UserError(f"kernels.{option}={named} is not a choice; {neighbours(named, ['none', 'all', *modules])}")
    return found


def _resolve_attention(config: KernelsConfig, backend: Backend, request: KernelRequest) -> str:
    if not request.has_attention:
        if config.attention != "own":
            attention.check_name(config.attention)  # presets name one, which is of no use here
        return "own"
    if backend.takes_attention:
        return attention.choose(config.attention, request, compiled=config.compile)
    if config.attention not in ("auto", "own"):
        raise UserError(f"kernels.backend={config.backend} has an attention of its own: drop kernels.attention.")
    return "own"


def describe(config: KernelsConfig) -> str:
    """A resolved choice in a few words."""
    attend = [] if config.attention == "own" else [f"attention {config.attention}"]
    switches = [name for name in ("compile", "cuda_graphs", "fused_step", "by_core") if getattr(config, name)]
    chunk = [f"chunks of {config.chunk}"] if config.chunk else []
    eight_bit = [f"{option} in {named}" for option in EIGHT_BIT if (named := getattr(config, option)) != "none"]
    recompute = [f"recompute by {config.recompute}"] if config.recompute != "none" else []
    return ", ".join([config.backend, *attend, *switches, *chunk, *eight_bit, *recompute])


def make_kernels(config: KernelsConfig, modules: Sequence[str]) -> Kernels:
    """The functions behind a choice that `resolve` returned, for a model whose modules have these names."""
    backend = load_backend(config.backend)
    module, first_token_block = _functions(config.backend, config.attention, config.compile)
    eight_bit = {
        name: _eight_bit(option)
        for option in EIGHT_BIT
        for name in _named_modules(option, getattr(config, option), tuple(modules))
    }
    run: Run
    if eight_bit:
        # Compiled too where the kernels beside it are not: else one puzzle would be computed operation by operation.
        compiled = config.compile or (backend.compiles_definition and config.cuda_graphs)
        found = {
            name: in_8_bit.module(compiled=compiled, **_attend(config.attention))
            for name, in_8_bit in eight_bit.items()
        }
        run = looped(module, found)
    elif backend.run and (backend.compiles_definition or not config.compile):
        run = functools.partial(backend.run, **_attend(config.attention))
    else:
        run = looped(module)
    module = recomputed(module, config.recompute)
    if config.by_core:
        most = WIDEST if config.int8 == "none" else WIDEST_IN_INT8
        module, run = module_by_core(module), run_by_core(run, config.chunk, most)
    elif config.chunk:
        run = chunked(run, config.chunk)
    reset_carry: ResetCarry = naive.reset_carry
    if config.fused_step:
        from hrm.kernels.ops.triton import carry  # imported here: Triton is not everywhere

        reset_carry = carry.reset_carry
    return Kernels(
        config,
        module,
        run,
        first_token_block,
        reset_carry,
        eight_bit,
        tensor_parallel=backend.tensor_parallel and not config.compile,
    )


def tensor_parallel_backends() -> list[str]:
    """The names of the backends whose blocks `parallel.tensor` can divide over processes."""
    return [name for name in backend_names(BACKENDS) if load_backend(name).tensor_parallel]


def _attend(name: str) -> dict[str, Any]:
    """The argument that gives a backend's functions the attention of that resolved name; none where it is their own."""
    return {} if name == "own" else {"attend": attention.get(name)}


@functools.cache
def _functions(backend: str, attend: str, compiled: bool) -> tuple[ReasoningModule, FirstTokenBlock]:
    if compiled and load_backend(backend).compiles_definition:
        backend = "naive"
    reasoning_module: ReasoningModule = load_backend(backend).reasoning_module
    first_token_block = load_backend(backend).first_token_block
    reasoning_module = functools.partial(reasoning_module, **_attend(attend))
    if compiled:
        # Shapes are static within a run, so each gets code of its own. With fullgraph, too many of them (PyTorch's
        # limit is 8) are an error instead of a silent fall back to uncompiled code.
        reasoning_module = torch.compile(reasoning_module, dynamic=False, fullgraph=True)
        first_token_block = torch.compile(first_token_block, dynamic=False, fullgraph=True)
    return reasoning_module, first_token_block
