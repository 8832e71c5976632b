"""Write a model for other runtimes: `hrm export checkpoint=C output=DIR`, with `pip install 'hrm-torch[export]'`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import ExportConfig
    from hrm.config.compose import run

    run(ExportConfig, "export", _export, "hrm export", argv)
    return 0


def _export(config: object) -> None:
    from hrm.errors import UserError

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(f"hrm export needs {', '.join(missing)}: pip install 'hrm-torch[export]'.")
    from hrm.config import ExportConfig
    from hrm.export.command import export

    assert isinstance(config, ExportConfig)
    export(config)
