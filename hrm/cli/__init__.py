"""The console script `hrm`: a command is a module of this folder, found by its name.

A command's module starts with a docstring, whose first line `hrm --help` prints, and has
`main(argv: Sequence[str]) -> int`, which returns the exit status. Heavy imports stand within `main`, after
`hrm.config.extras.need` where they are of an extra.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pkgutil import iter_modules

from hrm.config.checks import neighbours
from hrm.config.paths import DISTRIBUTION
from hrm.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from hrm.output import unbreakable_output
from hrm.unforeseen import tell
from hrm.version import __version__


@unbreakable_output()  # as in `hrm data list | head`
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return the exit status."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"hrm {__version__} ({DISTRIBUTION})")
        return 0
    try:
        if name not in commands():
            raise UserError(f"hrm {name} is not a command; {neighbours(name, commands())}")
        sys.argv[0] = f"hrm {name}"
        status: int = importlib.import_module(f"{__name__}.{name}").main(arguments)
        return status
    except UserError as error:
        tell(str(error))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def commands() -> list[str]:
    """The names of the commands that there are."""
    return sorted(module.name for module in iter_modules(__path__))


def columns(rows: Mapping[str, str]) -> str:
    """Lines of a name and what it stands for, as help pages have them."""
    width = max(map(len, rows)) + 4
    return "\n".join(f"  {name:<{width}}{text}" for name, text in rows.items())


def _help() -> str:
    about = columns({name: _summary(name) for name in commands()})
    return (
        "Train, evaluate and study Hierarchical Reasoning Models.\n\n"
        f"usage: hrm COMMAND ...\n\n{about}\n\n"
        "hrm COMMAND --help says more; hrm --version names the version."
    )


def _summary(command: str) -> str:
    """The first line of a command's docstring, read without importing what it needs."""
    spec = find_spec(f"{__name__}.{command}")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        docstring = ast.get_docstring(ast.parse(file.read())) or ""
    return inspect.cleandoc(docstring).partition("\n")[0].rstrip(".")
