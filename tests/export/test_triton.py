"""format=triton: a repository whose configurations are right by the server's own messages and by the files.

The server itself is no Python package and does not run here; another one stands in for it that knows the same protocol.
"""

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.helpers.exporting import TRM, answers_of, boards, export, loaded, pack_of_answers, run_folder, text_of

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
text_format = pytest.importorskip("google.protobuf.text_format")

GRAPHS = {"solve", "step", "embed", "L", "H", "heads"}
ONNX_TYPES = {"TYPE_BOOL": "tensor(bool)", "TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}


@pytest.fixture(scope="module")
def messages() -> ModuleType:
    """The server's model_config.proto as its client has it, without what else that client needs."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install --no-deps -r scripts/tritonclient.txt")
    file = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def triton_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hrm export format=triton` wrote, in `out`, of the run `model` of TRM."""
    folder = tmp_path_factory.mktemp("triton")
    pack = pack_of_answers(folder / "pack", loaded(run_folder(folder / "model", TRM)))
    options = ("format=triton", "puzzles=10", "max_batch_size=8", "batch_size=9")
    export(f"checkpoint={folder / 'model'}", f"output={folder / 'out'}", f"data_path={pack}", *options)
    return folder


@pytest.fixture(scope="module")
def configs(triton_folder: Path, messages: ModuleType) -> dict[str, Any]:
    """Every model's configuration, as the server would read it."""
    folders = (triton_folder / "out" / "models").iterdir()
    return {
        folder.name: text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
        for folder in folders
    }


def session(folder: Path, name: str) -> Any:
    file = folder / "out" / "models" / name / "1" / "model.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_all_parts_are_there_and_compute_what_the_model_does(triton_folder: Path) -> None:
    report = json.loads((triton_folder / "out" / "export.json").read_text())
    assert report["passed"] is True
    assert report["batch_size"] == 8  # no more than the files are for
    assert "at each call, 8 at most." in " ".join((triton_folder / "out" / "README.md").read_text().split())
    assert {name.split("/")[1] for name in report["bytes"]} == GRAPHS
    assert list(report["solved"]) == ["solve", "modules"]
    for way in report["solved"].values():
        assert (way["accuracy"], way["same_answers"]) == (1.0, 1.0)
    assert all(max(apart.values()) < 1e-4 for apart in report["first_steps"].values())


def test_configurations_are_those_of_the_files(triton_folder: Path, configs: dict[str, Any]) -> None:
    """Names, types and shapes, in both directions; the server puts the batch before `dims`, or before `reshape`."""
    assert set(configs) == GRAPHS
    for name, config in configs.items():
        assert (config.backend, config.max_batch_size, config.name) == ("onnxruntime", 8, "")
        assert config.HasField("dynamic_batching")
        found = session(triton_folder, name)
        for listed, tensors in ((config.input, found.get_inputs()), (config.output, found.get_outputs())):
            type_of = listed[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
            configured = {
                each.name: (
                    ONNX_TYPES[type_of[each.data_type].name],
                    list(each.reshape.shape if each.HasField("reshape") else each.dims),
                )
                for each in listed
            }
            assert configured == {tensor.name: (tensor.type, tensor.shape[1:]) for tensor in tensors}
            assert all(isinstance(tensor.shape[0], str) for tensor in tensors)  # the batch, of any size
            for each in listed:
                assert list(each.dims), "the server has no empty shapes"
                if each.HasField("reshape"):
                    assert (list(each.dims), list(each.reshape.shape)) == ([1], [])


@pytest.mark.parametrize("batch", [1, 3])
def test_files_take_and_give_what_the_configurations_say(
    batch: int, triton_folder: Path, configs: dict[str, Any]
) -> None:
    types = {"TYPE_BOOL": np.bool_, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
    for name, config in configs.items():
        type_of = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        given = {
            each.name: np.ones(
                (batch, *(each.reshape.shape if each.HasField("reshape") else each.dims)),
                types[type_of[each.data_type].name],
            )
            for each in config.input
        }
        if "puzzle_identifiers" in given:
            given["puzzle_identifiers"][:] = 0
        outputs = session(triton_folder, name).run([each.name for each in config.output], given)
        for each, array in zip(config.output, outputs, strict=True):
            shape = tuple(each.reshape.shape if each.HasField("reshape") else each.dims)
            assert (array.shape, array.dtype) == ((batch, *shape), types[type_of[each.data_type].name])


@contextmanager
def stand_in(folder: Path, configs: dict[str, Any]) -> Iterator[str]:
    """A server that computes the repository by onnxruntime, and holds requests to the configurations.

    It knows as much of the Open Inference Protocol as one request needs. Its address.
    """
    sessions = {name: session(folder, name) for name in configs}
    kinds = {"TYPE_BOOL": ("BOOL", np.bool_), "TYPE_INT64": ("INT64", np.int64), "TYPE_FP32": ("FP32", np.float32)}

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            version, models, name, infer = self.path.strip("/").split("/")
            assert (version, models, infer) == ("v2", "models", "infer")
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            config, given = configs[name], {each["name"]: each for each in body["inputs"]}
            assert set(given) == {each.name for each in config.input}
            type_of = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
            arrays = {}
            for each in config.input:
                batch, *shape = given[each.name]["shape"]
                kind, dtype = kinds[type_of[each.data_type].name]
                assert (given[each.name]["datatype"], shape) == (kind, list(each.dims))
                inner = each.reshape.shape if each.HasField("reshape") else each.dims
                arrays[each.name] = np.array(given[each.name]["data"], dtype).reshape(batch, *inner)
            names = [each.name for each in config.output]
            outputs = [
                {"name": each.name, "datatype": "FP32", "shape": [batch, *each.dims], "data": array.ravel().tolist()}
                for each, array in zip(config.output, sessions[name].run(names, arrays), strict=True)
            ]
            answer = json.dumps({"model_name": name, "outputs": outputs[::-1]}).encode()  # in any order
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_the_program_asks_the_server(triton_folder: Path, configs: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "solve.py"
    text, inputs = (triton_folder / "out" / "solve.py").read_text(), boards(2)
    with stand_in(triton_folder, configs) as address:
        script.write_text(text.replace("http://localhost:8000", address))
        command = [sys.executable, "-I", script, *map(text_of, inputs)]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answers = answers_of(loaded(triton_folder / "model"), inputs)
    assert run.stdout.split() == [text_of(answer) for answer in answers]


def test_a_later_export_replaces_the_repository(triton_folder: Path) -> None:
    from hrm.export import command

    assert {file.name for file in command._earlier_export(triton_folder / "out")} >= {"model.onnx", "config.pbtxt"}
