"""A tiny model and a pack of Latin squares to train it on, and what training steps and runs leave behind."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrm.batch import Batch
from hrm.config import PretrainConfig
from hrm.data.loader import TrainLoader
from hrm.data.pack import PackMetadata, PackSet, open_pack, write_identifiers, write_split
from hrm.distributed.world import World
from hrm.models.hrm import HRMConfig
from hrm.training.step import TrainState, initial_state

ALONE = World(0, 1, torch.device("cpu"))
NUM_IDENTIFIERS = 3
ARCH = HRMConfig(
    hidden_size=32,
    num_heads=2,
    H_layers=1,
    L_layers=1,
    puzzle_emb_ndim=32,
    pos_encodings="learned",
    halt_max_steps=2,
    forward_dtype="float32",
)


def write_pack(folder: Path, **sizes: int) -> None:
    """4x4 Latin squares with about half of the cells blank, `sizes` of them in each split.

    Splits of one size are equal.
    """
    cell = np.arange(16)
    for split, size in sizes.items():
        rng = np.random.default_rng(0)
        symbols = rng.permuted(np.tile(np.arange(1, 5, dtype=np.uint8), (size, 1)), axis=1)
        labels = symbols[:, (cell // 4 + cell % 4) % 4]
        data = PackSet(
            inputs=np.where(rng.random(labels.shape) < 0.5, 0, labels).astype(np.uint8),
            labels=labels,
            puzzle_identifiers=np.arange(size, dtype=np.int32) % NUM_IDENTIFIERS,
            puzzle_indices=np.arange(size + 1, dtype=np.int32),
            group_indices=np.arange(size + 1, dtype=np.int32),
        )
        metadata = PackMetadata(
            pad_id=0,
            ignore_label_id=0,
            blank_identifier_id=0,
            vocab_size=5,
            seq_len=16,
            num_puzzle_identifiers=NUM_IDENTIFIERS,
            total_groups=size,
            mean_puzzle_examples=1.0,
            sets=("all",),
        )
        write_split(folder / split, metadata, {"all": data})


def write_identified_pack(folder: Path, *, puzzles: int, seq_len: int = 16, vocab_size: int = 6) -> Path:
    """A pack in which every puzzle has an identifier, of one example: the labels are the inputs."""
    rng = np.random.default_rng(puzzles)
    for split in ("train", "test"):
        tokens = rng.integers(1, vocab_size, (12, seq_len)).astype(np.uint8)
        identifiers = np.arange(12, dtype=np.int32) % puzzles + 1
        offsets = np.arange(13, dtype=np.int32)
        metadata = PackMetadata(0, 0, 0, vocab_size, seq_len, puzzles + 1, 12, 1.0, ("all",))
        write_split(folder / split, metadata, {"all": PackSet(tokens, tokens, identifiers, offsets, offsets)})
    write_identifiers(folder, ["<blank>", *(f"{folder.name}-{number}" for number in range(puzzles))])
    return folder


def start(config: PretrainConfig) -> tuple[TrainState, Iterator[Batch]]:
    pack = open_pack(config.data_path, "train")
    loader = TrainLoader(pack, config.global_batch_size, config.seed, epochs_per_pass=config.epochs)
    return initial_state(config, pack, ALONE), loader.iterate(0)


def records(folder: Path | str | None) -> list[dict[str, float]]:
    assert folder is not None
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


CLOCKED = {"puzzles_per_second", "tflops", "data_wait"}


def without_clock(record: dict[str, float]) -> dict[str, float]:
    """What must be the same whenever and wherever it is computed."""
    return {name: value for name, value in record.items() if name not in CLOCKED | {"memory_gib", "mfu"}}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make waiting for the GPU an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
