"""TRM's own loader, model and loss on the CPU, run as a process of its own in a checkout of its code.

    python trm_side.py train PACK FOLDER STEPS
    python trm_side.py evaluate PACK WEIGHTS

Prints the metrics of the test split as JSON. `train` leaves `step_<n>` and `all_config.yaml` as TRM's `pretrain.py`,
which needs CUDA, does. The checkout is in PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

# Its loader imports this for a command line that is not used here.
argdantic = ModuleType("argdantic")
argdantic.ArgParser = object  # type: ignore[attr-defined]
sys.modules["argdantic"] = argdantic

from models.losses import ACTLossHead  # type: ignore[import-not-found]  # noqa: E402
from models.recursive_reasoning.trm import TinyRecursiveReasoningModel_ACTV1  # type: ignore[import-not-found]  # noqa: E402
from models.sparse_embedding import (  # type: ignore[import-not-found]  # noqa: E402
    CastedSparseEmbeddingSignSGD_Distributed,
)
from puzzle_dataset import PuzzleDataset, PuzzleDatasetConfig  # type: ignore[import-not-found]  # noqa: E402

BATCH = 6
ARCH: dict[str, Any] = {
    "H_cycles": 2,
    "L_cycles": 2,
    "H_layers": 0,
    "L_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "expansion": 4,
    "puzzle_emb_ndim": 32,
    "puzzle_emb_len": 2,
    "pos_encodings": "rope",
    "halt_max_steps": 3,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "float32",
    "mlp_t": False,
    "no_ACT_continue": True,
}
COMPILED = "_orig_mod."  # what torch.compile puts before names


def dataset(pack: str, split: str, epochs: int = 1) -> PuzzleDataset:
    options = PuzzleDatasetConfig(
        seed=0,
        dataset_paths=[pack],
        global_batch_size=BATCH,
        test_set_mode=split == "test",
        epochs_per_iter=epochs,
        rank=0,
        num_replicas=1,
    )
    return PuzzleDataset(options, split=split)


def new_model(pack: str, arch: dict[str, Any]) -> ACTLossHead:
    about = dataset(pack, "train").metadata
    sizes = {name: getattr(about, name) for name in ("seq_len", "vocab_size", "num_puzzle_identifiers")}
    model = TinyRecursiveReasoningModel_ACTV1({**arch, **sizes, "batch_size": BATCH})
    return ACTLossHead(model, loss_type="stablemax_cross_entropy")


def metrics_of(model: ACTLossHead, pack: str) -> dict[str, float]:
    """As its `evaluate` computes them."""
    sums: dict[str, float] = {}
    model.eval()
    with torch.inference_mode():
        for _, batch, _ in dataset(pack, "test"):
            carry, all_finish = model.initial_carry(batch), False
            while not all_finish:
                carry, _, metrics, _, all_finish = model(carry=carry, batch=batch, return_keys=[])
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in metrics.items()}
    count = sums.pop("count")
    return {name: value / count for name, value in sums.items()}


def train(pack: str, folder: Path, steps: int) -> ACTLossHead:
    torch.manual_seed(0)
    model = new_model(pack, ARCH)
    dense = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparse = CastedSparseEmbeddingSignSGD_Distributed(model.model.puzzle_emb.buffers(), lr=0.1, world_size=1)
    model.train()
    carry = None
    for _, (_, batch, size) in zip(range(steps), dataset(pack, "train", epochs=steps), strict=False):
        carry = model.initial_carry(batch) if carry is None else carry
        carry, loss, _, _, _ = model(carry=carry, batch=batch, return_keys=[])
        (loss / size).backward()
        for optimizer in (sparse, dense):
            optimizer.step()
            optimizer.zero_grad()
    folder.mkdir()
    weights = {COMPILED + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, folder / f"step_{steps}")
    arch = {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        **ARCH,
    }
    config = {"arch": arch, "data_paths": [pack], "data_paths_test": [], "evaluators": [], "global_batch_size": BATCH}
    config |= {"ema": True, "ema_rate": 0.999, "freeze_weights": False, "load_checkpoint": None, "min_eval_interval": 0}
    (folder / "all_config.yaml").write_text(yaml.dump(config))
    return model


def main(command: str, pack: str, path: str, steps: str = "0") -> None:
    if command == "train":
        model = train(pack, Path(path), int(steps))
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model = new_model(pack, ARCH)
        model.load_state_dict({name.removeprefix(COMPILED): tensor for name, tensor in weights.items()})
    print(json.dumps(metrics_of(model, pack)))


if __name__ == "__main__":
    main(*sys.argv[1:])
