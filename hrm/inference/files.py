"""Files and pipes of puzzles: lines in, an answer or a sentence for each as a JSON line out."""

from __future__ import annotations

import csv
import io
import json
import os
import queue
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from hrm.errors import UserError
from hrm.inference.model import TrainedModel
from hrm.inference.predictor import PredictOptions
from hrm.output import silence
from hrm.reading import open_lines, parse_json, read_json
from hrm.tasks.form import Puzzle
from hrm.writing import is_special, new_file

STANDARD = "-"
_MOST_LINE = 1 << 24
_COLUMNS = ("input", "question")
_JSON_FILES = (".json", ".json.gz")


class Line(NamedTuple):
    """An input: what it stands for, or why it stands for nothing."""

    number: int  # in its file, from 1
    value: Any
    problem: str | None = None


@dataclass
class Count:
    """How many inputs there were, and how many of them could not be answered."""

    inputs: int = 0
    bad: int = 0


# Reading.


@contextmanager
def open_inputs(source: str) -> Iterator[Iterator[Line]]:
    """The inputs in a file, or on stdin for "-".

    `<name>.json` is one value: a task of ARC, tasks by their names, or a list of inputs. In any other file an input is
    a line: JSON, a row of CSV under a header that has `input` or `question`, or a puzzle as text. Empty lines are
    skipped.

    Raises:
        UserError: it cannot be read, on opening or on the way.
    """
    with ExitStack() as stack:
        with _told(source):
            if source == STANDARD:
                lines = _lines(_read_stdin())
            elif source.endswith(_JSON_FILES):
                lines = iter(_values(read_json(source), Path(source).name.partition(".")[0]))
            else:
                lines = _lines(stack.enter_context(open_lines(source)))
        yield _each(lines, source)


def _each(lines: Iterator[Line], source: str) -> Iterator[Line]:
    with _told(source):
        yield from lines


@contextmanager
def _told(source: str) -> Iterator[None]:
    """What reading raises, as a sentence."""
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"input={source} cannot be read ({reason}): give a UTF-8 file of puzzles, or -.") from error


def _read_stdin() -> Iterator[str]:
    # Of its own, not sys.stdin: Python, when it ends, would wait for a thread that reads that.
    stream = io.TextIOWrapper(os.fdopen(os.dup(0), "rb"), encoding="utf-8-sig", newline="", errors="replace")
    while line := stream.readline(_MOST_LINE + 1):
        if len(line) > _MOST_LINE:
            raise ValueError(f"it has a line of more than {_MOST_LINE:,} characters")
        yield line


def _lines(stream: Iterable[str]) -> Iterator[Line]:
    numbered = ((number, text.rstrip("\r\n")) for number, text in enumerate(stream, start=1))
    filled = ((number, text) for number, text in numbered if text.strip())
    first = next(filled, None)
    if first is None:
        return
    try:
        header = [name.strip() for name in next(csv.reader([first[1]]), [])]
    except csv.Error:  # such as a cell of more than 131,072 characters
        header = []
    if len(header) > 1 and set(header) & set(_COLUMNS):
        for number, text in filled:
            yield _csv_line(number, text, header)
        return
    if header and header[0] in _COLUMNS:  # a single column
        yield from (Line(number, text) for number, text in filled)
        return
    for number, text in chain([first], filled):
        yield _line(number, text)


def _line(number: int, text: str) -> Line:
    """JSON where it looks like it; a text that is none may still be a puzzle whose symbols are brackets."""
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return Line(number, text)
    try:
        return Line(number, parse_json(text))
    except ValueError as error:
        return Line(number, text, f"it is not valid JSON ({error})")


def _csv_line(number: int, text: str, header: Sequence[str]) -> Line:
    try:
        (cells,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError) as error:
        return Line(number, None, f"it is no row of CSV ({error})")
    if len(cells) != len(header):
        return Line(number, None, f"it has {len(cells)} cells, but the header has {len(header)}")
    row = dict(zip(header, cells, strict=True))
    value = {name: row[name] for name in (*_COLUMNS, "puzzle") if row.get(name)}
    return Line(number, value)


def _values(content: object, name: str) -> list[Line]:
    """The inputs in the value of a JSON file; a task of ARC is called by the name of its file, or its key."""
    if isinstance(content, Mapping) and "test" in content:
        content = [{"puzzle": name, **content}]
    elif isinstance(content, Mapping) and content and all(isinstance(each, Mapping) for each in content.values()):
        content = [{"puzzle": key, **each} for key, each in content.items()]
    elif not isinstance(content, list):
        content = [content]
    return [Line(number, value) for number, value in enumerate(content, start=1)]


