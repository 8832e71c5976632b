"""Where the YAML files of the options lie: in the checkout's `config/`, or in the package that a wheel installed."""

from pathlib import Path

PROJECT_DIR = Path(__file__).resolve().parents[2]
_PACKAGED = Path(__file__).resolve().parents[1] / "_config"  # where setup.py puts config/ when it builds a wheel

IS_CHECKOUT = not _PACKAGED.is_dir()
CONFIG_DIR = PROJECT_DIR / "config" if IS_CHECKOUT else _PACKAGED

DISTRIBUTION = "hrm-torch"  # the name on the package index, where `hrm` belongs to another project


def install_hint(extra: str) -> str:
    """The command that adds an extra of this package to the way it is installed here, e.g. for `report`."""
    if not IS_CHECKOUT:
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == PROJECT_DIR else PROJECT_DIR}[{extra}]'"


def choices_of(group: str, more: tuple[Path, ...] = ()) -> dict[str, Path]:
    """The YAML file of each choice of a group, by name, in the package and in the folders `more`."""
    found = [file for folder in (CONFIG_DIR, *more) for file in (folder / group).glob("*.yaml")]
    return {file.stem: file for file in sorted(found, key=lambda file: file.stem)}


def groups_of(more: tuple[Path, ...] = ()) -> list[str]:
    """The groups that there are: folders with YAML files."""
    return sorted({file.parent.name for folder in (CONFIG_DIR, *more) for file in folder.glob("*/*.yaml")})
