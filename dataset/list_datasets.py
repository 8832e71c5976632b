"""Lists the data sets that `data=` can name: where they come from, how to get them, and what is built already.

python dataset/list_datasets.py
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, only the script's own folder is on the path.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from hrm.data.registry import listing, read_registry
from hrm.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    try:
        print(listing(read_registry()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
