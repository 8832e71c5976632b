"""What a format of exported files is: a file of `formats/` with a subclass of `Format` and an instance of it, `FORMAT`.

What only one format needs is imported within its methods, so that the others do without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from hrm.errors import UserError
from hrm.export.graphs import Graph
from hrm.inference.model import TrainedModel


class Run(Protocol):
    """A graph as its file computes it: outputs by name, for inputs by name."""

    def __call__(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]: ...


class Snippets(NamedTuple):
    """Python that the program in an exported folder is made of."""

    standard: tuple[str, ...]  # modules of Python's own library
    imports: str  # of other packages
    array: str  # the name of what makes its arrays: np or torch
    load: str  # defines `load(name)`, which gives a graph as a function of its inputs by name to its outputs in order


class Format(ABC):
    """A way to write graphs as files, and to compute them from these."""

    runtime: ClassVar[str]  # what computes the files, for people
    packages: ClassVar[tuple[str, ...]] = ()  # of the extra `export`, which must be installed
    devices: ClassVar[tuple[str, ...]] = ("cpu",)  # which its files can be made for, the usual one first
    parts: ClassVar[str] = "whole"  # which are written where `parts` is null
    has_solve: ClassVar[bool] = True  # whether it has a graph of all ACT steps; else a program calls `step` in turn
    bounded: ClassVar[bool] = False  # whether its files are for `max_batch_size` sequences at most

    def why_not(self, device: torch.device) -> str | None:
        """What is missing here to write and run its files, beside `packages`, as the end of a sentence; or None."""
        return None

    @abstractmethod
    def files(self, name: str) -> Sequence[str]:
        """All files that a graph of this name may have, relative to the folder; first the one that is loaded."""

    @abstractmethod
    def write(self, graph: Graph, model: TrainedModel, folder: Path, max_batch_size: int) -> None:
        """Write a graph of a model; the folders of its files are there, the files are not."""

    @abstractmethod
    def open(self, graph: Graph, folder: Path, device: torch.device) -> Run:
        """What computes the graph from its files."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that write and compute the files, beside PyTorch's."""

    @abstractmethod
    def usage(self, device: torch.device) -> str:
        """What people need to run the folder's program, in Markdown."""

    @abstractmethod
    def snippets(self, graphs: Sequence[Graph], device: torch.device) -> Snippets: ...


def by_tensors(compute: Callable[..., Sequence[Tensor]], graph: Graph, device: torch.device) -> Run:
    """What PyTorch computes of a graph from tensors in order to tensors in order, as `Format.open` gives it."""

    @torch.no_grad()
    def run(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = [torch.from_numpy(values[each.name]).to(device) for each in graph.inputs]
        found = compute(*given)
        return {each.name: value.cpu().numpy() for each, value in zip(graph.outputs, found, strict=True)}

    return run


def torch_settings(device: torch.device) -> str:
    """Python by which PyTorch makes its tensors on a device, and keeps nothing for gradients."""
    where = "" if device.type == "cpu" else f'torch.set_default_device("{device.type}")\n'
    return f"torch.set_grad_enabled(False)\n{where}"


def device_for(name: str, chosen: Format, device: str) -> torch.device:
    """The device that a format's files are made for.

    Args:
        name: of the format.
        device: one of its devices, or auto.

    Raises:
        UserError: its files are not for that device, or there is none here.
    """
    if device != "auto" and device not in chosen.devices:
        raise UserError(f"device={device} is not for format={name}: drop it, or give {' or '.join(chosen.devices)}.")
    found = torch.device(chosen.devices[0] if device == "auto" else device)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"format={name} needs an NVIDIA GPU for device=cuda, and PyTorch finds none here.")
    return found
