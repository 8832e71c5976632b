"""What of a run under way goes into a training state, and how a fresh run is brought to where a state was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hrm.batch import Batch
from hrm.checkpoint.finding import read_tensors
from hrm.checkpoint.states import SavedState
from hrm.config import PretrainConfig
from hrm.data.pack import Pack
from hrm.distributed.world import World
from hrm.errors import UserError, first_sentence, shortened
from hrm.models import ACTLossHead
from hrm.training.metrics import MetricWindow, OpenSums
from hrm.training.step import TrainState


@dataclass
class Progress:
    """Where a run stands among its batches and evaluations."""

    pass_index: int = 0
    batches: int = 0  # of the pass that were trained on
    train_accuracy: float | None = None  # exact, in the last window of steps that had one
    best_accuracy: float | None = None  # exact, at the best evaluation
    best_step: int | None = None
    evaluations_since_best: int = 0

    @classmethod
    def from_saved(cls, saved: SavedState) -> Progress:
        """Where the run of a training state stood; UserError if it does not say."""
        try:
            progress = cls(**saved.metadata.progress)
        except TypeError as error:
            raise UserError(
                f"{saved.folder} has other fields of progress ({error}): resume from another one."
            ) from error
        for name, value in vars(progress).items():
            if not (value is None and name in ("train_accuracy", "best_accuracy", "best_step")):
                kinds = (int, float) if name.endswith("accuracy") else (int,)
                if type(value) not in kinds or not 0 <= value < 2**63:
                    raise UserError(
                        f"{saved.folder} has {name} {shortened(value)}: resume from another training state."
                    )
        return progress


def shared_tensors(state: TrainState) -> dict[str, Tensor]:
    """What of a training state belongs to no rank in particular; every process must call this."""
    tensors = _named("weights", state.shared.gather(state.model.state_dict()))
    if state.average is not None:
        tensors |= _named("average", state.shared.gather(state.average.model.state_dict()))
    dense, _ = state.optimizers[0]  # the puzzle table's keeps nothing
    values = dense.state_dict()["state"]
    some: dict[str, Any] = {}  # a process may have nothing of a weight, and Muon's matrices have no second moment
    for value in values.values():
        some |= value
    for key, example in some.items():
        if torch.as_tensor(example).ndim:
            parts = {
                name: values[number][key] if number in values else torch.empty_like(weight)
                for number, (name, weight) in enumerate(state.shared.weights.items())
                if key in values.get(number, some)
            }
            tensors |= _named(f"moments.{key}", state.shared.gather(parts))
        else:
            counts = [values.get(number, some)[key] for number in range(len(state.shared.weights))]
            tensors[f"counts.{key}"] = torch.stack([torch.as_tensor(count) for count in counts])
    return tensors


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def own_tensors(state: TrainState, window: MetricWindow, world: World) -> dict[str, Tensor]:
    """What each rank has of its own: the carry of its sequences, its random generator, its sums of metrics."""
    assert state.carry is not None
    tensors = {f"carry.{name}": tensor for name, tensor in state.carry.named_tensors().items()}
    tensors["exploration"] = state.model.model.exploration(world.device).get_state().unsqueeze(0)
    if begun := window.open_sums():
        tensors["window"] = begun.sums.unsqueeze(0)
    return tensors


def restore(saved: SavedState, state: TrainState, world: World, config: PretrainConfig, pack: Pack) -> OpenSums | None:
    """Bring a fresh run to where a training state was; to be called before its first step.

    On as many ranks as before, and on one machine, what follows has the same bits as if the run had never stopped. On
    another number of ranks each takes its share of the sequences, and explores by a random stream of its own that
    follows from seed, step and rank.

    Returns:
        What was in the window of metrics that was open.

    Raises:
        UserError: the tensors are not those of this model and its optimizers.
    """
    tensors = read_tensors(saved.folder)
    try:
        return _restore(saved, tensors, state, world, config, pack)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{saved.folder} does not hold what a run with these options goes on from ({first_sentence(error)}): "
            "resume from another training state."
        ) from error


def _restore(
    saved: SavedState,
    tensors: Mapping[str, Tensor],
    state: TrainState,
    world: World,
    config: PretrainConfig,
    pack: Pack,
) -> OpenSums | None:
    _fill(state, state.model, dict(_below("weights.", tensors)), saved.folder)
    if state.average is not None:  # if it was off before, it starts now
        weights = dict(_below("weights.", tensors))
        average = dict(_below("average.", tensors)) or weights
        # What the average shares with the model is the model's, also if the state is of a time when it was averaged.
        average |= {name: weights[name] for name in state.average.shared}
        _fill(state, state.average.model, average, saved.folder)
    values: list[dict[str, Tensor]] = [{} for _ in state.shared.weights]
    for key, counts in _below("counts.", tensors):
        for own, count in zip(values, counts, strict=True):
            own[key] = count.clone()
    for path, moment in _below("moments.", tensors):
        key, _, name = path.partition(".")
        if moment.shape != tensors[f"weights.{name}"].shape:
            raise ValueError(f"moments.{path} has shape {tuple(moment.shape)}, not its weight's")
        values[list(state.shared.weights).index(name)][key] = state.shared.scatter({name: moment})[name].clone()
    dense, _ = state.optimizers[0]
    # Rates, betas and the like are the options' business.
    dense.load_state_dict({"state": dict(enumerate(values)), "param_groups": dense.state_dict()["param_groups"]})
    state.step = saved.metadata.step

    local = config.global_batch_size // world.size
    state.carry = state.model.initial_carry(_blank_batch(local, pack, world))
    for number, (name, tensor) in enumerate(state.carry.named_tensors().items()):
        whole = tensors.get(f"carry.{name}", tensors.get(f"carry.{number}"))  # earlier versions saved it by position
        assert whole is not None
        tensor.copy_(whole[world.rank * local : (world.rank + 1) * local])

    generator, streams = state.model.model.exploration(world.device), tensors["exploration"]
    same_ranks = saved.metadata.num_ranks == world.size
    if same_ranks and streams.shape[1:] == generator.get_state().shape:
        generator.set_state(streams[world.rank].clone())
    else:
        entropy = np.random.SeedSequence(config.seed, spawn_key=(state.step, world.rank))
        state.model.model.seed_exploration(int(entropy.generate_state(1, np.uint64)[0]))

    if not saved.metadata.window_steps:
        return None
    sums = tensors["window"][world.rank] if same_ranks else tensors["window"].sum(0) * world.is_main
    return OpenSums(saved.metadata.window_names, saved.metadata.window_steps, sums.to(world.device))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


@torch.no_grad()
def _fill(state: TrainState, model: ACTLossHead, whole: Mapping[str, Tensor], folder: Path) -> None:
    """Copy whole weights, or this process's parts of them, into a model's, which stay where they are in memory."""
    own = model.state_dict()
    own |= {name: tensor.to_local() for name, tensor in own.items() if isinstance(tensor, DTensor)}
    parts = state.shared.scatter(whole)
    for name in sorted(own.keys() | whole.keys()):
        if name not in own or name not in parts or own[name].shape != parts[name].shape:
            has = tuple(whole[name].shape) if name in whole else "nothing"
            raise UserError(
                f"{folder} has {has} for {name}, which does not fit this model: resume with the architecture that the "
                "run had."
            )
    for name, tensor in own.items():
        tensor.copy_(parts[name])


def _blank_batch(size: int, pack: Pack, world: World) -> Batch:
    board = torch.zeros(size, pack.metadata.seq_len, dtype=torch.int32, device=world.device)
    return {"inputs": board, "labels": board.clone(), "puzzle_identifiers": board[:, 0].clone()}
