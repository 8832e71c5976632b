"""Programs of `torch.export`, as they are and compiled by AOTInductor, for PyTorch without this package."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._inductor

from hrm.export.format import Format, Run, Snippets, by_tensors, torch_settings
from hrm.export.graphs import Graph, cannot_write, traced
from hrm.inference.model import TrainedModel
from hrm.kernels.requirements import why_no_inductor

_LOAD = """

def load(name):
    run = torch._inductor.aoti_load_package(str(FOLDER / f"{name}_compiled.pt2"))
    return lambda **values: run(*values.values())
"""

_USAGE = """\
PyTorch is needed, and not the package that wrote this folder: `pip install torch`. Files `..._compiled.pt2` are machine
code for a {device} like that of the machine that wrote them, compiled by AOTInductor of PyTorch {version};
`torch._inductor.aoti_load_package` loads them, and in C++ `torch::inductor::AOTIModelPackageLoader`. Beside each stands
the same as a program of `torch.export`, for any {device}, which `torch.export.load(file).module()` runs, and
`torch._inductor.aoti_compile_and_package(torch.export.load(file))` compiles elsewhere.
"""


class Program(Format):
    runtime = "AOTInductor"
    devices = ("cpu", "cuda")

    def why_not(self, device: torch.device) -> str | None:
        reason = why_no_inductor(device)
        return reason and f"AOTInductor compiles it, and {reason}: install one"

    def files(self, name: str) -> Sequence[str]:
        return f"{name}_compiled.pt2", f"{name}.pt2"

    def write(self, graph: Graph, model: TrainedModel, folder: Path, max_batch_size: int) -> None:
        compiled, plain = (folder / file for file in self.files(graph.name))
        program = traced(graph, model)
        torch.export.save(program, plain)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(program, package_path=str(compiled))
        except RuntimeError as error:  # a compiler that fails, or a package of Inductor's that does
            raise cannot_write(graph, model, error) from error

    def open(self, graph: Graph, folder: Path, device: torch.device) -> Run:
        compiled = torch._inductor.aoti_load_package(str(folder / self.files(graph.name)[0]))
        return by_tensors(compiled, graph, device)

    def versions(self) -> dict[str, str]:
        return {}

    def usage(self, device: torch.device) -> str:
        return _USAGE.format(device="GPU" if device.type == "cuda" else "CPU", version=torch.__version__)

    def snippets(self, graphs: Sequence[Graph], device: torch.device) -> Snippets:
        imports = "import torch\nimport torch._inductor"
        return Snippets((), imports, "torch", torch_settings(device) + _LOAD)


FORMAT = Program()
