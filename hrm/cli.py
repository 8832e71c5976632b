"""What the entry points share: Hydra in, one clear sentence out when something is wrong."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hrm.config import CONFIG_DIR, neighbours, option_names, register_schemas
from hrm.errors import UserError, first_sentence

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

# Values of these options are taken to the letter: Hydra would read 0530 as a number and choke on "=" or "(" in a path.
_LITERAL_OPTIONS = {
    *("checkpoint", "checkpoint_path", "data_path", "output_dir", "profile", "project_name", "puzzle", "report"),
    *("resume", "run_name"),
}

_KINDS = {"Float": "a number, such as 1e-4", "Integer": "a whole number", "Boolean": "true or false"}


def run(schema: type[T], config_name: str, task: Callable[[T], None]) -> None:
    """Compose `config/<config_name>.yaml` with the command line, check it against `schema`, and call `task`.

    A `UserError`, or a configuration that cannot be composed, ends in one sentence on stderr and exit status 2.
    """

    is_composed = False

    def checked_task(composed: DictConfig) -> None:
        nonlocal is_composed
        is_composed = True
        try:
            task(_typed(schema, composed))
        except UserError as error:
            _fail(str(error))

    register_schemas()
    for argument in sys.argv[1:]:
        if re.match(r"--\w[\w.]*=", argument):  # Hydra's own flags with a value have a dash inside
            _fail(f"{argument} is not how options are written: leave out the dashes, {argument[2:]}.")
        if argument.startswith("~"):
            _fail(f"{argument} cannot be used: options are changed, not removed; write {argument[1:]}=value.")
    sys.argv[1:] = [_quote_literal(argument) for argument in sys.argv[1:]]
    # Hydra's own reports run over many lines; with this set it lets the exceptions through to us.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(checked_task)()
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        if is_composed:
            raise
        _fail(_composition_error(error, config_name))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _typed(schema: type[T], composed: DictConfig) -> T:
    """The composed configuration as an instance of its schema, values checked."""
    if added := set(_added_options(composed)):
        option = min(added)
        raise UserError(f"there is no option {option}; {neighbours(option, set(option_names(composed)) - added)}")
    try:
        result = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} must be given: add {error.full_key}=... to the command line.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be used: {first_sentence(error)}.") from error
    assert isinstance(result, schema)
    return result


def _added_options(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Names that `+name=value` put beside a schema's own, which nothing would read."""
    object_type = OmegaConf.get_type(config)
    for name in map(str, config):
        if name not in getattr(object_type, "__dataclass_fields__", config):
            yield f"{prefix}{name}"
        elif not OmegaConf.is_missing(config, name) and isinstance(child := config._get_node(name), DictConfig):
            yield from _added_options(child, f"{prefix}{name}.")


def _quote_literal(argument: str) -> str:
    name, _, value = argument.partition("=")
    if name not in _LITERAL_OPTIONS or value in ("", "null") or value[0] in "'\"" or "${" in value:
        return argument
    # Between quotes, Hydra takes a backslash as itself, but for those that stand right before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), value)
    return f"{name}='{escaped}'"


def _composition_error(error: Exception, config_name: str) -> str:
    """One sentence for an exception that Hydra raised while it composed the configuration."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} on the command line cannot be read: write option=value, and quote unusual values."
    if match := re.search(r"Could not override '([^']+)'", text):
        option = match.group(1)
        return f"there is no option {option}; {neighbours(option, _known_options(config_name))}"
    if match := re.search(r"Error merging override ([^=]+)=(.*)", text):
        option, value = match.groups()
        reason = first_sentence(error.__cause__ or error)
        if "not a ListConfig" in reason:
            return f"{option}={value} cannot be used: it takes a list, so write {option}=[{value}]."
        if parts := [name for name in _known_options(config_name) if name.startswith(f"{option}.")]:
            return f"{option}={value} cannot be used: {option} stands for several options, {' and '.join(parts)}."
        if match := re.search(r"could not be converted to (\w+)", reason):
            return f"{option}={value} cannot be used: it takes {_KINDS[match.group(1)]}."
        return f"{option}={value} cannot be used: {reason}."
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = match.groups()
        choices = [path.stem for path in (CONFIG_DIR / group).glob("*.yaml")]
        return f"{group}={choice} is not a choice; {neighbours(choice, choices)}"
    return f"the configuration cannot be composed from {' '.join(sys.argv[1:])}: {first_sentence(error)}."


def _known_options(config_name: str) -> set[str]:
    """Options and groups that the command line of `config/<config_name>.yaml` may set."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = hydra.compose(config_name, return_hydra_config=True)
    groups = {group for group in map(str, composed.hydra.runtime.choices) if not group.startswith("hydra/")}
    options = {name for name in option_names(composed) if not name.startswith("hydra")}
    return options | groups
