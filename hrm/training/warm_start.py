"""Starting a run from the weights of another (`init_from`), and leaving weights untrained (`freeze`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from hrm.checkpoint.weights import PUZZLE_TABLE, Checkpoint, find_checkpoint, nonfinite_weights, read_weights, refilled
from hrm.config import PretrainConfig, neighbours
from hrm.data.identity import PackIdentity
from hrm.data.pack import Pack
from hrm.errors import UserError
from hrm.models import ACTLossHead, RecurrentConfig, arch_config
from hrm.models.layers import SparseEmbedding

TRUNK = "trunk"  # in `freeze`: all weights but the puzzle table
_OF_THE_MODEL = "model.inner."
_TOKENS = "model.inner.embed_tokens.embedding_weight"
_POSITIONS = "model.inner.embed_pos.embedding_weight"
_MIXER = ".mlp_t."  # in the names of what mixes tokens, of which it has one number each


@dataclass(frozen=True)
class WarmStart:
    """The weights that a run starts from."""

    checkpoint: Checkpoint
    weights: Mapping[str, Tensor]  # of the file, by their names in a plain model
    puzzle_emb: str  # keep, mean or new
    about_table: str  # why, in words

    @classmethod
    def read(cls, config: PretrainConfig, pack: Pack, identity: PackIdentity, task: str | None) -> WarmStart | None:
        """What `config.init_from` asks for, if anything.

        Args:
            pack, identity, task: what is to be trained on, and the task that it names, if it does.

        Raises:
            UserError: there are no weights, or none that can serve.
        """
        if config.init_from is None:
            return None
        checkpoint = find_checkpoint(config.init_from, "init_from", needs_config=False)
        weights = read_weights(checkpoint.weights_file)
        if bad := nonfinite_weights(weights):
            raise UserError(f"init_from={config.init_from}: {bad[0]} holds NaN or infinities: give other weights.")
        if _TOKENS not in weights or weights[_TOKENS].ndim != 2:
            raise UserError(f"init_from={config.init_from} has no table {_TOKENS}: it is no model of this kind.")
        if (known := len(weights[_TOKENS])) != pack.metadata.vocab_size:
            raise UserError(
                f"init_from={config.init_from} has a vocabulary of {known} tokens, but {pack.path} has "
                f"{pack.metadata.vocab_size}: weights serve for packs of one task and vocabulary."
            )
        trained_on = checkpoint.config.get("task")
        if task is not None and isinstance(trained_on, str) and trained_on != task:
            raise UserError(
                f"init_from={config.init_from} was trained on the task {trained_on}, but {pack.path} holds {task}: "
                "weights serve for packs of one task and vocabulary."
            )
        how, why = _table_choice(config, checkpoint, weights, pack, identity)
        return cls(checkpoint, weights, how, why)

    def put_into(self, model: ACTLossHead) -> None:
        """Overwrite a fresh model's weights, in place, as far as the file has them.

        Raises:
            UserError: a weight has another shape there, or the modules have other blocks.
        """
        own = model.state_dict()
        for name in sorted(own.keys() | self.weights.keys()):
            self._check(name, own.get(name), self.weights.get(name))
        with torch.no_grad():
            for name in own.keys() & self.weights.keys():
                given = self.weights[name]
                if name == PUZZLE_TABLE and self.puzzle_emb != "keep":
                    given = refilled(given, "mean" if self.puzzle_emb == "mean" else "zero", len(own[name]))
                own[name].copy_(given if given.shape == own[name].shape else torch.zeros_like(own[name]))

    def report(self, model: ACTLossHead, arch: RecurrentConfig) -> list[str]:
        """What was taken and what was not, a line each."""
        own = model.state_dict()
        taken = [name for name in own if name in self.weights and name != PUZZLE_TABLE]
        numbers = sum(own[name].numel() for name in taken)
        lines = [f"Weights from {self.checkpoint.weights_file}: {len(taken)} tensors taken, {numbers:,} numbers."]
        if PUZZLE_TABLE in own:
            lines.append(f"Puzzle table: {self.about_table}.")
        for what, names in (
            ("Not in the file, so as a fresh model has them", own.keys() - self.weights.keys() - {PUZZLE_TABLE}),
            ("In the file, but not in this model", self.weights.keys() - own.keys()),
        ):
            if names:
                lines.append(f"{what}: {', '.join(_short(name) for name in sorted(names))}.")
        lines.append(_differences(self.checkpoint, arch))
        return lines

    def _check(self, name: str, own: Tensor | None, given: Tensor | None) -> None:
        file = self.checkpoint.weights_file
        if own is None or given is None:
            if ".layers." in name:
                has, lacks = ("the file", "this model") if own is None else ("this model", "the file")
                raise UserError(
                    f"init_from={file}: {has} has {_short(name)}, which {lacks} does not: give the architecture that "
                    "it was trained with, by arch= and arch.*."
                )
            return
        if own.shape == given.shape:
            return
        shapes = f"{tuple(given.shape)} there and {tuple(own.shape)} here"
        if name == _POSITIONS or _MIXER in name:
            what = "positions are learned" if name == _POSITIONS else "tokens are mixed by weights (mlp_t)"
            raise UserError(
                f"init_from={file}: {what}, which serve for puzzles of one length only ({_short(name)} is {shapes}): "
                "give a pack of that length, or weights with attention and pos_encodings=rope."
            )
        if name == PUZZLE_TABLE and (own.shape[1] == given.shape[1] or self.puzzle_emb == "new"):
            return
        raise UserError(
            f"init_from={file}: {_short(name)} is {shapes}: give the architecture that it was trained with, by arch= "
            "and arch.*."
        )


def _table_choice(
    config: PretrainConfig, checkpoint: Checkpoint, weights: Mapping[str, Tensor], pack: Pack, identity: PackIdentity
) -> tuple[str, str]:
    """What becomes of the puzzle table, and why in words."""
    rows, how = pack.metadata.num_puzzle_identifiers, config.init_puzzle_emb
    if PUZZLE_TABLE not in weights:
        return "new", f"{rows:,} rows of zeros, as the file has none"
    had = len(weights[PUZZLE_TABLE])
    saved = checkpoint.config.get("pack_identity")
    trained_on = saved.get("identifiers") if isinstance(saved, dict) else None
    others = bool(trained_on and identity.identifiers and trained_on != identity.identifiers)
    if how == "auto":
        how = "keep" if had == rows and not others else "mean"
    if how == "keep" and had != rows:
        raise UserError(
            f"init_puzzle_emb=keep needs a pack with as many puzzle identifiers as {checkpoint.weights_file} has rows, "
            f"{had:,}, but {pack.path} has {rows:,}: take mean or new."
        )
    if how == "keep":
        unlike = ", although its rows stood for other identifiers" if others else ""
        return how, f"its {rows:,} rows kept{unlike}"
    if how == "mean":
        return how, f"{rows:,} rows, each the mean of the {had:,} there"
    return how, f"{rows:,} rows of zeros in place of the {had:,} there"


def _differences(checkpoint: Checkpoint, arch: RecurrentConfig) -> str:
    """How the architecture's options differ from those of the checkpoint."""
    if not checkpoint.config:
        return "No all_config.yaml lies beside it: whether options without weights of their own agree is not known."
    try:
        had = arch_config(checkpoint.config["arch"]).effective_options()
    except UserError as error:
        return f"Its options are not all known here: {error}"
    now = arch.effective_options()
    differ = [
        f"{name}={now.get(name)} (it had {had.get(name)})"
        for name in sorted(now.keys() | had.keys())
        if now.get(name) != had.get(name)
    ]
    return f"Options of arch that differ: {', '.join(differ)}." if differ else "All options of arch are as it had them."


