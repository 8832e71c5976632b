"""Checks of options' values: each ends in a sentence that names the option, its value and what to give."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from hrm.errors import UserError

# What other programs call our options.
ELSEWHERE = {
    "batch_size": "global_batch_size",
    "ckpt": "checkpoint",
    "dataset": "data",
    "learning_rate": "lr",
    "model": "arch",
    "num_epochs": "epochs",
    "optimizer": "optim",
    "warmup_steps": "lr_warmup_steps",
    "workers": "num_workers",
}


def neighbours(name: str, known: Iterable[str]) -> str:
    """The part of an error sentence that says what a misspelt `name` may have meant."""
    known = sorted(set(known) - {name})  # another architecture may have it
    if (elsewhere := ELSEWHERE.get(name)) in known:
        return f"did you mean {elsewhere}?"
    # Options nest: `hidden_size` should find `arch.hidden_size` too.
    by_last_part = {option.rpartition(".")[2]: option for option in known}
    close = difflib.get_close_matches(name, known, n=3) or [
        by_last_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=3)
    ]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are: {', '.join(known)}." if len(known) <= 12 else "--help lists them."


def choice(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{option}={value} is not a choice; {neighbours(value, allowed)}")


def at_least(option: str, value: float, least: float) -> None:
    if not value >= least:
        raise UserError(f"{option}={value} is too small: give at least {least}.")
    if value == math.inf:
        raise UserError(f"{option}={value} is too large: give a finite number.")


MOST_REPEATS = 10_000
MOST_UPDATES = 1_000
MOST_WORKERS = 1_024


def sane_counts(prefix: str, options: object) -> None:
    """Refuse counts of layers, cycles, steps and tokens that can only be a mistake, or of a file that means harm.

    Args:
        prefix: of the options' names.
        options: a dataclass.
    """
    updates = 1
    for name, value in vars(options).items():
        if type(value) is int and name.endswith(("_layers", "_cycles", "_steps", "_len")) and value > MOST_REPEATS:
            raise UserError(f"{prefix}{name}={value} is too large: give at most {MOST_REPEATS}.")
        if type(value) is int and name.endswith("_cycles"):
            updates *= max(value, 1)
    if updates > MOST_UPDATES:
        raise UserError(
            f"{prefix}*_cycles stand for {updates} updates in an ACT step or more: give fewer, for {MOST_UPDATES}."
        )


def at_most(option: str, value: float, most: float) -> None:
    if value > most:
        raise UserError(f"{option}={value} is too large: give at most {most}.")


def positive(option: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{option}={value} is out of range: give a finite number above 0.")


def fraction(option: str, value: float, *, below_one: bool = False) -> None:
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise UserError(
            f"{option}={value} is out of range: give a number from 0 {'to below' if below_one else 'to'} 1."
        )
