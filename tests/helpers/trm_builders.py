"""TRM's own builders, run as a process of its own in a checkout of its code, which is in PYTHONPATH.

    python trm_builders.py dataset.build_arc_dataset OPTIONS
    python trm_builders.py build_sudoku_dataset OPTIONS

OPTIONS are JSON. Files that a builder takes from the hub are looked for in the folder that `source_repo` names.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub


class ArgParser:
    """Stands for argdantic's, which turns a function into a command line: here it stays a function."""

    def command(self, singleton: bool) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        return lambda function: function


argdantic = ModuleType("argdantic")
argdantic.ArgParser = ArgParser  # type: ignore[attr-defined]
sys.modules["argdantic"] = argdantic
huggingface_hub.hf_hub_download = lambda repo, file, repo_type: str(Path(repo) / file)


def main(module: str, options: str) -> None:
    sys.path.append("dataset")  # the Sudoku and maze builders are scripts of this folder
    builder = importlib.import_module(module)
    config = builder.DataProcessConfig(**json.loads(options))
    build = getattr(builder, "main", None) or builder.preprocess_data
    build(config)


if __name__ == "__main__":
    main(*sys.argv[1:])