def batches(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """Lines, `size` at a time, or as many as are there: one that comes alone is not kept waiting for the next.

    Raises:
        Exception: what reading raised.
    """
    waiting: queue.Queue[Line | Exception | None] = queue.Queue(2 * size)
    closed = threading.Event()

    def put(item: Line | Exception | None) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for line in lines:
                put(line)
                if closed.is_set():
                    return
            put(None)
        except Exception as error:
            put(error)

    threading.Thread(target=read, name="inputs", daemon=True).start()
    try:
        while True:
            item, batch = waiting.get(), []
            while isinstance(item, Line):
                batch.append(item)
                if len(batch) == size:
                    break
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    break
            if batch:
                yield batch
            if isinstance(item, Exception):
                raise item
            if item is None:
                return
    finally:
        closed.set()


def full_batches(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """Lines, `size` at a time."""
    while batch := list(islice(lines, size)):
        yield batch


# Answering.


def answer_lines(
    model: TrainedModel, lines: Sequence[Line], first: int, options: PredictOptions
) -> list[dict[str, Any]]:
    """An object for each answer, in the order of the lines, or for each line that has none.

    Args:
        first: the index of the first line among all inputs.

    Raises:
        UserError: an option is of no use for any line.
    """
    records: list[list[dict[str, Any]]] = [[] for _ in lines]
    puzzles: list[Puzzle] = []
    owners: list[int] = []
    for position, line in enumerate(lines):
        try:
            read = model.task.puzzles_of(line.value, model.form)
        except UserError as error:
            reason = line.problem or _about_row(line.value, model) or str(error)
            records[position].append({"index": first + position, "error": f"line {line.number}: {reason}"})
        else:
            puzzles += read
            owners += [position] * len(read)
    size = model.predictor.chunk_size(options)
    parts = (slice(start, start + size) for start in range(0, len(puzzles), size))
    for out in model.predictor.answers(((puzzles[part], owners[part]) for part in parts), options):
        for number, position in enumerate(out.index.tolist()):
            records[position].append(
                {
                    "index": first + position,
                    "answer": out.values[number],
                    "q_halt": round(float(out.q_halt[number]), 6),
                    "steps": int(out.steps[number]),
                    "text": out.texts[number],
                }
            )
    return [record for of_line in records for record in of_line]


def _about_row(value: Any, model: TrainedModel) -> str | None:
    """The reason why a line is no puzzle where it is as long as one of the rows that a puzzle is drawn in."""
    rows, width = model.task.grid(model.form) or (1, 0)
    if rows == 1 or not isinstance(value, str) or len(value) != width:
        return None
    return f"it has {width} characters, a row of a puzzle of {rows} rows: write all of them in one line."


def predict_file(model: TrainedModel, source: str, target: str, options: PredictOptions) -> Count:
    """Answer the inputs in `source` and write JSON lines to `target`; "-" stands for stdin and stdout.

    Ends quietly where nobody reads stdout any more.

    Raises:
        UserError: a file cannot be read or written.
    """
    if STANDARD not in (source, target) and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"output={target} is the input: give another file.")
    count = Count()
    size = model.predictor.chunk_size(options)
    is_pipe = source == STANDARD and not stat.S_ISREG(os.fstat(0).st_mode)
    with open_inputs(source) as lines, _open_output(target) as stream, _bar() as bar:
        for batch in (batches if is_pipe else full_batches)(lines, size):
            if is_pipe or len(batch) == size:  # how many there are is not known
                options = model.predictor.with_batch_size(options, size)
            for record in answer_lines(model, batch, count.inputs, options):
                count.bad += "error" in record
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            count.inputs += len(batch)
            bar.update(len(batch))
    return count


@contextmanager
def _open_output(target: str) -> Iterator[TextIO]:
    if target != STANDARD and not is_special(Path(target)):
        with new_file(Path(target)) as file, file.open("x", encoding="utf-8") as stream:
            yield stream
        return
    try:
        number = os.dup(sys.stdout.fileno()) if target == STANDARD else os.open(target, os.O_WRONLY)
        stream = io.TextIOWrapper(os.fdopen(number, "wb"), encoding="utf-8", newline="\n")
        try:
            yield stream
            stream.flush()
        except BrokenPipeError:
            silence(stream)
        finally:
            with suppress(OSError, ValueError):
                stream.close()
    except OSError as error:
        raise UserError(f"output={target} cannot be written ({error.strerror or error}): give a file.") from error


def _bar() -> tqdm[Any]:
    """A progress bar on stderr, for people only."""
    return tqdm(desc="answering", unit=" inputs", leave=False, file=sys.stderr, disable=not sys.stderr.isatty())
