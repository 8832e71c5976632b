"""Write a model for other runtimes: `hrm export checkpoint=C output=DIR`, with `pip install 'hrm-torch[export]'`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hrm.config import ExportConfig


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import ExportConfig
    from hrm.config.compose import run

    run(ExportConfig, "export", _export, "hrm export", argv)
    return 0


def _export(config: ExportConfig) -> None:
    from hrm.export.command import export

    export(config)
