"""What holds for all operations: definition, operator, documentation, and a benchmark that runs."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ops import __main__ as command
from benchmarks.ops import running
from benchmarks.ops.row import Bar
from hrm.kernels import ops
from tests.helpers.entry_points import ROOT

OPERATIONS = sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_has_definition_and_docstring(name: str) -> None:
    function = getattr(ops, name)
    assert function.__doc__
    if hasattr(function, "naive"):
        assert list(inspect.signature(function.naive).parameters) == list(inspect.signature(function).parameters)


def test_documentation_lists_all_with_their_arguments() -> None:
    page = (ROOT / "docs/kernel-library.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", page, re.MULTILINE))
    assert sorted(documented) == OPERATIONS
    for name, arguments in documented.items():
        parameters = list(inspect.signature(getattr(ops, name)).parameters)
        shown = [argument.split("=")[0].strip() for argument in arguments.split(",")]
        assert shown == parameters[: len(shown)], name


def test_operations_import_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; from hrm.kernels import ops; import torch; x = torch.ones(2, 3);"
    code += "assert ops.softmax(x).sum() == 2; assert ops.vector_add(x, x).sum() == 12"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_functions_whoever_imports_first() -> None:
    code = "import hrm.kernels.ops.softmax; from hrm.kernels import ops; assert callable(ops.softmax)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bars() -> None:
    times = {"eager": 20.0, "compile": 12.0}
    assert running._reached(Bar(of_copy=0.9), 10.0, 9.0, times) == {"of bar": pytest.approx(1.0), "met": "yes"}
    assert running._reached(Bar(of_copy=0.9), 10.0, 8.0, times)["met"] == "no"
    assert running._reached(Bar(times_rival=1.1), 10.0, 0.0, times)["of bar"] == pytest.approx(12 / 11)
    assert running._reached(Bar(times_rival=3, rivals=("eager",)), 10.0, 0.0, times)["met"] == "no"
    assert running._reached(Bar(times_rival=1, rivals=("quack",)), 10.0, 0.0, times) == {}
    assert str(Bar(0.9)) == "90% of copy"
    assert str(Bar(times_rival=1.1, rivals=("a", "b"))) == "1.1x a or b"


def test_benchmark_tells_what_failed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two operations, of which one cannot even be imported, each in a process of its own."""
    monkeypatch.setattr(running, "OPERATIONS", ["no_such_operation", "vector_add"])
    monkeypatch.setattr(command, "OPERATIONS", ["no_such_operation", "vector_add"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    files = ["--out", str(tmp_path / "table"), "--plot", str(tmp_path / "plot.svg")]
    command.main(["--device", "cpu", "--limit", "600", *files])
    failed, measured = json.loads((tmp_path / "table.json").read_text())["lines"]
    assert failed == {"operation": "no_such_operation", "error": "its process ended with status 2"}
    assert measured["operation"] == "vector_add"
    assert measured["us"] > 0
    assert measured["rivals"]["eager"] > 0
    assert measured["limit"] == "memory"
    assert "| vector_add | forward |" in (tmp_path / "table.md").read_text()
    assert "vector_add forward 24x32" in (tmp_path / "plot.svg").read_text()
    assert "failed: no_such_operation: its process ended with status 2" in capsys.readouterr().out


def test_benchmark_stops_what_takes_too_long(tmp_path: Path) -> None:
    lines = list(running.lines_of(["vector_add"], "cpu", 0.01, tmp_path / "lines"))
    assert lines == [{"operation": "vector_add", "error": "took longer than 0.01 s (--limit)"}]


@pytest.mark.slow
def test_rows_of_all_operations_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size; in this process, which is quicker, with the definitions for kernels."""
    import torch

    from hrm.kernels.ops import operator

    monkeypatch.setattr(operator, "_INTERPRETED", False)
    running.append_lines(running.OPERATIONS, torch.device("cpu"), tmp_path / "lines")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["operation"] for line in lines if "end" in line] == list(running.OPERATIONS)
    assert not [line for line in lines if "error" in line]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_compile(capability: int) -> None:
    """For Hopper and for Blackwell, which are not here; every kernel of these files."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.helpers.compiling", str(capability)]
    compiled = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT).stdout
    folder = ROOT / "hrm/kernels/ops/triton"
    names = {
        name
        for file in ("asin", "dropout", "norm", "softmax", "vector_add", "memory_mlp_kernels", "mixer")
        for name in re.findall(r"^def (\w+_kernel)\(", (folder / f"{file}.py").read_text(), re.MULTILINE)
    }
    assert set(compiled.split()) == names
