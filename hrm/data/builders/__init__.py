"""Builders of packs: modules of this folder or of `hrm.tasks` that have a `COMMAND`, by which `hrm data` runs them.

The first line of its docstring is what `hrm data --help` prints; `main(argv)` runs a command line and returns the exit
status.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import hrm.tasks


def find_builders() -> dict[str, ModuleType]:
    """The modules that have a `COMMAND`, by it."""
    modules = []
    for package in (__name__, hrm.tasks.__name__):
        path = import_module(package).__path__
        modules += [import_module(f"{package}.{module.name}") for module in iter_modules(path)]
    found = {module.COMMAND: module for module in modules if hasattr(module, "COMMAND")}
    return dict(sorted(found.items()))
