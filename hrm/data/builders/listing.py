"""Lists the packs that `data=` can name, and which are built; or those published in a results store.

hrm data list
hrm data list results=sqlite:///results.sqlite
hrm data list results=postgresql://... format=json
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from hrm.config.checks import choice
from hrm.data.builders.common import as_flags, run_command
from hrm.data.registry import entries, listing, read_registry, table
from hrm.results import open_store
from hrm.results.records import PublishedPack

COMMAND = "list"  # `hrm data list`

_FORMATS = ("table", "json")

# Columns of the table of published packs and their widths in characters.
_PUBLISHED = {"name": 18, "version": 10, "licence": 12, "augmentation": 20, "published": 10, "sha256": 12, "url": 44}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="sqlite:///FILE or postgresql://...: list the packs entered there")
    parser.add_argument("--format", default="table", help="table or json; default: table")
    return run_command(_list, lambda: parser.parse_args(as_flags(sys.argv[1:] if argv is None else argv, parser)))


def _list(arguments: argparse.Namespace) -> str:
    choice("format", arguments.format, _FORMATS)
    if arguments.results is None:
        registry = read_registry()
        return listing(registry) if arguments.format == "table" else _json(entries(registry))
    store = open_store(arguments.results)
    packs = store.packs()
    store.close()
    if arguments.format == "json":
        return _json([{**asdict(pack), "time": pack.time.isoformat()} for pack in packs])
    if not packs:
        return f"{store} has no packs: `hrm data publish PACK URL results=...` enters them."
    return table(_PUBLISHED, [_row(pack) for pack in packs])


def _row(pack: PublishedPack) -> list[str]:
    published = f"{pack.time.astimezone():%Y-%m-%d}"
    return [pack.name, pack.version, pack.licence, pack.augmentation, published, pack.hash[:12], pack.place]


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
