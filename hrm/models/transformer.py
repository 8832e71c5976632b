"""A plain transformer, the baseline that recurrences are measured against (HRM's paper, section 3: "direct pred").

With `arch.memory=mac` it is Titans' memory as context (Behrouz et al. 2025, arXiv 2501.00663, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hrm.config.checks import at_least, choice
from hrm.errors import UserError
from hrm.kernels.context import RotaryTables
from hrm.kernels.naive import rms_norm, rotary_tables
from hrm.kernels.schedule import Schedule, Update
from hrm.models.architecture import Architecture
from hrm.models.layers import in_dtype, truncated_normal
from hrm.models.memory import MemoryState, NeuralMemory
from hrm.models.recurrent import DataSizes, Prepared, RecurrentConfig, RecurrentModel

NAME = "transformer"
MEMORIES = ("none", "mac")
_MAC_SEGMENT = 64  # tokens of a segment where none are given


@dataclass
class TransformerConfig(RecurrentConfig):
    """A plain transformer of HRM's blocks, as deep as HRM's two modules together; hidden_size is its width.

    With halt_max_steps=1 its answer is T(embeddings). With more it is looped: every ACT step is z = T(z + embeddings),
    from z = 0 on.
    """

    name: str = NAME  # which architecture it is
    halt_max_steps: int = 1  # ACT steps after which every sequence halts; 1: no loop
    num_layers: int = 8  # blocks, its depth
    # What carries over from segment to segment of the sequence. mac: Titans' memory as context (arXiv 2501.00663): a
    # neural memory of each sequence, read before attention sees a segment and written after it; training keeps a copy
    # of it for each segment. none: nothing.
    memory: str = "none"
    segment_len: int = 0  # tokens that attend to one another; 0: all of the sequence, with memory=mac 64
    persistent_tokens: int = 4  # learned tokens before each segment, with memory=mac
    memory_hidden: int = 0  # hidden width of the memory's MLP, with memory=mac; 0: hidden_size

    def schedule(self) -> Iterator[Update]:
        """One pass through all blocks."""
        yield Update("z", ("embeddings",), "trunk")

    def __post_init__(self) -> None:
        choice("arch.name", self.name, [NAME])
        at_least("arch.num_layers", self.num_layers, 1)
        choice("arch.memory", self.memory, MEMORIES)
        for name in ("segment_len", "persistent_tokens", "memory_hidden"):
            at_least(f"arch.{name}", getattr(self, name), 0)
        if self.segment and (self.mlp_t or self.rotation == "rope_2d"):
            option = "mlp_t=true" if self.mlp_t else f"pos_encodings={self.pos_encodings}"
            raise UserError(f"arch.{option} is for whole sequences: drop it, or arch.memory and arch.segment_len.")
        super().__post_init__()

    @property
    def segment(self) -> int:
        """Tokens of a segment; 0 where the sequence is not divided."""
        return self.segment_len or (_MAC_SEGMENT if self.memory == "mac" else 0)


class Transformer(RecurrentModel):
    """A stack of blocks, and a state that an ACT step hands to the next.

    With segments, the tokens of one attend to one another and, with a memory, to learned tokens and to what the memory
    recalls of earlier segments. The values of halting are then read off the last token, which comes after all others.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig, sizes: DataSizes, generator: torch.Generator) -> None:
        super().__init__(config, sizes, generator)
        self.add_stack("trunk", config.num_layers, generator)
        if config.segment and config.rotation:  # for as many tokens as attend to one another
            longest = self._tokens_beside(min(config.segment, self.num_tokens))
            self.rotary_cos, self.rotary_sin = rotary_tables(longest, config.head_size, config.rope_theta)
        if config.memory == "mac":
            width = config.hidden_size
            self.memory = NeuralMemory(width, config.memory_hidden or width, memories=0, generator=generator)
            self.persistent = nn.Parameter(truncated_normal((config.persistent_tokens, width), 1.0, generator))
            self.recall_gain = nn.Parameter(torch.zeros(width))
        self.add_state("z", "z_init", torch.zeros(config.hidden_size))
        self.add_heads(generator)

    @property
    def is_its_schedule(self) -> bool:
        return not self.config.segment

    def recur(self, states: dict[str, Tensor], prepared: Prepared) -> dict[str, Tensor]:
        length = self.config.segment
        if not length:
            return super().recur(states, prepared)
        tokens = states["z"] + prepared.embeddings
        memory = self._fresh_memory(tokens.shape[0]) if self.config.memory == "mac" else None
        answers = []
        for segment in torch.split(tokens, length, dim=1):
            if memory is None:
                answers.append(self._attend(segment, prepared))
            else:
                answer, memory = self._attend_with_memory(segment, memory, prepared)
                answers.append(answer)
        return {"z": torch.cat(answers, dim=1)}

    def _tokens_beside(self, segment: int) -> int:
        """The tokens that attend to one another where a segment has so many: these, persistent and recalled ones."""
        return segment if self.config.memory == "none" else self.config.persistent_tokens + 2 * segment

    def _attend(self, tokens: Tensor, prepared: Prepared) -> Tensor:
        """The trunk over so many tokens as there are, [B, tokens, D]."""
        context = prepared.context
        if context.rotary is not None:
            context = replace(context, rotary=RotaryTables(*(table[: tokens.shape[1]] for table in context.rotary)))
        part = prepared._replace(embeddings=tokens, context=context)
        return super().recur({"z": torch.zeros_like(tokens)}, part)["z"]

    def _attend_with_memory(
        self, segment: Tensor, memory: MemoryState, prepared: Prepared
    ) -> tuple[Tensor, MemoryState]:
        """A segment's answer, and the memory after it (equations 21 to 25)."""
        persistent, gain = in_dtype([self.persistent, self.recall_gain], segment.dtype)
        recalled = rms_norm(self.memory.read(memory, segment), prepared.context.eps)
        tokens = torch.cat([persistent.expand(segment.shape[0], -1, -1), recalled, segment], dim=1)
        answer = self._attend(tokens, prepared)[:, -segment.shape[1] :]
        if torch.is_grad_enabled():
            memory = self.memory.write(memory, answer)
        else:
            self.memory.write_(memory, answer, by_definition=self.kernels.config.backend == "naive")
        return answer * (2 * torch.sigmoid(gain * self.memory.read(memory, answer))), memory

    def _fresh_memory(self, sequences: int) -> MemoryState:
        memory = self.memory.fresh(sequences)
        return memory if torch.is_grad_enabled() else memory.copied()

    def recur_to_q_values(self, states: dict[str, Tensor], prepared: Prepared) -> tuple[Tensor, Tensor]:
        if not self.config.segment:
            return super().recur_to_q_values(states, prepared)
        with torch.no_grad():
            return self.q_values(self.recur(states, prepared))

    def q_values(self, states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.config.segment:
            return super().q_values(states)
        return self._read_q_head(states["z"][:, -1])

    # ---- what it costs

    def schedule_flops(self, schedule: Schedule) -> int:
        length, total = self.config.segment, self.num_tokens
        if not length:
            return super().schedule_flops(schedule)
        trunk, flops = self.stacks["trunk"], 0
        for tokens in (min(length, total - start) for start in range(0, total, length)):
            flops += trunk.flops(self._tokens_beside(tokens))
            if self.config.memory == "mac":
                flops += 2 * self.memory.read_flops(tokens) + self.memory.write_flops(tokens)
        return flops * len(schedule)

    def q_values_flops(self, schedule: Schedule) -> int:
        return self.schedule_flops(schedule) if self.config.segment else super().q_values_flops(schedule)


ARCHITECTURE = Architecture(
    TransformerConfig, Transformer, nearest_to=("recursive_reasoning.transformers_baseline@Model_ACTV2",)
)
