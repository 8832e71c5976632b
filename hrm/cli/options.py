"""Print every option with its default and meaning, as the Markdown page docs/options.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HEAD = """\
# Options

All that can be set on the command lines of `pretrain.py` and `evaluate.py` (`hrm train` and `hrm evaluate` in a package
that was installed), of `hrm serve`, `hrm export` and `hrm quantize`, as `option=value`, and in YAML files of your own,
in a folder given by `--config-dir`. A group is a choice among YAML files, `group=choice`, each of which sets options;
what is typed wins over what a file sets.

Made by `hrm options > docs/options.md` from the comments beside the options in the source.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="hrm options", description=__doc__)
    parser.parse_args(argv)
    print(page())
    return 0


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    described: set[str] = set()
    for title, command, config_name in (
        ("Training", "pretrain.py", "pretrain"),
        ("Evaluation", "evaluate.py", "evaluate"),
        ("Service", "hrm serve", "serve"),
        ("Export", "hrm export", "export"),
        ("8 bit", "hrm quantize", "quantize"),
    ):
        lines += [f"## {title}: `{command}`", "", *_entry_point(config_name, described)]
    return "\n".join(lines).rstrip()


def _entry_point(config_name: str, described: set[str]) -> Iterator[str]:
    """Options and groups of an entry point; groups are added to `described`, and referred to if they are in it."""
    from hrm.config.compose import compose_untyped
    from hrm.config.help import groups_in, sections

    composed = compose_untyped(config_name, with_hydra=True)
    groups = sorted(groups_in(composed))
    own, *others = sections(composed)
    yield from _table(own.options)
    for section in others:  # such as `parallel`, which is no choice among files; groups follow
        if section.name.partition(".")[0] not in groups:
            yield from ("", f"### {section.name}", "", section.summary, "", *_table(section.options))
    for group in groups:
        if group in described:
            yield from ("", f"### {group}=", "", "As in training, above.")
        else:
            yield from ("", *_group(group, config_name))
        described.add(group)
    yield ""


def _group(group: str, config_name: str) -> Iterator[str]:
    """A group's choices, what each sets, and the options of each schema among them."""
    from omegaconf import OmegaConf

    from hrm.config.compose import compose_untyped
    from hrm.config.help import Section, sections
    from hrm.config.paths import choices_of

    default = compose_untyped(config_name, with_hydra=True).hydra.runtime.choices[group]
    yield from (f"### {group}=", "", "| choice | what it is | sets |", "|---|---|---|")
    by_schema: dict[type, list[str]] = {}
    files = choices_of(group)
    for choice in sorted(files, key=lambda name: (name != default, name)):
        name = f"`{choice}`" + (", the default" if choice == default else "")
        yield f"| {name} | {_escaped(_head_comment(files[choice]))} | {_escaped(_settings(files[choice]))} |"
        node = compose_untyped(config_name, [f"{group}={choice}"]).get(group)
        if node is not None and (schema := OmegaConf.get_type(node)) is not None:
            by_schema.setdefault(schema, []).append(choice)
    for choices in by_schema.values():
        found: list[Section] = []
        for section in sections(compose_untyped(config_name, [f"{group}={choices[0]}"])):
            if section.name.partition(".")[0] == group:
                found.append(section)
        which = f" of `{'`, `'.join(f'{group}={choice}' for choice in choices)}`" if len(by_schema) > 1 else ""
        yield from ("", f"{found[0].summary}", "")
        if which:
            yield from (f"Options{which}, as the first sets them:", "")
        yield from _table([option for section in found for option in section.options])


def _table(options: Sequence[Any]) -> Iterator[str]:
    yield from ("| option | default | meaning |", "|---|---|---|")
    for option in options:
        value = "to be given" if option.value == "???" else f"`{option.value}`"
        yield f"| `{option.name}` | {_escaped(value)} | {_escaped(option.meaning)} |"


def _head_comment(file: Path) -> str:
    """The comment at the top of a YAML file, without Hydra's directives."""
    comment = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.lstrip("# "))
    return " ".join(comment)


def _settings(file: Path) -> str:
    """What a YAML file sets, as one would type it."""
    from omegaconf import OmegaConf

    from hrm.config.help import typed_text

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            elif name == "defaults":
                for choice in value:
                    if isinstance(choice, dict):
                        for group, chosen in choice.items():
                            if str(group).startswith("override "):
                                yield f"{str(group).removeprefix('override ').lstrip('/')}={chosen}"
            else:
                yield f"{prefix}{name}={typed_text(value)}"

    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    return " ".join(f"`{setting}`" for setting in flat({str(name): value for name, value in content.items()}))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
