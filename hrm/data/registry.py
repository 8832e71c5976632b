"""The registry of data sets: what `config/data/` says of each, and which packs lie here already.

An entry is a file of `config/data/` with the fields of `hrm.config.DataConfig`. What was really built stands in the
pack's own provenance.json.
"""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hrm.config.data import build_command
from hrm.config.paths import choices_of
from hrm.data.pack import SPLITS, read_provenance

# Columns of the listing and their widths in characters.
COLUMNS = {"name": 18, "source": 30, "version": 16, "licence": 12, "augmentation": 20, "shape": 15, "built": 14}


def read_registry() -> dict[str, DictConfig]:
    """The entries of `config/data/` by the name that `data=` takes."""
    entries = {}
    for name, file in choices_of("data").items():
        entry = OmegaConf.load(file)
        assert isinstance(entry, DictConfig)
        entries[name] = entry
    return entries


def built(pack: Path) -> str:
    """How many puzzles the pack holds to train and to test on, augmentations not counted; or that there is none."""
    if not is_pack(pack):
        return "no"
    try:
        counts = read_provenance(pack)["counts"]
        return " + ".join(f"{int(counts[split]['groups']):,}" for split in SPLITS)
    except (KeyError, TypeError, ValueError):  # of another builder
        return "yes, uncounted"


def is_pack(folder: Path) -> bool:
    """Whether both splits are whole."""
    return all((folder / split / "dataset.json").is_file() for split in SPLITS)


def entries(registry: Mapping[str, DictConfig]) -> list[dict[str, str]]:
    """What the registry says of each pack, and whether it is built."""
    return [
        {column: str(entry.get(column, "")) for column in (*COLUMNS, "build", "path")}
        | {"name": name, "built": built(Path(entry.path))}
        for name, entry in registry.items()
    ]


def table(columns: Mapping[str, int], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells below the names of their columns, wrapped to the widths that `columns` has in characters."""
    return "\n".join([*_head(columns), *(line for row in rows for line in _row(columns, row))])


def listing(registry: Mapping[str, DictConfig]) -> str:
    """A table of the registry, with the command that makes each pack, and the other packs that lie beside theirs."""
    lines = _head(COLUMNS)
    for entry in entries(registry):
        lines += _row(COLUMNS, [entry[column] for column in COLUMNS])
        lines += [f"    {build_command(entry['build'], entry['path'])}", ""]
    paths = {Path(entry.path) for entry in registry.values()}
    others = sorted({pack for path in paths for pack in path.parent.glob("*") if is_pack(pack)} - paths)
    if others:
        lines.append("Other packs here:")
        lines += [f"    {pack}: {built(pack)}, {_origin(pack)}" for pack in others]
    return "\n".join(lines).rstrip()


def _origin(pack: Path) -> str:
    try:
        provenance = read_provenance(pack)
        return f"{provenance['source']}, by {provenance['builder']}"
    except KeyError:
        return "of unknown origin"


def _head(columns: Mapping[str, int]) -> list[str]:
    return [*_row(columns, list(columns)), *_row(columns, ["-" * width for width in columns.values()])]


def _row(columns: Mapping[str, int], cells: Sequence[str]) -> Iterator[str]:
    """The lines of one row of a table."""
    widths = list(columns.values())
    wrapped = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(cells, widths, strict=True)]
    for parts in zip_longest(*wrapped, fillvalue=""):
        yield "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()
