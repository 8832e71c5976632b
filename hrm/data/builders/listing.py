"""Lists the data sets that `data=` can name: where they come from, how to get them, and what is built already.

hrm data list
"""

import argparse
import sys
from collections.abc import Sequence

from hrm.data.builders.common import run_command
from hrm.data.registry import listing, read_registry

COMMAND = "list"  # `hrm data list`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return run_command(lambda _: listing(read_registry()), lambda: parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
