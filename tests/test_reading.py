"""Files of others: whatever is in them, reading ends soon, in a value or in one of the errors that callers expect."""

import gzip
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrm.errors import printable, printable_lines, shortened
from hrm.reading import open_lines, parse_json, read_array, read_bytes, read_json, read_text, read_yaml_text

EXPECTED = (OSError, EOFError, ValueError)
SECONDS = 5  # of CPU time, that any of these may take

fuzzed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def npy_header(descr: str, shape: str, version: bytes = b"\x01\x00") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header


def saved(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        "[" * 65 + "]" * 65,
        '["\\ud800"]',
        '{"\\udfff": 1}',
        '"\\ud83d\\ud83d"',
        "1" * 5000,
        "",
        "nul",
        '"' + "[" * 200_000,
    ],
    ids=lambda text: text[:12],
)
def test_json_that_no_program_can_use_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested deeper|surrogate|digits|Expecting|Unterminated"):
        parse_json(text)


def test_brackets_in_strings_and_whole_surrogate_pairs_are_read() -> None:
    assert parse_json(json.dumps(["[" * 500, '\\"[' * 100, "\U0001f600"])) == ["[" * 500, '\\"[' * 100, "\U0001f600"]
    nested = parse_json("[" * 64 + "]" * 64)
    for _ in range(63):
        (nested,) = nested
    assert nested == []


