"""Reading files that somebody else may have made: regular files only, of bounded size, and nothing in them is executed.

A small file can ask for much: JSON nested a million deep, a YAML alias of aliases of aliases, an array whose header
claims terabytes, a pipe that never ends. What is read here costs about as much memory as the file has bytes, and what
is wrong with a file is a `ValueError` or an `OSError`, whose text says so in a few words. Callers name the file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

MOST_BYTES = 1 << 30
"""Of a text that is read whole: the names of an ARC pack's million puzzles take 30 MB."""

_MOST_LINE = 1 << 24
MOST_YAML_BYTES = 1 << 20
_MOST_YAML_NODES = 20_000  # with all aliases written out; a run's options are some hundreds
_MOST_DEPTH = 64

# A file this large of which less than this share is stored is a hole that claims to be a file.
_SPARSE_BYTES = 1 << 28
_SPARSE_SHARE = 0.01
_MOST_EXTENTS = 1 << 12


def open_regular(file: Path | str) -> BufferedReader:
    """Open a regular file to read its bytes; of pipes and devices, which may never end, an OSError is raised."""
    # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(file: Path | str, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes, unpacked if its name ends with .gz.

    Raises:
        OSError, EOFError: it cannot be read.
        ValueError: it is larger.
    """
    with open_regular(file) as stream:
        try:
            content = (gzip.GzipFile(fileobj=stream) if _is_packed(file) else stream).read(most + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
    if len(content) > most:
        raise ValueError(f"it has more than the {most:,} bytes that such a file may have")
    return content


@contextmanager
def open_lines(file: Path | str) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 text in a regular file, unpacked if its name ends with .gz, with their ends as they are.

    Raises:
        OSError, EOFError: it cannot be read, on opening or on the way.
        ValueError: it is not UTF-8, is torn, or a line has more than 16 million characters.
    """

    def lines(text: TextIO) -> Iterator[str]:
        try:
            while line := text.readline(_MOST_LINE + 1):
                if len(line) > _MOST_LINE:
                    raise ValueError(f"it has a line of more than {_MOST_LINE:,} characters")
                yield line
        except zlib.error as error:
            raise ValueError(str(error)) from error

    with open_regular(file) as stream:
        content = gzip.GzipFile(fileobj=stream) if _is_packed(file) else stream
        yield lines(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""))


def _is_packed(file: Path | str) -> bool:
    return os.fspath(file).endswith(".gz")


def read_text(file: Path | str, most: int = MOST_BYTES) -> str:
    """The UTF-8 text in a regular file of at most `most` bytes; errors as `read_bytes`."""
    return read_bytes(file, most).decode("utf-8")


