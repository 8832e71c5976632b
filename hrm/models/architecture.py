"""What an architecture's file says of itself, and the architectures that are found."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from hrm.config.checks import neighbours
from hrm.config.typed import to_typed
from hrm.errors import UserError, shortened

if TYPE_CHECKING:
    from hrm.models.recurrent import RecurrentConfig, RecurrentModel


@dataclass(frozen=True)
class Architecture:
    """A file of `hrm/models` calls it `ARCHITECTURE`. `config/arch/<x>.yaml` says `- /schema/arch/<file>@_here_`."""

    config: type[RecurrentConfig]  # whose default `name` is what configs call the architecture
    model: Callable[..., RecurrentModel]  # (config, sizes of the data, generator)
    old_schemas: tuple[str, ...] = ()  # what YAML files called its schema before
    other_names: tuple[str, ...] = ()  # what it is called in the configs of other code whose weights it takes
    nearest_to: tuple[str, ...] = ()  # architectures of other code that are not here, but that it is the nearest to

    @property
    def name(self) -> str:
        return str(self.config.__dataclass_fields__["name"].default)


@functools.cache
def architectures() -> dict[str, Architecture]:
    """The architectures that there are, by their files' names: all files of this folder with an `ARCHITECTURE`."""
    package = importlib.import_module(__package__ or "")
    modules = {
        info.name: importlib.import_module(f"{__package__}.{info.name}") for info in iter_modules(package.__path__)
    }
    return {name: module.ARCHITECTURE for name, module in modules.items() if "ARCHITECTURE" in vars(module)}


def register_architectures() -> None:
    """Let YAML files name the architectures' options, as /schema/arch/<file>."""
    store = ConfigStore.instance()
    for file, architecture in architectures().items():
        for name in (file, *architecture.old_schemas):
            store.store(group="schema/arch", name=name, node=architecture.config)


def architecture_of(config: RecurrentConfig) -> Architecture:
    """The architecture whose options these are."""
    return next(found for found in architectures().values() if found.config is type(config))


def arch_config(
    arch: Mapping[str, Any] | DictConfig,
    from_data: Mapping[str, int] | None = None,
    where: str = "arch",
) -> RecurrentConfig:
    """The typed architecture, from a mapping with the fields of a `config/arch/*.yaml`; without a `name`, HRM's.

    Published configs, and those that earlier versions saved, are read too. Some also carry what really comes from the
    data (`seq_len`, `vocab_size`, ...): such fields are accepted where they agree with `from_data`. `where` names the
    mapping in errors.

    Raises:
        UserError: for unknown fields, wrong types, impossible values, or a contradiction with the data.
    """
    values = dict(OmegaConf.to_container(arch, resolve=True) if isinstance(arch, DictConfig) else arch)  # type: ignore[arg-type]
    for name in ("batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers"):
        claimed, real = values.pop(name, None), (from_data or {}).get(name)
        if None not in (claimed, real) and claimed != real:
            raise UserError(f"arch.{name}={claimed} contradicts the data, which has {real}: drop it from arch.")
    known = {found.name: found for found in architectures().values()}
    wanted = values.get("name", architectures()["hrm"].name)
    for found in known.values():
        if wanted in found.other_names:
            wanted = values["name"] = found.name
        if wanted in found.nearest_to:
            raise UserError(
                f"{where}.name={wanted} is an architecture of other code that is not here, and its weights fit none "
                f"that is: the nearest to train is {found.name}."
            )
    if not isinstance(wanted, str) or wanted not in known:
        raise UserError(f"{where}.name={shortened(wanted)} is not a choice; {neighbours(str(wanted), known)}")
    schema = known[wanted].config
    return to_typed(schema, schema.from_saved(values), where)