@fuzzed
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(st.sampled_from(["[", "]", "{", "}", ":", ",", '"', "\\", "1", "a", "\\ud800"]), max_size=200).map(
            "".join
        ),
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=30).map(json.dumps),
    )
)
def test_json_fuzzed(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    json.dumps(value, ensure_ascii=False).encode()  # can be shown and stored


LAUGHS = "\n".join(
    ["a0: &a0 [1,1,1,1,1,1,1,1,1]", *(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "aliases of aliases": (LAUGHS, "aliases written out"),
        "an alias within its anchor": ("arch: &a {x: *a}\n", "within what it refers to"),
        "a list within itself": ("- &a [1, [2, *a]]\n", "within what it refers to"),
        "maps 3,000 deep": ("arch: " + "{a: " * 3000 + "1" + "}" * 3000, "nested deeper"),
        "lists 3,000 deep": ("[" * 3000 + "]" * 3000, "nested deeper"),
        "blocks 100 deep": ("".join(" " * n + "a:\n" for n in range(100)), "nested deeper"),
        "many values": ("[" + "1," * 30_000 + "]", "more than"),
        "an unknown alias": ("a: *nobody", "stands for nothing"),
        "a NUL": ("a: \0", "special characters"),
        "torn": ("a: [1, 2", "expected"),
    }.values(),
)
def test_yaml_that_costs_more_than_it_looks_is_a_value_error(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=words):
        read_yaml_text(file)
    assert time.process_time() - started < SECONDS


def test_yaml_with_some_aliases_is_text(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("a: &a {lr: 1}\nb: [*a, *a]\nc: {<<: *a}\n")
    assert read_yaml_text(file) == file.read_text()


@fuzzed
@given(st.lists(st.sampled_from([*"[]{}:,-&*!|>#'\"?\n ab1", "&a ", "*a", "- ", "a: ", "<<: ", "\t"]), max_size=60))
def test_yaml_fuzzed(tmp_path: Path, pieces: list[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("".join(pieces))
    try:
        yaml.compose(read_yaml_text(file))
    except (ValueError, yaml.YAMLError):
        return


@pytest.mark.parametrize(
    ("content", "words"),
    {
        "terabytes": (npy_header("'<f8'", "(10000000000000,)"), "claims 80,000,000,000,000 bytes, but 0"),
        "a negative length": (npy_header("'<f8'", "(-1,)"), "shape"),
        "lengths that overflow": (npy_header("'<f8'", f"({2**62}, {2**62})"), "claims"),
        "objects": (saved(np.array([{}]), allow_pickle=True), "holds object, not numbers"),
        "records": (saved(np.zeros(2, "i4,f8")), "not numbers"),
        "complex": (saved(np.zeros(2, "c16")), "holds complex128"),
        "timedeltas": (saved(np.zeros(2, "m8[s]")), "holds timedelta64"),
        "dates": (saved(np.zeros(2, "M8[s]")), "holds datetime64"),
        "a zip": (b"PK\x03\x04" + b"\0" * 60, "magic"),
        "a header that is no literal": (npy_header("__import__('os')", "(1,)"), "."),
        "a deep header": (b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 8192, "."),
        "another format": (npy_header("'<f8'", "(1,)", b"\x09\x00"), "."),
        "nothing": (b"", "."),
        "torn": (saved(np.arange(100.0))[:-8], "claims 800 bytes, but 792"),
    }.values(),
)
def test_arrays_that_are_not_what_their_header_says_are_errors(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.npy"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_array(file, "iuf", "numbers")


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.empty((0, 4)), np.ones(())]
)
def test_an_array_is_read_as_numpy_reads_it(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    np.save(tmp_path / "a.npy", array)
    found = read_array(tmp_path / "a.npy", "iuf", "numbers")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, np.load(tmp_path / "a.npy"))


@fuzzed
@given(st.binary(max_size=40), st.integers(0, 140), st.binary(min_size=1, max_size=4))
def test_arrays_fuzzed(tmp_path: Path, tail: bytes, at: int, change: bytes) -> None:
    whole = saved(np.arange(8, dtype=np.int16))
    (tmp_path / "a.npy").write_bytes((whole[:at] + change + whole[at + len(change) :])[: len(whole) - len(tail)])
    try:
        read_array(tmp_path / "a.npy", "iuf", "numbers").sum()
    except EXPECTED:
        return


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="this system does not say where files have holes")
@pytest.mark.parametrize("gigabytes", [1, 1000])
def test_an_array_of_holes_is_not_scanned(tmp_path: Path, gigabytes: int) -> None:
    size = gigabytes << 30
    with (tmp_path / "a.npy").open("wb") as stream:
        stream.write(npy_header("'|i1'", f"({size},)"))
        stream.truncate(128 + size)
    with pytest.raises(ValueError, match="hardly any are stored"):
        read_array(tmp_path / "a.npy", "iu", "integers")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_yaml_text, lambda f: read_array(f, "iu", "x")])
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|directory"):
            read(file)


def test_a_packed_file_larger_than_allowed_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b" " * 50_000_000))
    with pytest.raises(ValueError, match="more than the 1,000 bytes"):
        read_bytes(tmp_path / "a.json.gz", most=1000)
    with pytest.raises(ValueError, match="a line of more than"), open_lines(tmp_path / "a.json.gz") as lines:
        list(lines)
    whole = gzip.compress(os.urandom(1000))
    for torn in (whole[:500], whole[:100] + b"\xff" * 50 + whole[150:]):
        (tmp_path / "b.gz").write_bytes(torn)
        with pytest.raises(EXPECTED):
            read_bytes(tmp_path / "b.gz")
        with pytest.raises(EXPECTED), open_lines(tmp_path / "b.gz") as lines:
            list(lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sudoku 9×9 数独", "sudoku 9×9 数独"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\nc", "a\\rb\\nc"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202e\u2066def", "abc\\u202e\\u2066def"),
        ("\ud800", "\\ud800"),
        ("\u2028\x00", "\\u2028\\x00"),
    ],
)
def test_what_could_steer_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_what_is_printable_steers_no_terminal(text: str) -> None:
    assert printable(text).isprintable() or " " in printable(text) or not printable(text).isascii()
    assert not set(printable(text)) & set(map(chr, (*range(32), *range(127, 160))))
    assert printable_lines(text).count("\n") == text.count("\n")
    assert len(shortened(text)) <= 120
