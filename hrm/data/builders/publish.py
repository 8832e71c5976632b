"""Publishes a pack where others fetch it, with its provenance and hashes, and enters it into a results store.

hrm data publish data/my-pack s3://bucket/packs/my-pack version=1.0 licence=MIT results=postgresql://...

Options are written name=value or --name value. Runs and evaluations then take data_path=s3://bucket/packs/my-pack, for
the version published last, or data_path=s3://bucket/packs/my-pack/1.0. Credentials are those of the protocol's own
package: environment variables or files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hrm.config.checks import choice
from hrm.data.builders.common import as_flags, run_command
from hrm.data.publishing import About, publish

COMMAND = "publish"  # `hrm data publish`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, help="the folder of the pack")
    parser.add_argument("url", help="where to publish it: s3://, hf://, file:// or another URL that fsspec knows")
    parser.add_argument("--name", help="of the pack; default: its name in `hrm data list`, or that of its folder")
    parser.add_argument("--version", default="1", help="of the pack, a folder below the URL; default: 1")
    parser.add_argument("--licence", help="of the puzzles; default: as `hrm data list` has it, else unknown")
    parser.add_argument("--augmentation", help="how training puzzles are augmented; default: as for the licence")
    parser.add_argument("--results", help="sqlite:///FILE or postgresql://...: the results store to enter it into")
    parser.add_argument(
        "--overwrite", default="false", help="true: replace other content of the same version; default: false"
    )
    return run_command(_publish, lambda: parser.parse_args(as_flags(sys.argv[1:] if argv is None else argv, parser)))


def _publish(arguments: argparse.Namespace) -> str:
    choice("overwrite", arguments.overwrite, ("true", "false"))
    about = About(arguments.name, arguments.version, arguments.licence, arguments.augmentation)
    done = publish(arguments.pack, arguments.url, about, arguments.results, overwrite=arguments.overwrite == "true")
    manifest = done.manifest
    size = f"{len(manifest.files)} files, {manifest.total_bytes / 1e6:,.1f} MB"
    what = (
        f"Published {manifest.name} {manifest.version}"
        if done.uploaded
        else f"{manifest.name} {manifest.version} is there already"
    )
    lines = [f"{what}: {size}, licence {manifest.licence}, SHA-256 {manifest.sha256}."]
    if done.left_out:
        lines.append(
            f"Left out, as no part of a pack: {', '.join(done.left_out[:5])}{' ...' * (len(done.left_out) > 5)}."
        )
    lines.append(f"Use it by data_path={arguments.url.rstrip('/')}, or data_path={done.url} for this version only.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
