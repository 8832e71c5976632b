"""What a checkpoint's tokens mean: as it says itself, else its pack, else a guess."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hrm.checkpoint.weights import Checkpoint
from hrm.data.pack import open_pack
from hrm.data.registry import is_pack
from hrm.errors import UserError
from hrm.evaluation.loading import trained_sizes
from hrm.models import arch_config
from hrm.tasks import all_tasks, form_of
from hrm.tasks.base import PuzzleSize
from hrm.tasks.form import PuzzleForm, read_form

_POSITIONS = "model.inner.embed_pos.embedding_weight"


def form_of_checkpoint(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], data_path: str | None = None
) -> PuzzleForm:
    """How the puzzles are written that a model was trained on.

    Checkpoints of the published code, of TRM and of early versions say nothing of it: theirs is that of their pack, if
    it lies where they say, else guessed by their sizes and the pack's name.

    Args:
        data_path: a pack that says it instead.

    Raises:
        UserError: it cannot be known, or contradicts the weights.
    """
    vocab_size, num_identifiers = trained_sizes(checkpoint, weights)
    form = None if data_path else read_form(checkpoint.folder)
    if form is None:
        trained_on = data_path or checkpoint.config.get("data_path")
        if isinstance(trained_on, str) and (data_path or is_pack(Path(trained_on))):
            form = form_of(open_pack(trained_on, "test"))
        else:
            form = _guessed(checkpoint, weights, vocab_size, num_identifiers)
    has_table = "model.inner.puzzle_emb.weights" in weights
    if form.vocab_size != vocab_size or (has_table and form.num_puzzle_identifiers != num_identifiers):
        raise UserError(
            f"{checkpoint.weights_file} has {vocab_size} tokens and {num_identifiers} puzzle identifiers, but what it "
            f"is to be trained on has {form.vocab_size} and {form.num_puzzle_identifiers}: give the right data_path."
        )
    return form


def _guessed(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], vocab_size: int, num_identifiers: int
) -> PuzzleForm:
    """By the sizes of the weights and the name of the pack."""
    named = str(checkpoint.config.get("data_path", "")).lower()
    seq_len = None
    if _POSITIONS in weights:
        seq_len = len(weights[_POSITIONS]) - arch_config(checkpoint.config["arch"]).prefix_len
    elif side := re.search(r"(\d+)x\1(?!\d)", named):
        seq_len = int(side[1]) ** 2
    for name, task in sorted(all_tasks().items(), key=lambda item: (item[0] not in named, item[0] == "maze")):
        if task.num_symmetries(PuzzleSize(1, vocab_size)) == 1 and not task.votes_over_pack:
            continue  # tokens of any meaning
        for size in [PuzzleSize(seq_len, vocab_size)] if seq_len else _usual_sizes(vocab_size):
            if task.fits(size):
                return PuzzleForm(name, size.seq_len, vocab_size, num_identifiers)
    if seq_len is None:
        raise UserError(
            f"{checkpoint.config_file} does not say what the model's tokens mean: give the pack that it was trained "
            "on, by data_path."
        )
    return PuzzleForm("tokens", seq_len, vocab_size, num_identifiers)


def _usual_sizes(vocab_size: int) -> list[PuzzleSize]:
    """Of the published packs, and of Sudoku boards whose digits the vocabulary has."""
    cells = dict.fromkeys([900, max(vocab_size - 2, 1) ** 2])
    return [PuzzleSize(count, vocab_size) for count in cells if math.isqrt(count) ** 2 == count]
