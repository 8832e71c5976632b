"""Builders of packs: a module of this folder is one if it says the `COMMAND` that `hrm data` runs it by."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def find_builders() -> dict[str, ModuleType]:
    """The modules that have a `COMMAND`, by it. Their `main(argv)` runs a command line and returns the exit status."""
    names = sorted(module.name for module in iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names]
    return {module.COMMAND: module for module in modules if hasattr(module, "COMMAND")}
