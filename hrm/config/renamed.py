"""Old names of options: they go on working, with one line on stderr that gives the new name.

A schema has its old names beside its fields:

    RENAMED: ClassVar[OldNames] = {"rounds": "epochs", "no_stop": Renamed("stop", operator.not_)}

Several old options may stand together for one of today's (`Combined`), and some for none (`Dropped`).

They are translated wherever options come from: the command line, a YAML file, a mapping in Python, a run's own config.
A new name may have dots, for an option that moved into a group within its own: `{"rounds": "schedule.epochs"}`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeAlias, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass(frozen=True)
class Renamed:
    """The new name of an option whose values have changed too."""

    name: str
    value: Callable[[Any], Any]  # from the old value to the new one


@dataclass(frozen=True)
class Combined:
    """The option that several old ones together stand for; each of them has this beside its name."""

    name: str
    value: Callable[[Mapping[str, Any]], Any]  # from those of the old options that are given, by their names


@dataclass(frozen=True)
class Dropped:
    """An option of the published code, or of TRM's, that is not needed here: it is left out, and a line says why."""

    reason: str  # the end of a sentence


New: TypeAlias = str | Renamed | Combined | Dropped
OldNames: TypeAlias = Mapping[str, New]
Schemas: TypeAlias = Sequence[type]  # what a mapping may be: one schema, or those of all architectures

_told: set[tuple[str, str]] = set()


def find_renamed(name: str, schemas: Schemas) -> tuple[str, New] | None:
    """What the option with the dotted `name` is called now, as the name's group (`arch.`, or nothing) and the new name
    in it; None where the name is not an old one.
    """
    group, dot, last = name.rpartition(".")
    names = _old_names(_schemas_of(group, schemas))
    return (group + dot, names[last]) if last in names else None


def is_option(name: str, schemas: Schemas) -> bool:
    """Whether one of the schemas has an option of the dotted `name`."""
    group, _, last = name.rpartition(".")
    return any(last in getattr(schema, "__dataclass_fields__", {}) for schema in _schemas_of(group, schemas))


def _schemas_of(group: str, schemas: Schemas) -> Schemas:
    """Those that the dotted `group` within one of `schemas` may have."""
    for part in group.split(".") if group else ():
        schemas = list(schemas_below(schemas, part))
    return schemas


def with_new_names(config: Any, schemas: Schemas, prefix: str = "") -> Any:
    """`config` with the old names in it translated, all the way down. Where both names are given, the new one wins.

    Args:
        config: plain mappings and lists, of options of `schemas`; anything else is returned as it is.
        prefix: of the names in the line that is printed, such as `arch.`.
    """
    if isinstance(config, list):
        return [with_new_names(item, schemas, prefix) for item in config]
    if not isinstance(config, Mapping) or not schemas:
        return config
    names = _old_names(schemas)
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name not in names:
            below = list(schemas_below(schemas, str(name)))
            result[name] = with_new_names(value, below, f"{prefix}{name}.")
    old = {str(name): value for name, value in config.items() if name in names}
    for name in old:
        if isinstance(dropped := names[name], Dropped):
            tell_dropped(f"{prefix}{name}", dropped)
            continue
        new, value = new_name(names[name], old[name], {key: old[key] for key in old if names[key] is names[name]})
        tell(f"{prefix}{name}", f"{prefix}{new}")
        *groups, last = new.split(".")
        target = result
        for group in groups:
            target = target.setdefault(group, {})
        target.setdefault(last, value)
    return result


def new_name(new: New, value: Any, together: Mapping[str, Any]) -> tuple[str, Any]:
    """The new name and value of an option that was given as `value`, with all the old ones that it is combined with."""
    assert not isinstance(new, Dropped)
    if isinstance(new, Combined):
        return new.name, new.value(together)
    return (new.name, new.value(value)) if isinstance(new, Renamed) else (new, value)


def tell(old: str, new: str) -> None:
    """Print once, by one process of the job, that an option has a new name."""
    _note(old, f"{old} is called {new} now.")


def tell_dropped(old: str, dropped: Dropped) -> None:
    """Print once, by one process of the job, why an option is left out."""
    _note(old, f"{old} is left out: {dropped.reason}.")


def _note(old: str, sentence: str) -> None:
    if (old, sentence) not in _told and os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr, flush=True)
    _told.add((old, sentence))


def _old_names(schemas: Schemas) -> dict[str, New]:
    """Old names and what became of them, but for those that are the name of an option of another of the schemas."""
    fields = {name for schema in schemas for name in getattr(schema, "__dataclass_fields__", {})}
    renamed = [item for schema in schemas for item in getattr(schema, "RENAMED", {}).items()]
    return {old: new for old, new in renamed if old not in fields}


def schemas_below(schemas: Schemas, name: str) -> Iterator[type]:
    """The schemas that the group or list `name` within one of `schemas` may have."""
    for schema in schemas:
        if name not in getattr(schema, "__dataclass_fields__", {}):
            continue
        hint = get_type_hints(schema)[name]
        if hint is Any:  # such as `arch`: the schema is that of the YAML file which was chosen
            yield from schemas_of_group(name)
        else:
            yield from (kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind))


def schemas_of_group(group: str) -> Iterator[type]:
    """The schemas of the choices of a group that has several, such as the architectures, from Hydra's store."""
    store = ConfigStore.instance()
    if group in store.repo.get("schema", {}):
        for name in store.list(f"schema/{group}"):
            if (schema := OmegaConf.get_type(store.load(f"schema/{group}/{name}").node)) is not None:
                yield schema
