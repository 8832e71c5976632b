"""Answer puzzles over HTTP: `hrm serve checkpoint=sudoku`, with `pip install 'hrm-torch[serve]'`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hrm.config.extras import need

if TYPE_CHECKING:
    from hrm.config import ServeConfig


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import ServeConfig
    from hrm.config.compose import run

    run(ServeConfig, "serve", _serve, "hrm serve", argv)
    return 0


def _serve(config: ServeConfig) -> None:
    need("hrm serve", "serve", ("fastapi", "uvicorn", "prometheus_client"))
    from hrm.service.command import serve

    serve(config)
