"""One training step: an ACT step of every sequence, forward, backward, and an update of all weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hrm.batch import Batch
from hrm.config import KernelsConfig, PretrainConfig
from hrm.cuda_graphs import GraphedWork
from hrm.data.joined import JoinedPack
from hrm.data.pack import Pack
from hrm.distributed.partition import SharedModel
from hrm.distributed.world import World, broadcast_tensors
from hrm.errors import UserError
from hrm.kernels import tensor_parallel_backends
from hrm.models import ACTLossHead, Carry, build_model
from hrm.optim import Adam, SparseSignSGD, learning_rate, set_lr
from hrm.optim.build import build_optimizers
from hrm.tasks import task_of
from hrm.tasks.base import PuzzleSize, Task
from hrm.training.average import WeightAverage
from hrm.training.guard import NonFiniteGuard, halt_nonfinite
from hrm.training.warm_start import WarmStart, freeze


@dataclass
class TrainState:
    """What changes while a run goes on."""

    model: ACTLossHead
    shared: SharedModel  # what of the model is on this process, and how its gradients meet the others'
    optimizers: list[tuple[torch.optim.Optimizer, float]]  # each with its base learning rate
    total_steps: int
    step: int = 0
    carry: Carry | None = None
    average: WeightAverage | None = None
    guard: NonFiniteGuard | None = None


TrainStep = Callable[[Batch], dict[str, Tensor]]
"""Takes this rank's batch, from anywhere; returns the step's metrics, on the device, valid until the next step."""


def initial_state(config: PretrainConfig, pack: Pack, world: World, warm_start: WarmStart | None = None) -> TrainState:
    """A fresh model, or one with the weights of another run, and fresh optimizers, equal on all ranks."""
    metadata = pack.metadata
    examples = config.epochs * metadata.total_groups * metadata.mean_puzzle_examples
    total_steps = int(examples / config.global_batch_size)
    if total_steps == 0:
        raise UserError(
            f"{config.epochs} epochs of {pack.path} are {int(examples)} examples, fewer than one batch of "
            f"global_batch_size={config.global_batch_size}: raise epochs or lower global_batch_size."
        )
    model = build_model(
        config.arch,
        batch_size=_micro_batch_size(config, world),
        seq_len=metadata.seq_len,
        vocab_size=metadata.vocab_size,
        num_puzzle_identifiers=metadata.num_puzzle_identifiers,
        kernels=_kernels(config),
        device=world.device,
        seed=config.seed,
    )
    if warm_start is not None:
        warm_start.put_into(model)
    broadcast_tensors(model.state_dict().values(), world)
    freeze(model, config.freeze)
    model.model.seed_exploration(config.seed + world.rank)
    if config.augment_entry:
        cells, tokens = symmetries(pack, config.seed)
        model.model.set_entry_symmetries(cells.to(world.device), tokens.to(world.device))
    if config.augment_act_steps:
        model.model.set_augmentations(cell_permutations(pack, config.seed).to(world.device))
    shared = SharedModel(model, config.parallel, world)

    graphed, on_cuda = _is_graphed(config, model, world), world.device.type == "cuda"
    guard = None
    if config.skip_nonfinite:
        guard = NonFiniteGuard(config.abort_after, world.device, masks=on_cuda)

    masks = guard is not None and guard.masks
    optimizers = build_optimizers(config, shared, model, world.device, world.group, graphed=graphed, masks=masks)
    average = None if config.ema_decay is None else WeightAverage(model, config.ema_decay, config.ema_start)
    return TrainState(model, shared, optimizers, total_steps, average=average, guard=guard)


def cell_permutations(pack: Pack, seed: int, count: int = 4096) -> Tensor:
    """Permutations [N, S] of a puzzle's cells under which the rules of the pack's task stay, at most `count`.

    Raises:
        UserError: the task has none that are known.
    """
    task, size = _symmetric_task(pack, "augment_act_steps")
    return torch.from_numpy(task.cell_permutations(size, seed, count))


def symmetries(pack: Pack, seed: int, count: int = 4096) -> tuple[Tensor, Tensor]:
    """Symmetries of the pack's task, at most `count`: of the cells [N, S] and of the tokens [N, V].

    Raises:
        UserError: the task has none that are known.
    """
    task, size = _symmetric_task(pack, "augment_entry")
    drawn = task.symmetries(size, int(min(count, task.num_symmetries(size))), seed)
    cells, tokens = (torch.from_numpy(np.stack(maps)) for maps in zip(*drawn, strict=True))
    return cells, tokens


def _symmetric_task(pack: Pack, option: str) -> tuple[Task, PuzzleSize]:
    task, size = task_of(pack), PuzzleSize.of(pack)
    if isinstance(pack, JoinedPack) and len(names := {task_of(part).name for part in pack.parts}) > 1:
        raise UserError(f"{option}=true is for packs of one task, not of {' and '.join(sorted(names))}: leave it out.")
    if task.num_symmetries(size) == 1:
        raise UserError(
            f"{option}=true needs a task with known symmetries, and {pack.path} holds {task.name}, which has none: "
            "leave it out."
        )
    return task, size


def symmetry_warnings(config: PretrainConfig, pack: Pack) -> list[str]:
    """What a reader of the results should know of the options that ask for symmetries, a line each."""
    asked = [option for option in ("augment_entry", "augment_act_steps") if getattr(config, option)]
    if not asked or (task := task_of(pack)).one_answer:
        return []
    return [
        f"warning: puzzles of the task {task.name} have several right answers, of which the label is one by a rule. "
        f"{option}=true maps it to another one, so that few answers will match exactly: leave it out, and augment "
        "where the pack is built, with labels found anew."
        for option in asked
    ]


def make_train_step(config: PretrainConfig, world: World, state: TrainState) -> TrainStep:
    """The function that advances `state` by one step, run eagerly or as a CUDA graph as `config.kernels` says."""
    inner, update = state.model.model.inner, _make_update(config, world, state)

    def step(batch: Batch) -> dict[str, Tensor]:
        nonlocal update
        _set_rates(config, state)
        if (arch := config.arch_at(state.step)) != inner.training_plan.config:
            inner.train_as(arch)
            update = _make_update(config, world, state)
        for optimizer, _ in state.optimizers:
            if isinstance(optimizer, Adam):
                optimizer.refresh_copies()  # a recorded graph reads the copies and cannot tell whether they are current
        return update({name: field.to(world.device, non_blocking=True) for name, field in batch.items()})

    return step


def _make_update(config: PretrainConfig, world: World, state: TrainState) -> TrainStep:
    if not _is_graphed(config, state.model, world):
        return partial(_update, config, state)
    exploration = state.model.model.exploration(world.device)
    in_place = partial(_update_in_place, config, state)
    return GraphedWork(in_place, world.device, eager_calls=3, generators=[exploration])


def current_lr(config: PretrainConfig, state: TrainState, base_lr: float) -> float:
    """The learning rate of step `state.step`."""
    return learning_rate(state.step, base_lr, config.lr_warmup_steps, state.total_steps, config.lr_min_ratio)


def _kernels(config: PretrainConfig) -> KernelsConfig:
    if config.parallel.tensor > 1 and config.kernels.backend == "auto":
        return replace(config.kernels, backend=tensor_parallel_backends()[0])  # others fuse what it cuts apart
    return config.kernels


def _micro_batch_size(config: PretrainConfig, world: World) -> int:
    """Sequences of a forward and backward pass on this rank."""
    local = config.global_batch_size // world.size
    if local % config.accumulate:
        raise UserError(
            f"accumulate={config.accumulate} does not divide the {local} sequences of a rank's batch: change it or "
            "global_batch_size."
        )
    if world.pipeline.size > 1 and local // config.accumulate < config.parallel.micro_batches:
        raise UserError(
            f"parallel.micro_batches={config.parallel.micro_batches} is more than the {local // config.accumulate} "
            "sequences of a rank's pass: lower it or raise global_batch_size."
        )
    return local // config.accumulate


def _is_graphed(config: PretrainConfig, model: ACTLossHead, world: World) -> bool:
    return model.kernels.cuda_graphs and (world.processes == 1 or config.parallel.records_exchange)


def _set_rates(config: PretrainConfig, state: TrainState) -> None:
    """The host's part of a step: count it and set its learning rates."""
    state.step += 1
    for optimizer, base_lr in state.optimizers:
        for group in optimizer.param_groups:
            set_lr(group, current_lr(config, state, base_lr))
    if state.average is not None:
        state.average.at_step(state.step)


