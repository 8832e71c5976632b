"""From a command line to typed options: Hydra in, one clear sentence out when something is wrong."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hrm.config.checks import neighbours
from hrm.config.help import help_page
from hrm.config.paths import CONFIG_DIR, choices_of, groups_of
from hrm.config.renamed import Combined, Dropped, find_renamed, is_option, new_name, tell, tell_dropped
from hrm.config.store import SCHEMAS, register_schemas
from hrm.config.submitted import is_job, join_tasks, launches_jobs
from hrm.config.typed import option_names
from hrm.config.yaml_files import read_old_names
from hrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, first_sentence
from hrm.output import unbreakable_output
from hrm.unforeseen import EXIT_UNFORESEEN, unforeseen
from hrm.unforeseen import tell as tell_error

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SweptRun(Generic[R]):
    """One of several runs by `-m` that came to its end."""

    overrides: tuple[str, ...]  # its own, as on a command line
    result: R

    def __reduce__(self) -> tuple[Callable[[tuple[str, ...], R], SweptRun[R]], tuple[tuple[str, ...], R]]:
        return _from_elsewhere, (self.overrides, self.result)


# A launcher that runs a sweep in other processes brings back what they return as pickles, and Hydra hands that to
# nobody. So a run that is read from one is noted here.
_ended_elsewhere: list[SweptRun[Any]] = []


def _from_elsewhere(overrides: tuple[str, ...], result: R) -> SweptRun[R]:
    run = SweptRun(overrides, result)
    _ended_elsewhere.append(run)
    return run


# Values of these options are taken to the letter: Hydra would read 0530 as a number and choke on "=" or "(" in a path.
_LITERAL_OPTIONS = {
    *("checkpoint", "checkpoint_path", "data_path", "freeze", "init_from", "input", "output", "output_dir", "profile"),
    *("memory", "project_name", "puzzle", "report", "results", "resume", "run_name"),
}

_KINDS = {"Float": "a number, such as 1e-4", "Integer": "a whole number", "Boolean": "true or false"}

# Hydra's own flags, by whether a value follows.
_FLAGS = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--info", "-i", "--multirun", "-m", "--resolve"), False),
    **dict.fromkeys(("--run", "-r", "--shell-completion", "-sc", "--version"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--experimental-rerun"), True),
}


@unbreakable_output()  # as in `pretrain.py --help | head`
def run(
    schema: type[T],
    config_name: str,
    task: Callable[[T], R],
    program: str,
    argv: Sequence[str] | None = None,
    sweep_table: Callable[[Sequence[SweptRun[R]]], str] | None = None,
) -> None:
    """Compose `config/<config_name>.yaml` with a command line, check it against `schema`, and call `task`.

    A `UserError`, or a configuration that cannot be composed, ends in one sentence on stderr and exit status 2.
    `--help` prints the options with their meanings instead.

    Args:
        program: what is typed before the options, such as `python pretrain.py`.
        argv: the command line; default: the process's own.
        sweep_table: what to print at the end of several runs by `-m`, also where one of them failed.
    """
    is_composed = False
    swept: list[SweptRun[R]] = []
    _ended_elsewhere.clear()

    def checked_task(composed: DictConfig) -> SweptRun[R] | None:
        nonlocal is_composed
        is_composed = True
        is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        is_elsewhere = is_sweep and is_job()
        try:
            if is_elsewhere:
                join_tasks()
            result = task(_typed(schema, composed))
        except UserError as error:
            sentence, status = str(error), EXIT_USER_ERROR
        except Exception as error:
            sentence, status = unforeseen(error), EXIT_UNFORESEEN
        else:
            if not is_sweep or os.environ.get("RANK", "0") != "0":
                return None
            swept.append(SweptRun(tuple(HydraConfig.get().overrides.task), result))
            return swept[-1]
        tell_error(sentence)
        if is_elsewhere:  # the launcher brings it to the process that waits for all runs
            raise UserError(sentence)
        sys.exit(status)

    _register()
    try:
        arguments = _Arguments.parse(config_name, list(sys.argv[1:] if argv is None else argv))
        if arguments.wants_help:
            composed = compose_untyped(config_name, arguments.overrides, arguments.folders, with_hydra=True)
            print(help_page(composed, program, arguments.folders))
            return
        as_jobs = launches_jobs(arguments.overrides, is_sweep=bool({"-m", "--multirun"} & {*arguments.all}))
    except UserError as error:
        fail(str(error))
    sys.argv[1:] = arguments.all
    # Hydra's own reports run over many lines; with this set it lets the exceptions through to us.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(checked_task)()
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        if is_composed:
            raise
        fail(_composition_error(error, config_name, arguments.all, arguments.folders))
    except UserError as error:  # of a run elsewhere
        fail(str(error))
    except RuntimeError as error:
        if not as_jobs:
            raise
        fail(f"a run of the sweep ended without a result: {first_sentence(error)}.")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        ended = [*swept, *_ended_elsewhere]
        if sweep_table and ended:
            print(sweep_table(ended), flush=True)


def compose(schema: type[T], config_name: str, overrides: Sequence[str] = ()) -> T:
    """The options that a command line of these overrides would give.

    Raises:
        UserError: they cannot be composed, or a value is of no use.
    """
    _register()
    arguments = _Arguments.parse(config_name, list(overrides))
    return _typed(schema, compose_untyped(config_name, arguments.overrides, arguments.folders))


def fail(sentence: str) -> NoReturn:
    """End the process with one sentence on stderr and status 2."""
    tell_error(sentence)
    sys.exit(EXIT_USER_ERROR)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the command line


class _Arguments:
    """A command line: overrides and Hydra's flags, checked for how they are written and ready for Hydra."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self.overrides: list[str] = []
        self.folders: tuple[Path, ...] = ()  # of further YAML files
        self.wants_help = False
        self._combined: dict[tuple[str, Combined], dict[str, Any]] = {}  # old options, by the group and what they mean

    @classmethod
    def parse(cls, config_name: str, argv: list[str]) -> _Arguments:
        """Raises `UserError` for arguments that are not written as options are."""
        result = cls()
        rest = list(argv)
        while rest:
            argument = rest.pop(0)
            flag, equals, value = argument.partition("=")
            if flag in _FLAGS:
                taken = [rest.pop(0)] if _FLAGS[flag] and not equals and rest else []
                if flag in ("--config-dir", "-cd"):
                    result._add_folder(value if equals else "".join(taken))
                result.wants_help |= flag in ("--help", "-h")
                result.all += [argument, *taken]
                continue
            _check_form(argument, rest, config_name, result.folders)
            result._add_override(argument, SCHEMAS[config_name])
        for (group, combined), given in result._combined.items():
            value = new_name(combined, None, given)[1]
            override = f"{group}{combined.name}={json.dumps(value)}"
            result.overrides.insert(0, override)
            result.all.insert(0, override)  # Hydra takes no overrides behind its flags
        return result

    def _append(self, override: str) -> None:
        self.overrides.append(override)
        self.all.append(override)

    def _add_override(self, argument: str, schema: type) -> None:
        """Add an override, by the option's new name where it was given by an old one."""
        name, _, value = argument.lstrip("+").partition("=")
        if (found := find_renamed(name, [schema])) is None:
            # The published command lines add `+run_name=...`, which there was no option for; here there is one.
            self._append(_quote_literal(f"{name}={value}" if is_option(name, [schema]) else argument))
            return
        group, new = found
        if isinstance(new, Dropped):
            tell_dropped(name, new)
        elif isinstance(new, str):
            tell(name, f"{group}{new}")
            self._append(_quote_literal(f"{group}{new}={value}"))
        else:
            try:
                given = OverridesParser.create().parse_override(argument).value()
                if isinstance(new, Combined):
                    tell(name, f"{group}{new.name}")
                    self._combined.setdefault((group, new), {})[name.removeprefix(group)] = given
                    return
                renamed, given = new_name(new, given, {})
            except Exception as error:
                raise UserError(f"{argument} cannot be used: {first_sentence(error)}.") from error
            tell(name, f"{group}{renamed}")
            self._append(f"{group}{renamed}={json.dumps(given)}")

    def _add_folder(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder} is not a folder: give one with YAML files in it, by group.")
        self.folders += (Path(folder).resolve(),)