def read_json(file: Path | str, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file; errors as `read_bytes` and `parse_json`."""
    return parse_json(read_text(file, most))


_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is no JSON, is nested deeper than 64, or holds half a surrogate pair, which no file can store.
    """
    if text.count("[") + text.count("{") > _MOST_DEPTH:
        depth = 0
        for found in _STRING_OR_BRACKET.finditer(text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            if depth > _MOST_DEPTH:
                raise ValueError(f"it is nested deeper than {_MOST_DEPTH}")
    try:
        value = json.loads(text)
    except RecursionError as error:  # an unclosed string may have hidden brackets
        raise ValueError(f"it is nested deeper than {_MOST_DEPTH}") from error
    if not text.isascii() or _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("it holds half a surrogate pair, which is no character") from error
    return value


def read_yaml_text(file: Path | str) -> str:
    """The text of a YAML file that is safe to hand to a YAML library.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or nested deeper than 64, or refers to itself, or is much larger than it looks
            because of aliases of aliases.
    """
    text = read_text(file, MOST_YAML_BYTES)
    _check_yaml(text)
    return text


def _check_yaml(text: str) -> None:
    """Count what a YAML text holds from its events, for which no part of it is built."""
    import yaml

    sizes: dict[str, int] = {}  # of anchored nodes that are closed
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and size without what is open in it
    total = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            size = 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, 1))
                if len(open_nodes) > _MOST_DEPTH:
                    raise ValueError(f"it is nested deeper than {_MOST_DEPTH}")
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, size = open_nodes.pop()
                if anchor is not None:
                    sizes[anchor] = size
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in [anchor for anchor, _ in open_nodes]:
                    raise ValueError(f"its alias {event.anchor[:40]} stands within what it refers to")
                if event.anchor not in sizes:
                    raise ValueError(f"its alias {event.anchor[:40]} stands for nothing")
                size = sizes[event.anchor]
            elif isinstance(event, yaml.ScalarEvent):
                if event.anchor is not None:
                    sizes[event.anchor] = 1
            else:
                continue
            if open_nodes:
                anchor, inside = open_nodes[-1]
                open_nodes[-1] = (anchor, inside + size)
            # Whatever is open has at least this size.
            total = sum(inside for _, inside in open_nodes)
            if total > _MOST_YAML_NODES:
                raise ValueError(f"it has more than {_MOST_YAML_NODES:,} values, with its aliases written out")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def read_array(file: Path | str, kinds: str, wanted: str) -> NDArray[Any]:
    """The array in a .npy file, mapped read-only: only what is looked at is read.

    Args:
        kinds: letters of numpy's `dtype.kind` that are wanted, such as "iu" for integers.
        wanted: their name in errors.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no .npy file, holds another kind of numbers or fewer bytes than its header claims, or is
            almost all holes.
    """
    with open_regular(file) as stream:
        shape, is_fortran, dtype = _read_header(stream)
        if dtype.kind not in kinds or dtype.names is not None:
            raise ValueError(f"it holds {str(dtype)[:40]}, not {wanted}")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"its header claims the shape {shape}")
        start, size = stream.tell(), os.fstat(stream.fileno()).st_size
        claimed = math.prod(shape) * dtype.itemsize
        if claimed > size - start:
            raise ValueError(f"its header claims {claimed:,} bytes, but {size - start:,} follow")
        if _is_hole(stream):
            raise ValueError(f"it claims {size:,} bytes, but hardly any are stored")
        order = "F" if is_fortran else "C"
        if not claimed:  # nothing to map
            return np.empty(shape, dtype, order=order)  # type: ignore[call-overload, no-any-return]
        # A plain view of the map: np.memmap's own indexing adds a cost to every gather.
        mapped = np.memmap(stream, dtype, "r", start, shape, order=order)  # type: ignore[call-overload]
    return np.asarray(mapped)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, whether it is in Fortran's order, and the dtype of the array that follows in a .npy stream."""
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"its format {version[0]}.{version[1]} is not that of arrays of numbers")
    try:
        return read_header(stream)
    except (ValueError, OSError):
        raise
    except Exception as error:  # of a header that is a Python literal of another kind, or nested too deep
        raise ValueError(f"its header is not that of an array ({type(error).__name__})") from error


def parse_npz(content: bytes, wanted: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
    """The arrays in what `numpy.savez` wrote: just those of these names, dtypes and shapes.

    Raises:
        ValueError: it is something else.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if members.keys() != wanted.keys() or len(members) != len(archive.infolist()):
                raise ValueError(f"it holds {', '.join(sorted(members))[:80]}, not {', '.join(sorted(wanted))}")
            for name, (dtype, shape) in wanted.items():
                if members[name].compress_type != zipfile.ZIP_STORED:  # what is packed may be much larger
                    raise ValueError(f"its {name} is compressed")
                with archive.open(members[name]) as stream:
                    found = _read_header(stream)
                    if found != (shape, False, dtype):
                        raise ValueError(f"its {name} is {found[2]} {found[0]}, not {dtype} {shape}")
                    size = math.prod(shape) * dtype.itemsize
                    numbers = stream.read(size + 1)
                if len(numbers) != size:
                    raise ValueError(f"its {name} does not have the {size:,} bytes that its header claims")
                arrays[name] = np.frombuffer(numbers, dtype).reshape(shape)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise error if type(error) is ValueError else ValueError(f"it is no archive of arrays ({error})") from error
    return arrays


def sha256_of(file: Path | str) -> str:
    """Of a regular file, in hexadecimal; an OSError for pipes, devices, and files that are almost all holes."""
    with open_regular(file) as stream:
        if _is_hole(stream):
            raise OSError(f"it claims {os.fstat(stream.fileno()).st_size:,} bytes, but hardly any are stored")
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_hole(stream: BufferedReader) -> bool:
    """Whether a file is large, and almost all of it is not stored: to read it takes hours, to make it none."""
    size = os.fstat(stream.fileno()).st_size
    return size > _SPARSE_BYTES and _stored_bytes(stream.fileno(), size) < _SPARSE_SHARE * size


def _stored_bytes(descriptor: int, size: int) -> int:
    """Bytes of a file that are not holes, or a part of them where they lie in very many pieces."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    stored = at = 0
    for _ in range(_MOST_EXTENTS):
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError:  # none after here
            return stored
        stored += at - begin
        if stored >= _SPARSE_SHARE * size:
            break
    return stored
