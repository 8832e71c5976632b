"""Train a model: `hrm train experiment=sudoku_demo`, with any option of `pretrain.py`.

The options, their groups and their defaults are those of `python pretrain.py`, with one difference: a command line
that says nothing of what to train runs the demo recipe and not the published ARC run, whose pack takes 7 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

DEMO = "experiment=sudoku_demo"
_WHAT_TO_TRAIN = ("arch", "arch.name", "data", "data_path", "experiment")


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import PretrainConfig
    from hrm.config.compose import run
    from hrm.training.loop import pretrain
    from hrm.training.sweep import sweep_table

    run(PretrainConfig, "pretrain", pretrain, "hrm train", with_recipe(argv), sweep_table)
    return 0


def with_recipe(argv: Sequence[str]) -> list[str]:
    """The arguments, with the demo recipe where none of them says what to train."""
    named = {argument.lstrip("+").partition("=")[0] for argument in argv}
    if named & {*_WHAT_TO_TRAIN, "--help", "-h", "--hydra-help", "--version", "--config-name", "-cn"}:
        return list(argv)
    print(
        f"Nothing says what to train, so this is the demo, {DEMO}: a small model for 4x4 Sudoku, minutes on a laptop "
        "CPU. `hrm train --help` lists the other recipes (experiment=), packs (data=) and models (arch=).",
        flush=True,
    )
    return [DEMO, *argv]