def freeze(model: ACTLossHead, patterns: str | None) -> None:
    """Let weights be no part of training: they get no gradient, and optimizers know nothing of them.

    Args:
        patterns: as the option `freeze`.

    Raises:
        UserError: a name is that of no weight, or nothing is left to train.
    """
    if not patterns:
        return
    weights: dict[str, Any] = {_short(name): weight for name, weight in model.named_parameters()}
    names = [*weights, *(_short(name) for name in [PUZZLE_TABLE] if name in model.state_dict())]
    frozen: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = set(weights) if pattern == TRUNK else {name for name in names if _matches(name, pattern)}
        if not found:
            parts = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
            raise UserError(f"freeze={pattern} names no weights; {neighbours(pattern, parts | {TRUNK})}")
        frozen |= found
    if not set(names) - frozen:
        raise UserError(f"freeze={patterns} leaves nothing to train: freeze less, or give the model a puzzle table.")
    for name in frozen & weights.keys():
        weights[name].requires_grad_(False)
    table = getattr(model.model.inner, "puzzle_emb", None)
    if isinstance(table, SparseEmbedding):
        table.is_frozen = _short(PUZZLE_TABLE) in frozen


def frozen_report(model: ACTLossHead) -> list[str]:
    """A line about the weights that are not trained, or none where all are."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    tables = [part for part in model.modules() if isinstance(part, SparseEmbedding) and part.is_frozen]
    parts = [f"{len(frozen)} weights of {sum(weight.numel() for weight in frozen):,} numbers"] if frozen else []
    parts += ["the puzzle table"] if tables else []
    return [f"Frozen: {' and '.join(parts)}."] if parts else []


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _short(name: str) -> str:
    return name.removeprefix(_OF_THE_MODEL)
