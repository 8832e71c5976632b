"""Programs of `torch.export` whose blocks are engines of TensorRT, by Torch-TensorRT, for NVIDIA GPUs.

Torch-TensorRT takes no loop into an engine: a solve is a program that calls the ACT step in turn.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hrm.errors import first_sentence
from hrm.export.format import Format, Run, Snippets, by_tensors, torch_settings
from hrm.export.graphs import Graph, cannot_write, traced
from hrm.inference.model import TrainedModel

_LIKELY_BATCH = 16  # sequences, which engines are tuned for

_LOAD = """

def load(name):
    run = torch.export.load(FOLDER / f"{name}_tensorrt.pt2").module()
    return lambda **values: run(*values.values())
"""

_USAGE = """\
PyTorch and Torch-TensorRT are needed, of the versions that wrote this folder (`export.json` names them), a GPU of the
same kind, and not the package that wrote it: `pip install torch torch-tensorrt`.
"""


class TensorRT(Format):
    runtime = "TensorRT"
    devices = ("cuda",)
    has_solve = False
    bounded = True

    def why_not(self, device: torch.device) -> str | None:
        remedy = f"pip install torch-tensorrt, in the version for PyTorch {torch.__version__}"
        if find_spec("torch_tensorrt") is None:
            return f"Torch-TensorRT is not installed: {remedy}"
        try:
            _torch_tensorrt()
        except (ImportError, OSError) as error:  # its libraries do not load: of another CUDA, or not all there
            return f"Torch-TensorRT cannot be imported ({first_sentence(error)}): {remedy}"
        return None

    def files(self, name: str) -> Sequence[str]:
        return (f"{name}_tensorrt.pt2",)

    def write(self, graph: Graph, model: TrainedModel, folder: Path, max_batch_size: int) -> None:
        library = _torch_tensorrt()
        shapes = [
            {
                f"{name}_shape": (count, *each.shape)
                for name, count in (("min", 1), ("opt", min(_LIKELY_BATCH, max_batch_size)), ("max", max_batch_size))
            }
            for each in graph.inputs
        ]
        inputs = [library.Input(**shape, dtype=each.dtype) for shape, each in zip(shapes, graph.inputs, strict=True)]
        try:
            compiled = library.dynamo.compile(
                traced(graph, model, max_batch_size), arg_inputs=inputs, device=model.device, disable_tf32=True
            )
            library.save(compiled, str(folder / self.files(graph.name)[0]), retrace=False)
        except RuntimeError as error:
            raise cannot_write(graph, model, error) from error

    def open(self, graph: Graph, folder: Path, device: torch.device) -> Run:
        _torch_tensorrt()  # whose operators the program calls
        program = torch.export.load(folder / self.files(graph.name)[0]).module()
        return by_tensors(program, graph, device)

    def versions(self) -> dict[str, str]:
        return {name: importlib.import_module(name).__version__ for name in ("torch_tensorrt", "tensorrt")}

    def usage(self, device: torch.device) -> str:
        return _USAGE

    def snippets(self, graphs: Sequence[Graph], device: torch.device) -> Snippets:
        imports = "import torch\nimport torch_tensorrt  # its operators are what the files call"
        return Snippets((), imports, "torch", torch_settings(device) + _LOAD)


FORMAT = TensorRT()


def _torch_tensorrt() -> Any:
    return importlib.import_module("torch_tensorrt")
