"""From a checkpoint to a model in evaluation mode."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

from torch import Tensor

from hrm.checkpoint.weights import PUZZLE_TABLE, Checkpoint, load_weights, nonfinite_weights, refilled
from hrm.config import KernelsConfig, kernels_config
from hrm.data.identity import identifiers_hash
from hrm.data.pack import Pack, PackMetadata
from hrm.distributed.world import World
from hrm.errors import UserError, printable
from hrm.kernels import describe
from hrm.kernels.dtypes import AUTO, computing_dtype, describe_dtype
from hrm.kernels.quantize import dtype_beside, quantized
from hrm.models import ACTLossHead, arch_config, build_model
from hrm.models.size_guard import ALWAYS_ALLOWED, at_most


class ModelSizes(NamedTuple):
    """What a model must know of its data, and the batch."""

    batch_size: int
    seq_len: int
    vocab_size: int
    num_puzzle_identifiers: int

    @classmethod
    def of(cls, data: PackMetadata, batch_size: int) -> Self:
        """Those of a pack."""
        return cls(batch_size, data.seq_len, data.vocab_size, data.num_puzzle_identifiers)

    def of_data(self) -> dict[str, int]:
        return {name: size for name, size in self._asdict().items() if name != "batch_size"}


def trained_sizes(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """The sizes of the vocabulary and of the table of puzzle identifiers, read off the weights.

    Raises:
        UserError: these are no weights of a model of this package.
    """
    table = "model.inner.embed_tokens.embedding_weight"
    if table not in weights or weights[table].ndim != 2:
        raise UserError(f"{checkpoint.weights_file} has no table {table}: it is not an HRM's.")
    return len(weights[table]), len(weights.get(PUZZLE_TABLE, [None]))


def load_model(
    checkpoint: Checkpoint,
    weights: Mapping[str, Tensor],
    sizes: ModelSizes,
    kernels: KernelsConfig | str,
    world: World,
    act_max_steps: int | None = None,
    dtype: str = AUTO,
    puzzle_emb: str = "trained",
    rows: slice | None = None,
    quantize: str = "none",
) -> ACTLossHead:
    """The checkpoint's model in evaluation mode.

    Args:
        act_max_steps: another last ACT step than in training.
        dtype: to compute in, as `hrm.kernels.dtypes.computing_dtype` takes it.
        puzzle_emb: what the rows of the puzzle table are, as in `hrm.config.EvaluateConfig`.
        rows: those of the puzzle table that stand for the identifiers of the pack, if not all.
        quantize: the precision of matmuls, as `hrm.kernels.quantize.quantized` takes it.

    Raises:
        UserError: the checkpoint is of no use, or was trained on puzzles of another kind than `sizes` are of.
    """
    if rows is not None and puzzle_emb == "trained" and PUZZLE_TABLE in weights:
        weights = {**weights, PUZZLE_TABLE: weights[PUZZLE_TABLE][rows].contiguous()}
    if puzzle_emb != "trained" and PUZZLE_TABLE in weights:
        weights = {**weights, PUZZLE_TABLE: refilled(weights[PUZZLE_TABLE], puzzle_emb, sizes.num_puzzle_identifiers)}
    _check_kind(checkpoint, weights, sizes)
    arch = arch_config(checkpoint.config["arch"], sizes.of_data(), where=f"{checkpoint.config_file}: arch")
    kernels = quantized(kernels_config(kernels), quantize, world.device)
    dtype = dtype_beside(quantize, dtype, world.device)
    arch = replace(arch, forward_dtype=computing_dtype(dtype, arch.forward_dtype, world.device))
    if act_max_steps is not None:
        arch = replace(arch, halt_max_steps=act_max_steps)
    # A model that is larger than the weights cannot be theirs. A small one is made, so that it is told how they differ.
    numbers = sum(weight.numel() for weight in weights.values())
    with at_most(max(numbers, ALWAYS_ALLOWED)):
        model = build_model(arch, **sizes._asdict(), kernels=kernels, device=world.device)
    load_weights(model, weights, checkpoint.weights_file)
    if world.is_main and (bad := nonfinite_weights(weights)):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        warning = f"{checkpoint.weights_file} holds NaN or infinities in {bad[0]}{more}: its answers mean nothing."
        print(printable(f"warning: {warning}"), file=sys.stderr)
    return model.eval()


def _check_kind(checkpoint: Checkpoint, weights: Mapping[str, Tensor], sizes: ModelSizes) -> None:
    """UserError where the model knows another number of tokens or of puzzle identifiers than the data have."""
    vocab_size, num_identifiers = trained_sizes(checkpoint, weights)
    if vocab_size != sizes.vocab_size:
        raise UserError(
            f"{checkpoint.weights_file} was trained on puzzles with a vocabulary of {vocab_size} tokens, but this data "
            f"pack has {sizes.vocab_size}, {sizes.seq_len} to a puzzle: give a pack of its kind, by data_path=, or "
            "another checkpoint."
        )
    if PUZZLE_TABLE in weights and num_identifiers != sizes.num_puzzle_identifiers:
        raise UserError(
            f"{checkpoint.weights_file} was trained on a pack with {num_identifiers:,} puzzle identifiers, but this "
            f"one has {sizes.num_puzzle_identifiers:,}: give the pack it was trained on, by data_path=; or add "
            "puzzle_emb=mean to answer puzzles unseen in training, or train on this pack from here, by init_from=."
        )


def describe_model(model: ACTLossHead, checkpoint: Checkpoint) -> str:
    """What computes a model, and in which dtype where that is not the one it was trained in."""
    inner, trained_in = model.model.inner, arch_config(checkpoint.config["arch"]).forward_dtype
    kernels, dtype = describe(model.kernels), inner.config.forward_dtype
    if dtype == trained_in:
        return kernels
    return f"{kernels}, {describe_dtype(dtype, trained_in, inner.lm_head.weight.device)}"


class TrainedPack(NamedTuple):
    """One of several packs that a model was trained on."""

    rows: slice  # its rows of the puzzle table
    identifiers: str  # hash of its identifiers.json


def trained_pack(checkpoint: Checkpoint, pack: Pack, data_path: str) -> TrainedPack | None:
    """What `pack` was among the several packs that the model was trained on; None where it was none of them, or one.

    Args:
        data_path: the path or URL that stands for the pack. Without it among those trained on, one with the same
            identifiers is meant.
    """
    listed = checkpoint.config.get("packs")
    now = identifiers_hash(pack.path)
    found: list[TrainedPack] = []
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, dict):
            continue
        first, count, identifiers = (
            entry.get(name) for name in ("first_identifier", "num_puzzle_identifiers", "identifiers")
        )
        is_count = type(first) is int and type(count) is int and first >= 0 and count >= 1
        is_it = entry.get("path") in (data_path, str(pack.path))
        is_like_it = is_it or (now and identifiers == now)
        if is_count and is_like_it and count == pack.metadata.num_puzzle_identifiers and isinstance(identifiers, str):
            one = TrainedPack(slice(first, first + count), identifiers)
            if is_it:
                return one
            found.append(one)
    return found[0] if found else None


def other_identifiers(checkpoint: Checkpoint, model: ACTLossHead, pack: Pack, data_path: str) -> str | None:
    """A sentence where the rows of the model's puzzle table stand for other puzzles than the pack's identifiers do."""
    trained_on: Any = None
    if (one_of_several := trained_pack(checkpoint, pack, data_path)) is not None:
        trained_on = one_of_several.identifiers
    else:
        identity = checkpoint.config.get("pack_identity")
        trained_on = identity.get("identifiers") if isinstance(identity, dict) else None
    now = identifiers_hash(pack.path)
    if not trained_on or not now or trained_on == now or PUZZLE_TABLE not in model.state_dict():
        return None
    return (
        f"{pack.path / 'identifiers.json'} is not that of the pack which {checkpoint.weights_file} was trained on: an "
        "identifier may stand for another puzzle than it did, and its row of the puzzle table be the wrong one."
    )
