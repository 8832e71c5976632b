"""A model repository for NVIDIA's Triton Inference Server: ONNX files and what the server is to know of them.

Fields of config.pbtxt are those of `ModelConfig` in the server's model_config.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hrm.export.format import Run, Snippets
from hrm.export.formats.onnx import Onnx, open_onnx, write_onnx
from hrm.export.graphs import Graph, Values
from hrm.inference.model import TrainedModel

_TYPES = {torch.bool: "TYPE_BOOL", torch.int64: "TYPE_INT64", torch.float32: "TYPE_FP32"}

_LOAD = """\
SERVER = "http://localhost:8000"
OUTPUTS = {{
{outputs}
}}
TYPES = {{"bool": "BOOL", "int64": "INT64", "float32": "FP32"}}


def load(name):
    def run(**values):
        inputs = [
            {{
                "name": key,
                "datatype": TYPES[str(value.dtype)],
                "shape": list(value.shape) if value.ndim > 1 else [len(value), 1],
                "data": value.ravel().tolist(),
            }}
            for key, value in values.items()
        ]
        body = json.dumps({{"inputs": inputs}}).encode()
        with urllib.request.urlopen(f"{{SERVER}}/v2/models/{{name}}/infer", body) as answer:
            given = {{each["name"]: each for each in json.load(answer)["outputs"]}}
        found = [np.array(given[key]["data"], np.float32).reshape(given[key]["shape"]) for key in OUTPUTS[name]]
        return [array if array.ndim > 2 else array.ravel() for array in found]

    return run
"""

_USAGE = """\
`models/` is a model repository: `tritonserver --model-repository=models`, with the server's backend for onnxruntime.
The folders in it may be renamed: the server takes their names for the models'. It may compute requests of several
clients together (`dynamic_batching` in each `config.pbtxt`). What is [B] below is [B, 1] for its clients.

The program asks the server over HTTP: `pip install numpy`.
"""


class Triton(Onnx):
    parts = "all"
    bounded = True

    def files(self, name: str) -> Sequence[str]:
        model = f"models/{name}/1/model.onnx"
        return model, f"{model}.data", f"models/{name}/config.pbtxt"

    def write(self, graph: Graph, model: TrainedModel, folder: Path, max_batch_size: int) -> None:
        file, _, config = (folder / name for name in self.files(graph.name))
        write_onnx(graph, model, file)
        config.write_text(config_text(graph, max_batch_size), encoding="utf-8")

    def open(self, graph: Graph, folder: Path, device: torch.device) -> Run:
        return open_onnx(graph, folder / self.files(graph.name)[0])

    def usage(self, device: torch.device) -> str:
        return _USAGE

    def snippets(self, graphs: Sequence[Graph], device: torch.device) -> Snippets:
        outputs = {graph.name: [each.name for each in graph.outputs] for graph in graphs}
        load = _LOAD.format(outputs="\n".join(f"    {name!r}: {names}," for name, names in outputs.items()))
        return Snippets(("json", "urllib.request"), "import numpy as np", "np", load)


FORMAT = Triton()


def config_text(graph: Graph, max_batch_size: int) -> str:
    """config.pbtxt of a graph. It has no `name`: the server takes that of the folder."""
    blocks = [
        f'{kind} {{\n  name: "{each.name}"\n  data_type: {_TYPES[each.dtype]}\n{_dims(each)}}}\n'
        for kind, values in (("input", graph.inputs), ("output", graph.outputs))
        for each in values
    ]
    return f'backend: "onnxruntime"\nmax_batch_size: {max_batch_size}\n{"".join(blocks)}dynamic_batching {{ }}\n'


def _dims(values: Values) -> str:
    """The shape of one sequence. The server has no empty ones: what is [B] in the file is [B, 1] for its clients."""
    if values.shape:
        return f"  dims: [ {', '.join(map(str, values.shape))} ]\n"
    return "  dims: [ 1 ]\n  reshape { shape: [ ] }\n"
