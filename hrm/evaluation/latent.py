"""What happens inside a model while it works on puzzles: its states after each ACT step, and how its blocks mix tokens.

A recurrent model moves a point through a space of states. Where its answer is right, the point mostly comes to rest
there; where it is wrong, it either keeps moving or rests at a wrong answer (a spurious attractor), from where another
start or a symmetric puzzle may lead away: the analyses in the HRM paper (arXiv 2506.21734, figure 3) and in "Are
Your Reasoning Models Reasoning or Guessing?" (arXiv 2601.10679).

Shapes: N sequences of S input tokens, behind a puzzle prefix of P; T ACT steps; D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.batch import Batch
from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.context import KernelContext, RotaryTables
from hrm.kernels.schedule import Summed, looped
from hrm.models import ACTLossHead
from hrm.models.act import Carry

_FEATURES = 32  # of a state, to measure how sensitive an MLP over tokens is
_TOKENS_AT_ONCE = 64  # to differentiate

States = dict[str, NDArray[np.float32]]  # by name, each [N, T + 1, P + S, D]: at the start and after each ACT step


@torch.no_grad()  # not inference_mode: compiled no-gradient code of the training step serves here too
def act_steps(
    model: ACTLossHead, batch: Batch, start: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """ACT steps on a batch, one after the other without end; best within `model.weights_at_hand()`.

    Args:
        model: in evaluation mode.
        batch: on the model's device; labels are not read.
        start: states to begin with, each [N, P + S, D]; None: those that the model begins with.

    Yields:
        The states after a step, and its outputs: `logits` [N, S, V], `q_halt_logits` and `q_continue_logits` [N].
    """
    carry = model.initial_carry(batch)
    if start is not None:
        going = torch.zeros_like(carry.halted)
        carry = Carry(dict(start), torch.zeros_like(carry.steps), going, batch)
    while True:
        carry, outputs = model.model(carry, batch)
        carry = replace(carry, halted=torch.zeros_like(carry.halted))
        yield carry.states, outputs


def initial_states(model: ACTLossHead, batch: Batch) -> dict[str, Tensor]:
    """The states [N, P + S, D] that the model begins a batch with."""
    carry = model.initial_carry(batch)
    states, _, _ = model.model.reset_carry(carry, batch)
    return states


@torch.no_grad()
def states_after(model: ACTLossHead, batch: Batch, num_steps: int) -> dict[str, Tensor]:
    """The states [N, P + S, D] of a batch after some ACT steps; before the first for 0."""
    if num_steps == 0:
        return initial_states(model, batch)
    with model.weights_at_hand():
        return model.model.think(model.initial_carry(batch), batch, num_steps).states


def nearby_states(model: ACTLossHead, batch: Batch, seed: int, noise: float = 0.3) -> dict[str, Tensor]:
    """Other states to begin with, [N, P + S, D]: the model's own and normal noise of this standard deviation.

    Norms keep states near a root mean square of 1, which noise should stay well below: a model is trained from its own
    start alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: state + noise * torch.randn(state.shape, generator=generator).to(state)
        for name, state in initial_states(model, batch).items()
    }


@contextmanager
def by_definition(model: ACTLossHead) -> Iterator[None]:
    """A context in which the definition of the blocks computes the model: batches of any size, nothing compiled."""
    inner = model.model.inner
    own, module = inner.kernels, naive.reasoning_module
    inner.kernels = replace(
        own,
        config=replace(
            own.config, backend="naive", compile=False, cuda_graphs=False, fused_step=False, fp8="none", int8="none"
        ),
        module=module,
        run=looped(module),
        first_token_block=naive.first_token_block,
        reset_carry=naive.reset_carry,
        eight_bit={},
    )
    try:
        yield
    finally:
        inner.kernels = own


