"""Build data packs, publish and list them, write examples: `hrm data sudoku --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from hrm.cli import columns
from hrm.config.checks import neighbours
from hrm.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Run the builder, or another command for packs, that the first argument names, and return the exit status."""
    from hrm.data.builders import find_builders

    builders = find_builders()
    name, *arguments = argv or ["--help"]
    if name in ("--help", "-h"):
        about = columns({name: _summary(builder) for name, builder in builders.items()})
        print(
            f"Build data packs, publish and list them.\n\nusage: hrm data COMMAND ...\n\n{about}\n\n"
            "hrm data COMMAND --help says more."
        )
        return 0
    if name not in builders:
        raise UserError(f"hrm data {name} is not a builder; {neighbours(name, builders)}")
    sys.argv[0] = f"hrm data {name}"  # what argparse calls the program
    status: int = builders[name].main(arguments)
    return status


def _summary(builder: ModuleType) -> str:
    return (builder.__doc__ or "").partition("\n")[0].rstrip(".")
