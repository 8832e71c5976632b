"""Compare a model in 8 bit with itself, and store it so: `hrm quantize checkpoint=C quantize=int8 output=DIR`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    from hrm.config import QuantizeConfig
    from hrm.config.compose import run
    from hrm.export.quantize import quantize

    run(QuantizeConfig, "quantize", quantize, "hrm quantize", argv)
    return 0