@dataclass(frozen=True, eq=False)
class Walk:
    """What a model went through on N sequences in T ACT steps."""

    states: States  # those that were to be kept
    answers: NDArray[np.int64]  # [N, T, S], tokens
    q_halt: NDArray[np.float64]  # [N, T], the probability that the answer is right, as the model estimates it

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.answers[0])

    def settled(self) -> NDArray[np.bool_]:
        """Which sequences [N] had the same answer over the last quarter of the steps, two at least."""
        last = self.answers[:, -max(2, self.num_steps // 4) :]
        settled: NDArray[np.bool_] = (last == last[:, :1]).all((1, 2))
        return settled


def walk(
    model: ACTLossHead,
    batch: Batch,
    num_steps: int,
    start: Mapping[str, Tensor] | None = None,
    keep: Sequence[str] | None = None,
    stepped: Callable[[], object] = lambda: None,
) -> Walk:
    """Spend `num_steps` ACT steps on a batch.

    Args:
        model, batch, start: as in `act_steps`.
        keep: names of the states to keep; None: all.
        stepped: called after each step.
    """
    kept: list[Mapping[str, Tensor]] = []

    def take(states: Mapping[str, Tensor]) -> None:
        kept.append({name: states[name] for name in (states if keep is None else keep)})

    take(initial_states(model, batch) if start is None else start)
    answers, q_halts = [], []
    with model.weights_at_hand():
        for states, outputs in islice(act_steps(model, batch, start), num_steps):
            take(states)
            answers.append(outputs["logits"].argmax(-1))
            q_halts.append(outputs["q_halt_logits"].double().sigmoid())
            stepped()
    return Walk(stacked(kept), torch.stack(answers, 1).cpu().numpy(), torch.stack(q_halts, 1).cpu().numpy())


def stacked(steps: Sequence[Mapping[str, Tensor]]) -> States:
    """The states [N, P + S, D] of several moments as `States`, on the CPU."""
    return {name: torch.stack([states[name].float().cpu() for states in steps], 1).numpy() for name in steps[0]}


# What is read off states.


def changes(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much each ACT step changed a state [N, T + 1, P + S, D]: the root mean square over its numbers, [N, T].

    Norms keep the states' own root mean square near 1.
    """
    moved = np.diff(states, axis=1)
    rms: NDArray[np.float32] = np.sqrt(np.square(moved).mean(axis=tuple(range(2, moved.ndim))))
    return rms


def last_changes(answers: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The last step, from 1, that changed each token of answers [N, T, S]: [N, S]."""
    changed = np.diff(answers, axis=1, prepend=-1) != 0  # the first step gives an answer where there was none
    last: NDArray[np.int64] = changed.shape[1] - changed[:, ::-1].argmax(1)
    return last


class Projection(NamedTuple):
    """Points in the directions in which they differ most."""

    points: NDArray[np.float64]  # [..., 2]
    shares: tuple[float, float]  # of the variance, in each direction


def pca(states: NDArray[np.float32]) -> Projection:
    """The first two principal components of states [N, T, ...], each of the N T states being one point.

    From the products of the points, of which there are far fewer than numbers in a point.
    """
    points = states.reshape(states.shape[0] * states.shape[1], -1)
    centred = points - points.mean(0)
    variances, directions = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    variances = np.maximum(variances[::-1], 0)
    coordinates = directions[:, ::-1][:, :2] * np.sqrt(variances[:2])
    total = variances.sum() or 1.0
    return Projection(
        coordinates.reshape(*states.shape[:2], 2), (float(variances[0] / total), float(variances[1] / total))
    )


# Within an ACT step, by the definition of the blocks (`hrm.kernels.naive`), whatever backend the model has.


class Step(NamedTuple):
    """An update within an ACT step."""

    state: str
    module: str
    before: Tensor  # of the state, [N, P + S, D]
    injection: Tensor  # what was added to it
    after: Tensor


@torch.no_grad()
def updates(model: ACTLossHead, batch: Batch, start: Mapping[str, Tensor]) -> Iterator[Step]:
    """The updates of one ACT step that begins with the states `start`.

    Raises:
        UserError: an ACT step of this model is more than its updates.
    """
    inner = model.model.inner
    if not inner.is_its_schedule:
        raise UserError(
            f"an ACT step of this model ({inner.config.name}) is more than updates of its states: they "
            "cannot be looked at one by one."
        )
    prepared = inner.prepare(batch)
    known = Summed({**start, "embeddings": prepared.embeddings})
    for name, inputs, module in inner.plan.schedule:
        before, injection = known.states[name], known.sum(inputs)
        after = naive.reasoning_module(before, injection, prepared.blocks[module], prepared.context)
        known.replace(name, after)
        yield Step(name, module, before, injection, after)


def update_changes(
    model: ACTLossHead, batch: Batch, states: States, stepped: Callable[[], object] = lambda: None
) -> dict[str, NDArray[np.float32]]:
    """How much each update changed its state: the root mean square over its numbers (HRM paper, figure 3).

    Args:
        states: as `walk` keeps them, of the same batch.
        stepped: called after each ACT step.

    Returns:
        By name of the state, [N, T, U], U being how often an ACT step updates it.
    """
    device = batch["inputs"].device
    steps = next(iter(states.values())).shape[1] - 1
    found: dict[str, list[list[Tensor]]] = {name: [] for name in states}
    for step in range(steps):
        start = {
            name: torch.from_numpy(state[:, step]).to(device, model.model.inner.dtype) for name, state in states.items()
        }
        of_step: dict[str, list[Tensor]] = {name: [] for name in states}
        for update in updates(model, batch, start):
            moved = update.after.float() - update.before.float()
            of_step[update.state].append(moved.square().flatten(1).mean(1).sqrt().cpu())
        for name, values in of_step.items():
            found[name].append(values)
        stepped()
    return {
        name: torch.stack([torch.stack(values, 1) for values in each], 1).numpy()
        for name, each in found.items()
        if each[0]
    }


class Mixing(NamedTuple):
    """How a block lets each token depend on the others."""

    module: str
    block: int  # from 0
    kind: Literal["attention", "sensitivity"]
    # [heads, P + S, P + S], from row's token to column's: the weights of attention, whose rows sum to 1; or, one map,
    # the root mean square, over 32 features, of the derivative of an MLP over tokens.
    maps: NDArray[np.float32]


@torch.no_grad()
def token_mixing(model: ACTLossHead, batch: Batch, start: Mapping[str, Tensor]) -> list[Mixing]:
    """How each block mixes the tokens of one sequence, in the last update of its module within an ACT step.

    Args:
        batch: of one sequence.
        start: the states [1, P + S, D] that the step begins with.

    Returns:
        Module by module and block by block; nothing of blocks that neither attend nor have an MLP over tokens.
    """
    last = {step.module: step for step in updates(model, batch, start)}
    prepared = model.model.inner.prepare(batch)
    found = []
    for module, step in last.items():
        x = step.before + step.injection
        for number, block in enumerate(prepared.blocks[module]):
            mixing = _mixing(x, block, prepared.context)
            if mixing is not None:
                found.append(Mixing(module, number, *mixing))
            x = naive.reasoning_module(x, torch.zeros_like(x), [block], prepared.context)
    return found


def _mixing(
    x: Tensor, block: Any, context: KernelContext
) -> tuple[Literal["attention", "sensitivity"], NDArray[np.float32]] | None:
    """The kind and the maps of a block applied to one sequence [1, P + S, D]."""
    if hasattr(block, "token_gate_up"):
        return "sensitivity", _sensitivity(x, block, context.eps)
    seen: list[Tensor] = []

    def attend(qkv: Tensor, rotary: RotaryTables | None, num_heads: int) -> Tensor:
        q, k, _ = naive.split_heads(qkv, rotary, num_heads)
        scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5
        seen.append(scores.softmax(-1))
        return naive.sdpa(qkv, rotary, num_heads)

    naive.reasoning_module(x, torch.zeros_like(x), [block], context, attend)
    return ("attention", seen[0][0].cpu().numpy()) if seen else None


def _sensitivity(x: Tensor, block: Any, eps: float) -> NDArray[np.float32]:
    """[1, T, T] of a block's MLP over the T tokens of one sequence [1, T, D].

    It takes each feature for itself: the derivative of a token's features all at once is the row of that token in the
    Jacobian of each feature. Some of the features will do.
    """
    num_tokens, width = x.shape[1:]
    features = x.float()[:, :, :: max(1, width // _FEATURES)]
    weights = type(block)(*(weight.float() for weight in block))
    rows = []
    for tokens in torch.split(torch.arange(num_tokens), _TOKENS_AT_ONCE):
        with torch.enable_grad():
            given = features.expand(len(tokens), -1, -1).clone().requires_grad_()
            read = naive.mix_tokens(given, weights, eps)[torch.arange(len(tokens)), tokens]
            (derivatives,) = torch.autograd.grad(read.sum(), given)
        rows.append(derivatives.square().mean(-1).sqrt())
    return torch.cat(rows)[None].cpu().numpy()
