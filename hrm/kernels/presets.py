"""What `kernels=` can name: the files of `config/kernels/`, each of which begins with what it is and when to take it.

# What: plain PyTorch, the definition every other one is tested against
# When: anywhere; to read, to debug
backend: naive
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from hrm.config.paths import choices_of
from hrm.errors import UserError
from hrm.kernels.registry import EXPERIMENTAL, backend_names

AUTO = "auto"


@dataclass(frozen=True)
class Preset:
    """A choice of the group `kernels`."""

    name: str
    what: str  # how reasoning modules are computed
    when: str  # where it is the one to take
    experimental: bool  # it does not pay


def presets() -> list[Preset]:
    """All presets: `auto`, then those that pay, then experiments, each by name."""
    found = [_read(name, file) for name, file in choices_of("kernels").items()]
    return sorted(found, key=lambda preset: (preset.name != AUTO, preset.experimental, preset.name))


def table() -> str:
    """The presets as a table in Markdown."""
    rows = [f"| `{preset.name}` | {preset.what} | {preset.when} |" for preset in presets()]
    return "\n".join(["| `kernels=` | how reasoning modules are computed | when |", "|---|---|---|", *rows])


def _read(name: str, file: Path) -> Preset:
    comment = re.match(r"(?:#.*\n)*", file.read_text(encoding="utf-8"))
    text = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    said = re.fullmatch(r"(.+)\. When: (.+)\.", text)
    if said is None:
        raise UserError(
            f"{file} must begin with `# WHAT IT IS.` and `# When: WHEN TO TAKE IT.`, each of a line or more."
        )
    of_experiment = OmegaConf.select(OmegaConf.load(file), "backend") in backend_names(EXPERIMENTAL)
    return Preset(name, said[1], said[2], of_experiment or said[2].startswith("experiments"))
