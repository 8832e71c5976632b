"""A plain transformer, the baseline that recurrences are measured against (HRM's paper, section 3: "direct pred")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hrm.config.checks import at_least, choice
from hrm.kernels.schedule import Update
from hrm.models.architecture import Architecture
from hrm.models.recurrent import DataSizes, RecurrentConfig, RecurrentModel

NAME = "transformer"


@dataclass
class TransformerConfig(RecurrentConfig):
    """A plain transformer of HRM's blocks, as deep as HRM's two modules together; hidden_size is its width.

    With halt_max_steps=1 its answer is T(embeddings). With more it is looped: every ACT step is z = T(z + embeddings),
    from z = 0 on.
    """

    name: str = NAME  # which architecture it is
    halt_max_steps: int = 1  # ACT steps after which every sequence halts; 1: no loop
    num_layers: int = 8  # blocks, its depth

    def schedule(self) -> Iterator[Update]:
        """One pass through all blocks."""
        yield Update("z", ("embeddings",), "trunk")

    def __post_init__(self) -> None:
        choice("arch.name", self.name, [NAME])
        at_least("arch.num_layers", self.num_layers, 1)
        super().__post_init__()


class Transformer(RecurrentModel):
    """A stack of blocks, and a state that an ACT step hands to the next."""

    def __init__(self, config: TransformerConfig, sizes: DataSizes, generator: torch.Generator) -> None:
        super().__init__(config, sizes, generator)
        self.add_stack("trunk", config.num_layers, generator)
        self.add_state("z", "z_init", torch.zeros(config.hidden_size))
        self.add_heads(generator)


ARCHITECTURE = Architecture(
    TransformerConfig, Transformer, nearest_to=("recursive_reasoning.transformers_baseline@Model_ACTV2",)
)
