"""ONNX files, for onnxruntime and others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from hrm.export.format import Format, Run, Snippets
from hrm.export.graphs import Graph, cannot_write, traced
from hrm.inference.model import TrainedModel
from hrm.version import __version__

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20

_LOAD = """

def load(name):
    session = onnxruntime.InferenceSession(FOLDER / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return lambda **values: session.run(None, values)
"""

_USAGE = """\
Neither PyTorch nor the package that wrote this folder is needed: `pip install numpy onnxruntime`. Other runtimes read
ONNX files too; these are of opset {opset}.
"""


class Onnx(Format):
    runtime = "onnxruntime"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def files(self, name: str) -> Sequence[str]:
        return f"{name}.onnx", f"{name}.onnx.data"  # models of more than 2 GB have their weights in a second file

    def write(self, graph: Graph, model: TrainedModel, folder: Path, max_batch_size: int) -> None:
        write_onnx(graph, model, folder / self.files(graph.name)[0])

    def open(self, graph: Graph, folder: Path, device: torch.device) -> Run:
        return open_onnx(graph, folder / self.files(graph.name)[0])

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self.packages}

    def usage(self, device: torch.device) -> str:
        return _USAGE.format(opset=OPSET)

    def snippets(self, graphs: Sequence[Graph], device: torch.device) -> Snippets:
        return Snippets((), "import numpy as np\nimport onnxruntime", "np", _LOAD)


FORMAT = Onnx()


def write_onnx(graph: Graph, model: TrainedModel, file: Path) -> None:
    """Write a graph as an ONNX file.

    Raises:
        UserError: this PyTorch cannot.
    """
    program = traced(graph, model)
    try:
        with _quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[each.name for each in graph.inputs],
                output_names=[each.name for each in graph.outputs],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise cannot_write(graph, model, error) from error
    assert written is not None
    _without_traces(written.model)
    written.model.metadata_props.update(
        {
            "hrm_version": __version__,
            "architecture": model.model.model.inner.config.name,
            "task": model.task.name,
            **graph.metadata,
        }
    )
    written.save(file)


def open_onnx(graph: Graph, file: Path) -> Run:
    """What onnxruntime computes of a file on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in graph.outputs]

    def run(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(names, dict(values)), strict=True))

    return run


def _without_traces(model: onnx_ir.Model) -> None:
    """Leave out the stack traces beside every node, which take more room than a small model's weights."""
    import onnx_ir

    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not needed and on names of dimensions."""
    logs = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnx_ir"))}
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in logs.items():
            log.setLevel(level)