def _check_form(argument: str, rest: list[str], config_name: str, folders: tuple[Path, ...]) -> None:
    """UserError for what shells, other programs' habits and slips make of `option=value`."""
    if argument.startswith("-") and argument != "-":
        option = argument.lstrip("-")
        example = option if "=" in option else f"{option}=..."
        if "=" not in option and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            raise UserError(f"{argument} {rest[0]} is not how options are written: {option}={rest[0]}.")
        raise UserError(f"{argument} is not how options are written: leave out the dashes, {example}.")
    if argument.startswith("~"):
        raise UserError(f"{argument} cannot be used: options are changed, not removed; write {argument[1:]}=value.")
    if rest and (rest[0] == "=" or rest[0].startswith("=") or (argument.endswith("=") and "=" not in rest[0])):
        written = " ".join([argument, *rest[: 2 if rest[0] == "=" else 1]])
        raise UserError(f"{written!r} has spaces around the equals sign: write {re.sub(r' *= *', '=', written)}.")
    if "=" in argument:
        return
    if groups := [group for group in groups_of(folders) if argument in choices_of(group, folders)]:
        meant = " or ".join(f"{group}={argument}" for group in groups)
    elif config_name == "evaluate":
        meant = f"checkpoint={argument}"
    else:
        raise UserError(f"{argument!r} on the command line cannot be read: write option=value.")
    raise UserError(f"{argument!r} on the command line cannot be read: did you mean {meant}?")


