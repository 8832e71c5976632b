"""The entry points as functions: options in, metrics out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hrm.config import EvaluateConfig, PretrainConfig
from hrm.config.compose import compose
from hrm.errors import UserError

Options = Mapping[str, Any]


def train(options: Options | None = None, /, **more: Any) -> dict[str, Any]:
    """Train a model as `hrm train` does.

    Args:
        options: those of the command line, by their names: `{"experiment": "sudoku_demo", "arch.hidden_size": 64}`.
            Groups may be given as a mapping too: `{"arch": {"hidden_size": 64}}`.
        more: further options, whose names have no dots.

    Returns:
        The metrics of the last evaluation by the names they are logged under, such as `all/exact_accuracy`; the last
        `step`; and `checkpoint_path`, the run folder, which `from_pretrained` takes.

    Raises:
        UserError: an option does not exist or cannot be used, or training cannot go on.
    """
    from hrm.training.loop import pretrain

    result = pretrain(compose(PretrainConfig, "pretrain", overrides({**(options or {}), **more})))
    return {
        **{
            f"{set_name}/{name}": value for set_name, of_set in result.metrics.items() for name, value in of_set.items()
        },
        "step": result.step,
        "checkpoint_path": str(result.folder),
    }


def evaluate(options: Options | None = None, /, **more: Any) -> dict[str, float]:
    """Evaluate a model on a test split as `hrm evaluate` does.

    Args:
        options, more: as in `train`; `checkpoint` must be among them.

    Returns:
        The metrics by the names they are printed under, such as `all/exact_accuracy`, and `puzzles_per_second`. With
        `act=both` those with early halting begin with `halt/`.

    Raises:
        UserError: as `train`.
    """
    from hrm.evaluation.command import evaluate_checkpoint

    config = compose(EvaluateConfig, "evaluate", overrides({**(options or {}), **more}))
    for name in ("puzzle", "input"):
        if getattr(config, name) is not None:
            raise UserError(f"{name} is not for evaluate(): take from_pretrained(checkpoint).predict(...).")
    return evaluate_checkpoint(config)


def overrides(options: Options) -> list[str]:
    """Options as a command line has them."""
    return [f"{name}={_written(value)}" for name, value in _flat(options)]


def _flat(options: Options, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if not isinstance(name, str):
            raise UserError(f"{name!r} is no name of an option: give a string.")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{_written(each)}' for name, each in value.items())}}}"
    # Between quotes, Hydra takes a backslash as itself, but for those that stand right before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), str(value))
    return f"'{escaped}'"
