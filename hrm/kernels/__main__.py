"""List what `kernels=` can name and whether it runs on this machine: python -m hrm.kernels [--write FILE]"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from hrm.config import kernels_config
from hrm.errors import UserError
from hrm.kernels import KernelRequest, describe, resolve
from hrm.kernels.presets import presets, table
from hrm.output import unbreakable_output

BEGIN, END = "<!-- written by: python -m hrm.kernels --write docs/kernels.md -->", "<!-- end -->"


def write_table(file: Path) -> None:
    """Replace what lies between the two marks of a Markdown file by the table of presets.

    Raises:
        UserError: the marks are not there.
    """
    text = file.read_text(encoding="utf-8")
    new, count = re.subn(
        rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL
    )
    if count != 1:
        raise UserError(f"{file} has no place for the table: write {BEGIN} and {END} around it.")
    file.write_text(new, encoding="utf-8")


@unbreakable_output()  # as in `python -m hrm.kernels | head`
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hrm.kernels", description="List what kernels= can name.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between the marks of this file")
    arguments = parser.parse_args()
    if arguments.write:
        try:
            write_table(arguments.write)
        except (UserError, OSError) as error:
            sys.exit(str(error))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = KernelRequest(device, torch.bfloat16, 64)
    print(f"For heads of 64 in bfloat16, on {device}:")
    for preset in presets():
        print(f"\nkernels={preset.name}: {preset.what}\n  when: {preset.when}")
        try:
            config = resolve(kernels_config(preset.name), request)
        except UserError as error:
            print(f"  here: {error}")
        else:
            print(f"  here: {describe(config)}")


if __name__ == "__main__":
    main()