def _quote_literal(argument: str) -> str:
    name, _, value = argument.partition("=")
    if name not in _LITERAL_OPTIONS or value in ("", "null") or value[0] in "'\"" or "${" in value:
        return argument
    # Between quotes, Hydra takes a backslash as itself, but for those that stand right before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), value)
    return f"{name}='{escaped}'"


# ---------------------------------------------------------------------------------------------------------------------
# Composing and checking


def _register() -> None:
    register_schemas()
    read_old_names(list(SCHEMAS.values()))


def compose_untyped(
    config_name: str, overrides: Sequence[str] = (), folders: tuple[Path, ...] = (), *, with_hydra: bool = False
) -> DictConfig:
    """What Hydra makes of the overrides, before values are checked.

    Args:
        folders: with YAML files beside those of the package.
        with_hydra: keep Hydra's own part, which says what was chosen of each group.

    Raises:
        UserError: it makes nothing of them.
    """
    _register()
    more = [f"hydra.searchpath=[{','.join(map(str, folders))}]"] if folders else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose(config_name, overrides=[*more, *overrides], return_hydra_config=with_hydra)
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(_composition_error(error, config_name, overrides, folders)) from error


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


def _composition_error(
    error: Exception, config_name: str, arguments: Sequence[str], folders: tuple[Path, ...] = ()
) -> str:
    """One sentence for an exception that Hydra raised while it composed the configuration."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} on the command line cannot be read: write option=value, and quote unusual values."
    if match := re.search(r"Could not override '([^']+)'", text):
        option = match.group(1)
        return f"there is no option {option}; {neighbours(option, _known_options(config_name, arguments, folders))}"
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
        choices = choices_of(group, folders)
        for name, path in choices.items():  # a choice says in its comments what it stands for
            if re.search(rf"^#.*\b{re.escape(f'{group}={choice}')}(?![\w=])", path.read_text(encoding="utf-8"), re.M):
                return f"{group}={choice}, as other code has it, is not here; the nearest is {group}={name}."
        return f"{group}={choice} is not a choice; {neighbours(choice, choices)}"
    if match := re.search(r"In '([^']+)': \w+ raised while composing config:\s+Key '([^']+)' not in", text):
        file, option = match.groups()
        return f"{file}.yaml sets {option}, which is no option; {neighbours(option, _known_options(config_name))}"
    if match := re.search(r"In '([^']+)': \w+ raised while composing config:\s+(.*)", text):
        return f"{match.group(1)}.yaml cannot be used: {first_sentence(ValueError(match.group(2)))}."
    return f"the configuration cannot be composed from {' '.join(arguments)}: {first_sentence(error)}."


def _known_options(config_name: str, arguments: Sequence[str] = (), folders: tuple[Path, ...] = ()) -> set[str]:
    """Options and groups that the command line of `config/<config_name>.yaml` may set.

    Args:
        arguments: a command line, of which the choices in groups count: options of `arch` are those of its choice.
        folders: with YAML files of the user's.
    """
    composed = compose_untyped(config_name, (), (), with_hydra=True)
    groups = {group for group in map(str, composed.hydra.runtime.choices) if not group.startswith("hydra/")}
    if chosen := [argument for argument in arguments if argument.partition("=")[0] in groups]:
        with suppress(UserError):  # a choice that is none: another sentence says so
            composed = compose_untyped(config_name, chosen, folders, with_hydra=True)
    options = {name for name in option_names(composed) if not name.startswith("hydra")}
    return options | groups
