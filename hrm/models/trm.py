"""TRM, the Tiny Recursive Model (Jolicoeur-Martineau 2025, arXiv 2510.04871)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hrm.config.checks import at_least, choice
from hrm.kernels.schedule import Update
from hrm.models.architecture import Architecture
from hrm.models.recurrent import DataSizes, RecurrentConfig, RecurrentModel

NAME = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"  # in the published configs


@dataclass
class TRMConfig(RecurrentConfig):
    """TRM (Jolicoeur-Martineau 2025, arXiv 2510.04871; names and defaults as published)."""

    CHANGES_IN_TRAINING: ClassVar[frozenset[str]] = RecurrentConfig.CHANGES_IN_TRAINING | {"H_cycles", "L_cycles"}

    name: str = NAME  # which architecture it is
    q_continue: bool = False  # learn q_continue too; false: sequences halt where q_halt > 0
    gradient: str = "last_cycle"  # what gradients flow through: last_cycle, one_step, all, or a number of updates
    puzzle_emb_len: int = 16  # tokens of the puzzle prefix, zeros where the vector ends; 0: as many as it fills
    H_cycles: int = 3  # times that the answer is refined in an ACT step
    L_cycles: int = 6  # updates of the latent state before each
    L_layers: int = 2  # blocks of the one module

    def schedule(self) -> Iterator[Update]:
        """One module for both states: the latent z_L is updated L_cycles times before each update of the answer z_H."""
        for _ in range(self.H_cycles):
            for _ in range(self.L_cycles):
                yield Update("z_L", ("z_H", "embeddings"), "L_level")
            yield Update("z_H", ("z_L",), "L_level")

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        given = super().from_saved(values)
        given.pop("H_layers", None)  # published configs have it, and their code does not look at it
        return given

    def __post_init__(self) -> None:
        choice("arch.name", self.name, [NAME])
        for name in ("H_cycles", "L_cycles", "L_layers"):
            at_least(f"arch.{name}", getattr(self, name), 1)
        super().__post_init__()


class TinyRecursiveModel(RecurrentModel):
    """One small module that updates a latent state, z_L, and an answer, z_H, in turn."""

    # TRM's code averages parameters, and the puzzle table is none: its average answers with the table as it is.
    averages_puzzle_table: ClassVar[bool] = False

    def __init__(self, config: TRMConfig, sizes: DataSizes, generator: torch.Generator) -> None:
        super().__init__(config, sizes, generator)
        self.add_stack("L_level", config.L_layers, generator)
        self.add_state("z_H", "H_init", self.random_vector(generator))
        self.add_state("z_L", "L_init", self.random_vector(generator))
        self.add_heads(generator)


ARCHITECTURE = Architecture(
    TRMConfig,
    TinyRecursiveModel,
    nearest_to=tuple(
        f"recursive_reasoning.{variant}@TinyRecursiveReasoningModel_ACTV1" for variant in ("trm_singlez", "trm_hier6")
    ),
)
