"""HRM v1, the Hierarchical Reasoning Model (Wang et al. 2025, arXiv 2506.21734)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from hrm.config.checks import at_least, choice
from hrm.kernels.schedule import Update
from hrm.models.architecture import Architecture
from hrm.models.recurrent import DataSizes, RecurrentConfig, RecurrentModel

NAME = "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1"  # in the published configs
NAME_IN_TRM = "recursive_reasoning.hrm@HierarchicalReasoningModel_ACTV1"  # in those of TRM's code


@dataclass
class HRMConfig(RecurrentConfig):
    """HRM v1 with adaptive computation time (paper section 2; names as in the published configs)."""

    CHANGES_IN_TRAINING: ClassVar[frozenset[str]] = RecurrentConfig.CHANGES_IN_TRAINING | {"H_cycles", "L_cycles"}

    name: str = NAME  # which architecture it is
    H_cycles: int = 2  # slow updates in an ACT step
    L_cycles: int = 2  # fast updates before each slow one
    H_layers: int = 4  # blocks of the slow module; 0: none of its own, the fast one's serve both
    L_layers: int = 4  # blocks of the fast module

    def schedule(self) -> Iterator[Update]:
        """The paper's recurrence: z_L is updated L_cycles times between updates of z_H."""
        slow_module = "H_level" if self.H_layers else "L_level"
        for _ in range(self.H_cycles):
            for _ in range(self.L_cycles):
                yield Update("z_L", ("z_H", "embeddings"), "L_level")
            yield Update("z_H", ("z_L",), slow_module)

    def __post_init__(self) -> None:
        choice("arch.name", self.name, [NAME])
        for name in ("H_cycles", "L_cycles", "L_layers"):
            at_least(f"arch.{name}", getattr(self, name), 1)
        at_least("arch.H_layers", self.H_layers, 0)
        super().__post_init__()


class HierarchicalReasoningModel(RecurrentModel):
    """A slow module, H, that plans, and a fast one, L, that works out details; each has a state of every token."""

    def __init__(self, config: HRMConfig, sizes: DataSizes, generator: torch.Generator) -> None:
        super().__init__(config, sizes, generator)
        if config.H_layers:
            self.add_stack("H_level", config.H_layers, generator)
        self.add_stack("L_level", config.L_layers, generator)
        self.add_state("z_H", "H_init", self.random_vector(generator))
        self.add_state("z_L", "L_init", self.random_vector(generator))
        self.add_heads(generator)


ARCHITECTURE = Architecture(HRMConfig, HierarchicalReasoningModel, old_schemas=("hrm_v1",), other_names=(NAME_IN_TRM,))
