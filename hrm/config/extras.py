"""Packages that only some commands need."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from hrm.config.paths import DISTRIBUTION
from hrm.errors import UserError


def need(what: str, extra: str, packages: Sequence[str]) -> None:
    """UserError unless all packages of an extra are installed, which `what` cannot do without."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'.")
