"""From mappings to typed objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from hrm.config.checks import neighbours
from hrm.config.renamed import with_new_names
from hrm.errors import UserError, first_sentence

T = TypeVar("T")


def to_typed(schema: type[T], values: Mapping[str, Any] | DictConfig, where: str) -> T:
    """Check `values` against the dataclass `schema` and return an instance.

    Args:
        where: what to call the mapping in an error, e.g. `arch`.

    Raises:
        UserError: for an unknown field, a wrong type, a missing or an impossible value.
    """
    typed = OmegaConf.structured(schema)
    values = with_new_names(
        OmegaConf.to_container(values) if isinstance(values, DictConfig) else values, [schema], f"{where}."
    )
    name = ""
    try:
        for name, value in ((str(key), value) for key, value in values.items()):
            OmegaConf.update(typed, name, value)
        result = OmegaConf.to_object(typed)
    except (ConfigKeyError, ConfigAttributeError) as error:
        unknown = str(error.full_key)
        raise UserError(f"{where} has no field {unknown}; {neighbours(unknown, option_names(typed))}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{error.full_key or name} is not usable: {first_sentence(error)}.") from error
    assert isinstance(result, schema)
    return result


def option_names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options in `config`."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        if not OmegaConf.is_missing(config, name) and isinstance(child := config._get_node(name), DictConfig):
            yield from option_names(child, f"{prefix}{name}.")
