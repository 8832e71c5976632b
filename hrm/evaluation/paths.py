"""Several paths of one model from a puzzle to answers, by noise on the states of its recurrence.

A recurrent model that is stuck on a puzzle often solves it from another start, or when it is shaken on its way: no
training, only more forward passes. Which of the answers counts, `hrm.evaluation.picking` says.
Shapes: B puzzles, S cells, T tokens of a state (the cells' and the prefix's), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.config import EnsembleConfig
from hrm.cuda_graphs import GraphedWork
from hrm.distributed.world import World
from hrm.evaluation.latent import initial_states
from hrm.evaluation.symmetries import DeviceSymmetry, keep_rules
from hrm.models import ACTLossHead
from hrm.models.recurrent import RecurrentModel
from hrm.tasks.base import Rules

_NOISE, _START = "noise", "start"  # stand among a batch's fields, for a recorded graph to read them


class Answers(NamedTuple):
    """A path's answers to B puzzles, after its last ACT step and where it first halted."""

    tokens: Tensor  # [B, S] int32
    q_halt: Tensor  # [B] float32, logits
    change: Tensor  # [B] float32: how far the state that the heads read was before the last ACT step, mean square
    halted_at: Tensor  # [B] int32: the first ACT step with q_halt > q_continue; one more than there are: none
    halted_tokens: Tensor  # [B, S] int32, then; `tokens` where it never halts
    halted_q: Tensor  # [B] float32, then
    act_steps: Tensor  # [B] int32: that the path took
    keeps: Tensor  # [B] bool: `tokens` keep the task's rules, as far as anybody looked
    halted_keeps: Tensor  # [B] bool: and `halted_tokens`

    @classmethod
    def stacked(cls, several: Sequence[Answers]) -> Answers:
        """[K, ...], of K paths or other members."""
        return cls(*(torch.stack(fields) for fields in zip(*several, strict=True)))

    def first(self, count: int) -> Answers:
        """The first `count` of those that are stacked."""
        return Answers(*(field[:count] for field in self))

    def checked(self, rules: Rules, inputs: Tensor) -> Answers:
        """With what the rules say of the answers to `inputs` [B, S]."""
        return self._replace(
            keeps=keep_rules(rules, inputs, self.tokens), halted_keeps=keep_rules(rules, inputs, self.halted_tokens)
        )


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on states: the options of `EnsembleConfig`."""

    std: float = 0.3
    on: str = "hidden"
    at: str = "steps"
    seed: int = 0

    @classmethod
    def of(cls, options: EnsembleConfig) -> Noise | None:
        """None where one path is asked for, which has none."""
        return cls(options.noise, options.noise_on, options.noise_at, options.seed) if options.paths > 1 else None

    def states(self, inner: RecurrentModel) -> list[str]:
        """Names of the states that get it, whatever the architecture calls them."""
        output = [inner.output_state]
        return {"all": [*inner.initial_states], "output": output, "hidden": inner.hidden_states or output}[self.on]

    def drawn(self, inner: RecurrentModel, path: int, num_steps: int) -> Tensor:
        """What is added before each ACT step, [num_steps, states, T, D] on the CPU, or [1, ...] at the start only.

        It is one and the same for all puzzles, so that a path depends neither on the batch nor on the number of ranks.
        Path 0 has none, and of a model with several starts the first path of each.
        """
        count = 1 if self.at == "start" else num_steps
        shape = (count, len(self.states(inner)), inner.num_tokens, inner.config.hidden_size)
        if path < inner.config.starts:
            return torch.zeros(shape)
        (seed,) = np.random.SeedSequence(self.seed, spawn_key=(path,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed >> np.uint64(1)))
        return self.std * torch.randn(shape, generator=generator)


class Halting(NamedTuple):
    """When a path ends before its last ACT step: once all its puzzles have halted and their answers keep the rules."""

    margin: float = 0.0  # a puzzle halts where q_halt > q_continue + this
    rules: Rules | None = None  # None: none are known


@torch.no_grad()  # as in `run_act_steps`
def follow(
    model: ACTLossHead, batch: Batch, num_steps: int, noise: Noise | None = None, halting: Halting | None = None
) -> Answers:
    """A path of so many ACT steps, or of fewer with `halting`, for which the host waits for each step.

    Args:
        model: in evaluation mode.
        batch: with the noise to add, as drawn by `noise`, in the field `noise` if there is any; with the vectors that
            hidden states begin with, [states, D], in the field `start` where a model has several.
    """
    inner = model.model.inner
    added, start = batch.get(_NOISE), batch.get(_START)
    batch = {name: field for name, field in batch.items() if name not in (_NOISE, _START)}
    states, prepared = initial_states(model, batch), inner.prepare(batch)
    if start is not None:
        states |= {
            name: vector.expand_as(states[name]).contiguous()
            for name, vector in zip(inner.hidden_states, start, strict=True)
        }
    halted_at = torch.full((len(batch["inputs"]),), num_steps + 1, dtype=torch.int32, device=batch["inputs"].device)
    has_halted = torch.zeros_like(halted_at, dtype=torch.bool)
    for step in range(num_steps):
        before = states[inner.output_state]
        if noise and added is not None and step < len(added):
            noisy = {
                name: states[name] + each.to(inner.dtype)
                for name, each in zip(noise.states(inner), added[step], strict=True)
            }
            states = states | noisy
        states = inner.recur(states, prepared)
        q_halt, q_continue = inner.q_values(states)
        tokens = inner.logits(states).argmax(-1).int()
        if step == 0:
            halted_tokens, halted_q = tokens, q_halt
        # Until it halts, and where it does not after all, the last answer stands there.
        going_on = halted_at > num_steps
        halted_tokens = torch.where(going_on[:, None], tokens, halted_tokens)
        halted_q = torch.where(going_on, q_halt, halted_q)
        halted_at = torch.where(going_on & (q_halt > q_continue), step + 1, halted_at)
        if halting:
            has_halted |= q_halt > q_continue + halting.margin
            if has_halted.all() and (not halting.rules or keep_rules(halting.rules, batch["inputs"], tokens).all()):
                break
    change = (states[inner.output_state].float() - before.float()).square().mean((1, 2))
    act_steps, keeps = torch.full_like(halted_at, step + 1), torch.ones_like(halted_at, dtype=torch.bool)
    return Answers(tokens, q_halt.float(), change, halted_at, halted_tokens, halted_q.float(), act_steps, keeps, keeps)


Follower = Callable[[Batch, int], Answers]
"""Takes N puzzles on the device and the number of a path."""

Member = Callable[[Batch, DeviceSymmetry, int], Answers]
"""Takes N puzzles on the device, a symmetry and the number of a path; answers the symmetric puzzles, mapped back."""


def make_follower(
    model: ACTLossHead,
    device: torch.device,
    noise: Noise | None = None,
    num_steps: int | None = None,
    halting: Halting | None = None,
) -> Follower:
    """A model that answers puzzles by one path or another.

    All batches must have one shape where the model's kernels record graphs, as in `make_runner`.

    Args:
        num_steps: ACT steps of a path; None: the model's.
        halting: ignored where a graph is recorded, which has all steps.
    """
    most = num_steps or model.halt_max_steps
    graphed = model.kernels.cuda_graphs

    def work(batch: Batch) -> Answers:
        return follow(model, batch, most, noise, None if graphed else halting)

    run = GraphedWork(work, device, eager_calls=1) if graphed else work

    def answer(batch: Batch, path: int) -> Answers:
        if noise:
            batch = batch | {_NOISE: noise.drawn(model.model.inner, path, most).to(device)}
        if starts := model.model.inner.hidden_starts:
            batch = batch | {_START: torch.stack([each[path % len(each)] for each in starts.values()])}
        # Copies, because a graph's next call overwrites its results.
        return Answers(*(field.clone() for field in run(batch)))

    return answer


def make_member(model: ACTLossHead, world: World, noise: Noise | None = None, halting: Halting | None = None) -> Member:
    """A model that answers symmetric puzzles by one path or another; see `make_follower`."""
    follower = make_follower(model, world.device, noise, halting=halting)

    def answer(batch: Batch, symmetry: DeviceSymmetry, path: int = 0) -> Answers:
        result = follower(batch | {"inputs": symmetry.apply(batch["inputs"])}, path)
        return result._replace(tokens=symmetry.undo(result.tokens), halted_tokens=symmetry.undo(result.halted_tokens))

    return answer
