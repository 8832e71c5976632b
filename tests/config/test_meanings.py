"""Options are described in one place, beside the fields of their schemas; --help and docs/options.md read it there."""

from dataclasses import dataclass

import pytest

from hrm.cli import options
from hrm.config.compose import compose_untyped
from hrm.config.help import Option, sections
from hrm.config.meanings import meanings, summary
from hrm.config.paths import choices_of
from tests.helpers.entry_points import ROOT, run_script

PAGE = ROOT / "docs/options.md"


@dataclass
class Base:
    """A schema.

    More of it.
    """

    first: int = 1  # beside

    # A remark about what follows, apart from it.

    # above, on
    # two lines
    second: int = 2
    third: int = 3
    # above
    fourth: str = "# no comment"  # and beside
    fifth: list[int] = (  # type: ignore[assignment]
        1,
        2,
    )  # behind the last line


@dataclass
class Derived(Base):
    second: int = 5  # changed
    sixth: int = 6  # new


def test_comments_are_meanings() -> None:
    assert meanings(Base) == {
        "first": "beside",
        "second": "above, on two lines",
        "third": "",
        "fourth": "above and beside",
        "fifth": "behind the last line",
    }
    assert meanings(Derived) == meanings(Base) | {"second": "changed", "sixth": "new"}
    assert summary(Base) == "A schema."


def options_of(config_name: str) -> list[Option]:
    """All options, with those of every architecture."""
    if config_name != "pretrain":
        return [option for section in sections(compose_untyped(config_name)) for option in section.options]
    composed = [compose_untyped("pretrain", [f"arch={arch}"]) for arch in choices_of("arch")]
    return [option for config in composed for section in sections(config) for option in section.options]


@pytest.mark.parametrize("config_name", ["pretrain", "evaluate", "serve", "export"])
def test_every_option_has_a_meaning(config_name: str) -> None:
    assert [option.name for option in options_of(config_name) if not option.meaning] == []


@pytest.mark.parametrize("config_name", ["pretrain", "evaluate"])
def test_help_and_the_page_have_every_option(config_name: str) -> None:
    page = PAGE.read_text()
    help_page = run_script(f"{config_name}.py", "--help").out
    for option in options_of(config_name):
        assert f"| `{option.name}` |" in page
    for section in sections(compose_untyped(config_name)):
        for option in section.options:
            assert f"  {option.name}={option.value}" in help_page
            assert " ".join(option.meaning.split()[:3]) in help_page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == options.page() + "\n", "hrm options > docs/options.md"
