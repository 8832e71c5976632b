"""Answer puzzles over HTTP: `hrm serve checkpoint=sudoku`, with `pip install 'hrm-torch[serve]'`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import ServeConfig
    from hrm.config.compose import run

    run(ServeConfig, "serve", _serve, "hrm serve", argv)
    return 0


def _serve(config: object) -> None:
    from hrm.errors import UserError

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"hrm serve needs {', '.join(missing)}: pip install 'hrm-torch[serve]'.")
    from hrm.config import ServeConfig
    from hrm.service.command import serve

    assert isinstance(config, ServeConfig)
    serve(config)
