"""Options of the kernels: the group `kernels`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from hrm.config.checks import at_least, choice, neighbours
from hrm.config.paths import choices_of
from hrm.config.typed import to_typed
from hrm.errors import UserError

RECOMPUTES = ("none", "block", "module")


@dataclass
class KernelsConfig:
    """How reasoning modules are computed: which backend, and execution choices that leave the maths alone."""

    backend: str = "naive"  # a file of hrm/kernels/backends or experimental, or auto: the fastest, and its switches
    attention: str = "auto"  # a name in hrm.kernels.attention.PROVIDERS, or auto: the fastest measured
    compile: bool = False  # pass the backend through torch.compile
    cuda_graphs: bool = False  # launch whole training and evaluation steps at once (NVIDIA); see parallel.cuda_graphs
    fused_step: bool = False  # optimizers, loss, casts and carry as a kernel each, in Triton (NVIDIA)
    by_core: bool = True  # on a CPU, let each core work on sequences of its own, not all on every operation
    chunk: int = 0  # sequences at a time where no gradient is needed, to stay in the cache; 0: all, by core a few
    fp8: str = "none"  # modules whose passes without gradient are computed in 8 bit (e4m3): none, all, or one's name
    int8: str = "none"  # the same in 8-bit integers
    # Activation checkpointing, what training keeps for its backward pass, which computes the rest again. none: all that
    # it needs; block: the inputs of each block; module: the inputs of each update. Results are the same.
    recompute: str = "none"

    def __post_init__(self) -> None:
        at_least("kernels.chunk", self.chunk, 0)
        choice("kernels.recompute", self.recompute, RECOMPUTES)
        if "none" not in (self.fp8, self.int8):
            raise UserError(f"kernels.fp8={self.fp8} cannot be combined with kernels.int8={self.int8}: drop one.")
        if self.fp8 == "both":  # its name when all architectures had two modules
            self.fp8 = "all"


def kernels_config(kernels: str | Mapping[str, Any] | KernelsConfig) -> KernelsConfig:
    """The kernel choice named by a preset of `config/kernels/`, or given field by field."""
    if isinstance(kernels, KernelsConfig):
        return kernels
    if isinstance(kernels, str):
        presets = choices_of("kernels")
        if kernels not in presets:
            raise UserError(f"kernels={kernels} is not a preset; {neighbours(kernels, presets)}")
        return to_typed(KernelsConfig, OmegaConf.load(presets[kernels]), "kernels")  # type: ignore[arg-type]
    return to_typed(KernelsConfig, kernels, "kernels")
