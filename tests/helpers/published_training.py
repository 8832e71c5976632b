"""The published code trains, on the CPU and in a process of its own, from given weights on given batches.

    python -P published_training.py CHECKOUT GIVEN FOUND

GIVEN holds the `request` for `benchmarks.published_side.Published`, a state dict of `weights`, and `batches`; FOUND
gets the weights afterwards and each step's metrics. Both are files of `torch.save`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from published_side import Published, stand_in_for_what_is_missing  # type: ignore[import-not-found]

    checkout, given_file, found_file = map(Path, sys.argv[1:])
    given = torch.load(given_file, weights_only=True)
    torch.set_num_threads(1)
    stand_in_for_what_is_missing()
    code = Published(checkout, given["request"])
    code.take_weights(given["weights"])
    code.state.model.train()
    metrics = [code.train(batch) for batch in given["batches"]]
    numbers = [{name: float(value) for name, value in step.items()} for step in metrics]
    torch.save({"weights": code.state.model.state_dict(), "metrics": numbers}, found_file)