def _update(config: PretrainConfig, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """The device's part of a step: nothing in it depends on the host."""
    carry = state.carry or _first_carry(config, state, batch)
    rows = len(batch["inputs"]) // config.accumulate
    passes = [slice(start, start + rows) for start in range(0, config.accumulate * rows, rows)]
    carries: list[Carry] = []
    sums: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    q_halts: list[Tensor] = []
    for part in passes:
        new, loss, metrics, outputs, _ = state.model(
            carry=carry.rows(part),
            batch={name: field[part] for name, field in batch.items()},
            return_keys=["q_halt_logits"],
        )
        carries.append(new)
        losses.append(loss.detach())
        q_halts.append(outputs["q_halt_logits"])
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
        if part is passes[-1]:
            state.shared.last_backward()
        # The loss is divided by the global batch, so gradients are summed, not averaged, over passes and ranks.
        (loss / config.global_batch_size).backward()
        if part is not passes[-1]:
            for optimizer, _ in state.optimizers:
                if isinstance(optimizer, SparseSignSGD):
                    optimizer.keep()
    state.carry = Carry.joined(carries)
    state.shared.finish_gradients(config.grad_clip)
    if state.guard is None:
        _apply_gradients(state)
    else:
        found = state.shared.find_nonfinite([*losses, *_row_gradients(state)])
        state.carry = halt_nonfinite(state.carry, torch.cat(q_halts))
        if state.guard.masks:
            _apply_gradients(state, found)
        elif not found:
            _apply_gradients(state)
        sums = state.guard.count(found, sums)
    for optimizer, _ in state.optimizers:
        optimizer.zero_grad()
    return sums


def _row_gradients(state: TrainState) -> list[Tensor]:
    """Of the puzzle table, on this rank."""
    return [grad for opt, _ in state.optimizers if isinstance(opt, SparseSignSGD) for grad in opt.gradients()]


def _apply_gradients(state: TrainState, found_inf: Tensor | None = None) -> None:
    """Update all weights; where `found_inf` is not 0, to what they are."""
    for optimizer, _ in state.optimizers:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        optimizer.step()
    if state.average is not None:
        state.average.update(found_inf)


def _update_in_place(config: PretrainConfig, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """`_update` for CUDA graphs: the carry stays in the same memory."""
    carry = state.carry = state.carry or _first_carry(config, state, batch)
    metrics = _update(config, state, batch)
    for kept, new in zip(carry.tensors(), state.carry.tensors(), strict=True):
        kept.copy_(new)
    state.carry = carry
    return metrics


def _first_carry(config: PretrainConfig, state: TrainState, batch: Batch) -> Carry:
    return state.model.model.staggered_carry(batch) if config.stagger else state.model.initial_carry(batch)
