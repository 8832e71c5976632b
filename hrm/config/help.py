"""What `--help` of the entry points prints: examples, the groups and their choices, the options and their meanings."""

from __future__ import annotations

import re
import shutil
import string
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from hrm.config.meanings import meanings, summary
from hrm.config.paths import choices_of
from hrm.errors import without_secrets

_MOST_COLUMNS = 120
_FIRST_COLUMN = 38


class Option(NamedTuple):
    """An option as it stands in a composed configuration."""

    name: str  # with dots
    value: str  # as it is typed
    meaning: str


class Section(NamedTuple):
    """Options that stand together: those of the entry point itself, or of a group."""

    name: str  # of the group, or nothing
    summary: str
    options: list[Option]


def help_page(composed: DictConfig, program: str, folders: tuple[Path, ...] = ()) -> str:
    """The page for a configuration as it was composed, with Hydra's own part.

    Args:
        program: what is typed before the options, such as `python pretrain.py`.
        folders: with YAML files beside those of the package.
    """
    in_torchrun = program.removeprefix("python ") if program.startswith("python ") else f"-m {program}"
    page = string.Template(_in_columns(composed.hydra.help.template, program, in_torchrun)).safe_substitute(
        APP_CONFIG_GROUPS="\n".join(_group_lines(composed, folders)),
        CONFIG="\n".join(_option_lines(composed)),
    )
    return page.rstrip()


def _in_columns(template: str, program: str, in_torchrun: str) -> str:
    """The template with its command lines filled in and the explanations that follow two spaces each in one column."""
    rows = [re.split(r"(?<=\S) {2,}", line) for line in template.splitlines()]
    examples = [row for row in rows if "$PROGRAM" in row[0] or "$IN_TORCHRUN" in row[0]]
    for row in examples:
        row[0] = string.Template(row[0]).safe_substitute(PROGRAM=program, IN_TORCHRUN=in_torchrun)
    width = max((len(row[0]) for row in examples if len(row) > 1), default=0)
    return "\n".join("  ".join([row[0].ljust(width) if len(row) > 1 else row[0], *row[1:]]) for row in rows)


def groups_in(composed: DictConfig) -> list[str]:
    """The groups that a composed configuration chooses from, whether or not something is chosen."""
    return [group for group in map(str, composed.hydra.runtime.choices) if not group.startswith("hydra/")]


def sections(composed: DictConfig, prefix: str = "") -> Iterator[Section]:
    """The options of a composed configuration by group, those outside all groups first."""
    schema = OmegaConf.get_type(composed)
    assert schema is not None
    meaning_of = meanings(schema)
    names = [name for name in map(str, composed) if name in meaning_of]
    groups = [name for name in names if _is_group(composed, name)]
    options = [
        Option(f"{prefix}{name}", value_text(composed, name), meaning_of[name]) for name in names if name not in groups
    ]
    yield Section(prefix.rstrip("."), summary(schema), options)
    for name in groups:
        yield from sections(composed[name], f"{prefix}{name}.")


def value_text(composed: DictConfig, name: str) -> str:
    """An option's value as one would type it, passwords left out; `???` where it must be given."""
    if OmegaConf.is_missing(composed, name):
        return "???"
    value = composed[name]
    text = typed_text(OmegaConf.to_container(value) if isinstance(value, ListConfig) else value)
    return without_secrets(text) if "://" in text else text


def typed_text(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return f"[{','.join(map(typed_text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{typed_text(part)}" for name, part in value.items() if part is not None) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_group(composed: DictConfig, name: str) -> bool:
    return not OmegaConf.is_missing(composed, name) and isinstance(composed._get_node(name), DictConfig)


def _group_lines(composed: DictConfig, folders: tuple[Path, ...]) -> Iterator[str]:
    for group in sorted(groups_in(composed)):
        line = f"{group}: {', '.join(sorted(choices_of(group, folders)))}"
        yield from textwrap.wrap(line, _columns(), subsequent_indent="    ", break_long_words=False)


def _option_lines(composed: DictConfig) -> Iterator[str]:
    for section in sections(composed):
        if section.name:
            yield ""
            yield from textwrap.wrap(f"{section.name}: {section.summary}", _columns(), subsequent_indent="    ")
        for option in section.options:
            start = f"  {option.name}={option.value}"
            lines = textwrap.wrap(option.meaning, _columns() - _FIRST_COLUMN) or [""]
            if len(start) >= _FIRST_COLUMN:
                yield start
            else:
                lines[0] = f"{start:<{_FIRST_COLUMN}}{lines[0]}"
                yield lines.pop(0).rstrip()
            yield from (f"{'':<{_FIRST_COLUMN}}{line}" for line in lines)


def _columns() -> int:
    return min(max(shutil.get_terminal_size((_MOST_COLUMNS, 24)).columns, 2 * _FIRST_COLUMN), _MOST_COLUMNS)
