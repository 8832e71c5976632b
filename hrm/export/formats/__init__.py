"""The formats there are: every file of this folder, by its name. They are listed without being imported."""

from __future__ import annotations

import importlib
import pkgutil

from hrm.config.checks import choice
from hrm.export.format import Format


def format_names() -> list[str]:
    """What `format=` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: there is none.
    """
    choice("format", name, format_names())
    found: Format = importlib.import_module(f"{__name__}.{name}").FORMAT
    return found
