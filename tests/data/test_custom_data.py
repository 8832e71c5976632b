"""Packs from your own examples: what is read, padded, grouped, split and refused; and tasks learned from them."""

import itertools
import json
import operator
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrm.config import DataConfig, PretrainConfig
from hrm.data.builders import custom as builder
from hrm.data.builders import example_tasks as tasks
from hrm.data.pack import Pack, open_pack, read_provenance
from hrm.errors import UserError
from hrm.models.hrm import HRMConfig
from hrm.tasks.tokens import Vocabulary, read_vocabulary
from hrm.training.loop import pretrain

ROOT = Path(__file__).resolve().parents[2]


def write_lines(path: Path, *lines: object) -> Path:
    """A file of JSON lines; strings stand as they are."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def line(value: object, answer: object, **names: object) -> dict[str, object]:
    return {"input": value, "output": answer, **names}


def run(output: Path, *arguments: object) -> tuple[Pack, Pack]:
    """The training and test split of a pack built by the command line."""
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 0
    return open_pack(output, "train"), open_pack(output, "test")


def decoded(pack: Pack) -> list[tuple[list[Any], list[Any]]]:
    data, vocabulary = pack.sets["all"], read_vocabulary(pack.path / "vocabulary.json")
    return list(zip(vocabulary.decode(data.inputs), vocabulary.decode(data.labels), strict=True))


# What is read.


def test_lists_are_padded_to_the_longest(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", line([5, "b", -1], ["a"]), "", line(["a"], [10, None, 0.5, 5]))
    test = write_lines(tmp_path / "test.jsonl", line(["c", None], [5.0]))
    packs = run(tmp_path / "pack", "--train", train, "--test", test)
    assert decoded(packs[0]) == [
        ([5, "b", -1, None], ["a", None, None, None]),
        (["a", None, None, None], [10, None, 0.5, 5]),
    ]
    assert decoded(packs[1]) == [(["c", None, None, None], [5, None, None, None])]
    assert json.loads((tmp_path / "pack/vocabulary.json").read_text()) == [None, -1, 0.5, 5, 10, "a", "b", "c"]
    assert json.loads((tmp_path / "pack/identifiers.json").read_text()) == ["<blank>"]
    for pack in packs:
        metadata = pack.metadata
        assert (metadata.pad_id, metadata.ignore_label_id, metadata.blank_identifier_id) == (0, 0, 0)
        assert (metadata.vocab_size, metadata.seq_len, metadata.num_puzzle_identifiers) == (8, 4, 1)


def test_grids_are_padded_below_and_to_the_right(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a", line([[1, 2], [3, 4]], [[4]]), line([[1, 2, 3]], [[3, 2, 1]]))
    test = write_lines(tmp_path / "b", line([[4]], [[1], [2]]))
    packs = run(tmp_path / "pack", "--train", train, "--test", test)
    assert decoded(packs[0]) == [
        ([1, 2, None, 3, 4, None], [4, None, None, None, None, None]),
        ([1, 2, 3, None, None, None], [3, 2, 1, None, None, None]),
    ]
    assert decoded(packs[1]) == [([4, None, None, None, None, None], [1, None, None, 2, None, None])]
    provenance = read_provenance(tmp_path / "pack")
    assert provenance["arguments"]["shape"] == "2x3"
    assert provenance["sha256"].keys() == {str(train), str(test)}


def test_another_pack_of_the_same_kind(tmp_path: Path) -> None:
    """What is tested later has the tokens and the shape of what was trained on."""
    first = write_lines(tmp_path / "first", line([[1, 2], [3, 9]], [[1]]), line([[1]], [[2]]))
    second = write_lines(tmp_path / "second", line([[9]], [[2]]), line([[2]], [[9]]))
    run(tmp_path / "one", "--train", first, "--test-fraction", 0.5)
    vocabulary = tmp_path / "one/vocabulary.json"
    packs = run(tmp_path / "two", "--train", second, "--test", second, "--vocab", vocabulary, "--shape", "2x2")
    assert vocabulary.read_bytes() == (tmp_path / "two/vocabulary.json").read_bytes()
    assert packs[0].metadata.seq_len == 4
    assert decoded(packs[1])[0] == ([9, None, None, None], [2, None, None, None])
    packs = run(tmp_path / "three", "--train", second, "--test", second, "--vocab", '[9, "x", 2]')
    assert packs[0].sets["all"].inputs.tolist() == [[1], [3]]
    assert packs[0].metadata.vocab_size == 4


def test_many_symbols(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a", line(list(range(300)), list(range(300))[::-1]))
    train, _ = run(tmp_path / "pack", "--train", file, "--test", file)
    assert train.sets["all"].inputs.dtype == np.uint16
    assert decoded(train) == [(list(range(300)), list(range(300))[::-1])]


# Groups, puzzles and splits.


def test_groups_and_puzzles(tmp_path: Path) -> None:
    train = write_lines(
        tmp_path / "train",
        line([0], [0], group="g", puzzle="red"),
        line([1], [1]),
        line([2], [2], group="g", puzzle="blue"),
        line([3], [3], group="g", puzzle="red"),
        line([4], [4], group="h"),
        line([5], [5], group="h"),
        line([6], [6], puzzle="red"),
    )
    test = write_lines(tmp_path / "test", line([7], [7], puzzle=7), line([8], [8], puzzle="blue"))
    pack, tested = run(tmp_path / "pack", "--train", train, "--test", test)
    data = pack.sets["all"]
    assert [row[0][0] for row in decoded(pack)] == [0, 3, 2, 1, 4, 5, 6]
    assert data.puzzle_indices.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert data.group_indices.tolist() == [0, 2, 3, 5, 6]
    names = json.loads((tmp_path / "pack/identifiers.json").read_text())
    assert names == ["<blank>", "red", "blue", "7"]
    named = [names[identifier] for identifier in data.puzzle_identifiers]
    assert named == ["red", "blue", "<blank>", "<blank>", "<blank>", "red"]
    assert tested.sets["all"].puzzle_identifiers.tolist() == [3, 2]
    assert pack.metadata.mean_puzzle_examples == pytest.approx(7 / 6)


def test_a_group_is_never_split(tmp_path: Path) -> None:
    examples = [line([index], [index], group=index // 3) for index in range(60)]
    examples += [line([index], [index]) for index in range(60, 80)]
    file = write_lines(tmp_path / "a", *examples)
    tested = {}
    for seed in (0, 0, 1):
        train, test = run(tmp_path / "pack", "--train", file, "--test-fraction", 0.25, "--seed", seed)
        assert (train.metadata.total_groups, test.metadata.total_groups) == (30, 10)
        cells = [[row[0][0] for row in decoded(pack)] for pack in (train, test)]
        assert sorted(cells[0] + cells[1]) == list(range(80))
        assert not {cell // 3 for cell in cells[0] if cell < 60} & {cell // 3 for cell in cells[1] if cell < 60}
        assert tested.setdefault(seed, cells[1]) == cells[1]
    assert tested[0] != tested[1]


def test_known_inputs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_lines(tmp_path / "a", line([1], [1]), line([2], [2], puzzle="p"))
    test = write_lines(tmp_path / "b", line([1], [2]), line([2], [2]), line([2], [1], puzzle="p"))
    run(tmp_path / "pack", "--train", train, "--test", test)
    assert "; 2 test inputs are also trained on" in capsys.readouterr().out
    run(tmp_path / "pack", "--train", train, "--test", write_lines(test, line([3], [1])))
    assert "also" not in capsys.readouterr().out


def test_equal_builds_give_equal_bytes(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a", *(line([index], [f"{index}"]) for index in range(9)))
    for name in ("one", "two"):
        run(tmp_path / name, "--train", file, "--test-fraction", 0.3)
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_runs_as_script(tmp_path: Path) -> None:
    def script(name: str, *arguments: str) -> str:
        command = [sys.executable, f"dataset/{name}.py", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1
        return done.stdout

    file = str(tmp_path / "data/tools.jsonl")
    script("write_example_task", "tool_routing", "--count", "20", "--output", file)
    said = script(
        "build_custom_dataset", "--train", file, "--test-fraction", "0.2", "--output-dir", str(tmp_path / "pack")
    )
    assert "16 training and 4 test examples of 14 cells" in said


# What users are told.


def failure(capsys: pytest.CaptureFixture[str], output: Path, *arguments: object) -> str:
    """The sentence on stderr of a build that must fail and leave nothing behind."""
    assert builder.main(["--output-dir", str(output), *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert not output.exists()
    return printed.err


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ('{"input": [1]', ": this is not valid JSON (Expecting ',' delimiter"),
        ("[1, 2]", ': this is no object; write {"input": [...], "output": [...]}.'),
        ({"input": [1]}, ": the field 'output' is missing; add it."),
        (line([1], [1], ouput=2), ": there is no field 'ouput'; a line has input, output, group, puzzle."),
        (line(5, [1]), ", input: 5 is not a list of symbols; give one with at least one symbol."),
        (line([1], []), ", output: [] is not a list of symbols"),
        (line("abc", [1]), ', input: "abc" is not a list of symbols'),
        (line([[1, 2], [3]], [[1]]), ", input: row 2 is [3]; rows of a grid are lists of one length."),
        (line([[1], 2], [[1]]), ", input: row 2 is 2; rows of a grid"),
        (line([[]], [[1]]), ", input: row 1 is []; rows of a grid"),
        (line([1, [2]], [1]), ", input: [2] is not a symbol; symbols are strings and numbers."),
        (line([1], [True]), ", output: true is not a symbol"),
        ('{"input": [1], "output": [NaN]}', ", output: NaN is not a symbol"),
        (line([1], [None, None]), ", output: there is nothing but null; give something to learn."),
        (line([1], [[1]]), ": one of input and output is a list and one a grid; make both the same."),
        (line([[1]], [[1]]), ": this is a grid, but "),
        (line([1], [1], group=[1]), ", group: [1] is no name; give a string or a whole number."),
        (line([1], [1], puzzle=""), ', puzzle: "" is no name; give a string'),
    ],
)
def test_malformed_lines(bad: object, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_lines(tmp_path / "train.jsonl", line([1], [1]))
    test = write_lines(tmp_path / "test.jsonl", line([1], [1]), "", bad)
    text = failure(capsys, tmp_path / "pack", "--train", train, "--test", test)
    assert f"error: {test}, line 3{sentence}" in text


def test_bad_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: object) -> str:
        return failure(capsys, tmp_path / "pack", "--train", train, *arguments)

    train = write_lines(tmp_path / "train", line([1], [1], group="g"), line([1, 2], [1, 2, 3], group="g"))
    test = write_lines(tmp_path / "test", line([1], [1], group="g"))
    sentence = f"{test}, line 1: group 'g' is trained on in {train}, line 2; keep a group in one file"
    assert sentence in told("--test", test)
    assert "--test-fraction cannot split a single group; give test examples with --test." in told(
        "--test-fraction", 0.5
    )
    write_lines(test, line([1], [1]))
    assert f"{train}, line 2: this example of 3 does not fit --shape 2; give a larger" in told(
        "--test", test, "--shape", 2
    )
    assert f"{train}, line 1: this example of 1 does not fit --shape 2x2" in told("--test", test, "--shape", "2x2")
    assert f"{train}, line 2, output: 3 is not in the vocabulary" in told("--test", test, "--vocab", "[1, 2]")
    write_lines(test, "")
    assert f"{test} holds no example; add lines to it." in told("--test", test)
    assert f"{tmp_path / 'gone'} cannot be read (" in told("--test", tmp_path / "gone")
    test.write_bytes(b'{"input": ["\xe9"]}')
    assert f"{test} cannot be read ('utf-8'" in told("--test", test)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "There are no test examples or two kinds of them; give one of --test and --test-fraction."),
        ("--test t --test-fraction 0.1", "There are no test examples or two kinds of them"),
        ("--test-fraction 1", "--test-fraction 1.0 is out of range; choose more than 0, less than 1."),
        ("--test t --seed -1", "--seed -1 is too small; choose 0 or more."),
        ("--test t --shape 0x3", "--shape 0x3 is no length or grid; write it as 81 or 9x9."),
        ("--test t --vocab [1,1]", "Vocabulary --vocab names a symbol twice; name each once."),
        ("--test t --vocab []", "Vocabulary --vocab names no symbol; name each once."),
        ("--test t --vocab [1,null]", "Vocabulary --vocab holds null; a symbol is a string or a number."),
        ("--test t --vocab [1", "Vocabulary --vocab is not valid JSON ("),
        ("--test t --vocab gone.json", "Vocabulary gone.json cannot be read ("),
    ],
)
def test_bad_options(arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in failure(capsys, tmp_path / "pack", "--train", "t", *arguments.split())


def test_vocabulary_files(tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.json"
    vocabulary = Vocabulary.infer(["é", 2, "10", 1.5, 10])
    vocabulary.write(tmp_path)
    assert read_vocabulary(file) == vocabulary == Vocabulary((1.5, 2, 10, "10", "é"))
    assert vocabulary.decode(np.array([[0, 5], [1, 2]])) == [[None, "é"], [1.5, 2]]
    file.write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not a list; give a JSON list of symbols"):
        read_vocabulary(file)


# The example tasks, answered by trying everything.


def edges_of(symbols: Sequence[object]) -> set[tuple[int, int]]:
    nodes = round(len(symbols) ** 0.5)
    return {divmod(index, nodes) for index, symbol in enumerate(symbols) if symbol == tasks.EDGE}


def dag_path_answer(question: list[Any]) -> list[object]:
    edges, (start, goal) = edges_of(question[2:]), question[:2]
    nodes = round(len(question[2:]) ** 0.5)
    for length in range(1, nodes + 1):
        for path in itertools.permutations(range(nodes), length):
            if (path[0], path[-1]) == (start, goal) and edges.issuperset(itertools.pairwise(path)):
                return [*path, *[tasks.END] * (nodes - length)]
    raise AssertionError("There is no path.")


def topological_order_answer(question: list[Any]) -> list[object]:
    edges = edges_of(question)
    orders = itertools.permutations(range(round(len(question) ** 0.5)))
    return list(next(order for order in orders if all(order.index(a) < order.index(b) for a, b in edges)))


def tool_routing_answer(question: list[Any]) -> list[object]:
    have, want = question[:2]
    tools = pairs(question[2:])
    for length in range(1, len(tools) + 1):
        for route in itertools.permutations(range(len(tools)), length):
            kinds = [have, *(kind for tool in route for kind in tools[tool]), want]
            if all(gives == takes for gives, takes in pairs(kinds)):
                return [*route, *[tasks.END] * (len(tools) - length)]
    raise AssertionError("There is no route.")


def reranking_answer(question: list[Any]) -> list[object]:
    query, *candidates = pairs(question)
    matches = [tuple(map(operator.eq, candidate, query)) for candidate in candidates]
    answer: list[object] = []
    for match, reason in (
        ((True, True), "both"),
        ((True, False), "type"),
        ((False, True), "topic"),
        ((False, False), "neither"),
    ):
        for number in range(len(candidates)):
            if matches[number] == match:
                answer += [number, reason]
    return answer


def retrieval_critique_answer(question: list[Any]) -> list[object]:
    (subject, attribute, value), *entries = zip(*[iter(question)] * 3, strict=True)
    labels = {(subject, attribute, other): "contradicts" for values in tasks.ATTRIBUTES.values() for other in values}
    labels[subject, attribute, value] = "supports"
    return [labels.get(entry, "unrelated") for entry in entries]


def pairs(symbols: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(symbols[::2], symbols[1::2], strict=True))


ANSWERS = {
    "dag_path": dag_path_answer,
    "reranking": reranking_answer,
    "retrieval_critique": retrieval_critique_answer,
    "topological_order": topological_order_answer,
    "tool_routing": tool_routing_answer,
}


@pytest.mark.parametrize("task", ANSWERS)
def test_example_tasks(task: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert tasks.main([task, "--output", str(file), "--count", "60", "--size", "5", "--seed", str(seed)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    examples = [json.loads(text) for text in files[0].read_text().splitlines()]
    assert len({json.dumps(example["input"]) for example in examples}) == 60
    for example in examples:
        assert example["output"] == ANSWERS[task](example["input"])
    assert len({len(example["input"]) for example in examples}) == 1


def test_more_examples_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["topological_order", "--output", str(tmp_path / "a"), "--size", "2"]
    assert tasks.main([*command, "--count", "4"]) == 2
    assert "--count 4 is more than the 3 questions of topological_order with --size 2" in capsys.readouterr().err
    assert tasks.main([*command, "--count", "0"]) == 2
    assert "--count 0 is too small; choose 1 or more." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "size", "count", "epochs", "steps"),
    [
        ("dag_path", 4, 700, 10, 2),
        ("reranking", 2, 6000, 12, 1),
        ("retrieval_critique", 3, 6000, 8, 1),
        ("topological_order", 4, 500, 40, 2),
        ("tool_routing", 2, 1500, 12, 2),
    ],
)
def test_example_tasks_are_learned(task: str, size: int, count: int, epochs: int, steps: int, tmp_path: Path) -> None:
    """Against the answer that is most frequent at each place, a small model is wrong in half the cells or fewer.

    Over seeds, a fifth is usual and two fifths the most.
    """
    tasks.main([task, "--size", str(size), "--count", str(count), "--output", str(tmp_path / "task.jsonl")])
    pack = tmp_path / "pack"
    train, test = (
        data.sets["all"].labels for data in run(pack, "--train", tmp_path / "task.jsonl", "--test-fraction", 0.2)
    )
    usual = np.array([np.bincount(column).argmax() for column in train.T])
    usual_error = (test != usual)[test != 0].mean()
    arch = HRMConfig(
        hidden_size=32,
        num_heads=2,
        H_layers=1,
        L_layers=1,
        H_cycles=1,
        puzzle_emb_ndim=32,
        pos_encodings="learned",
        L_cycles=steps,
        halt_max_steps=steps,
        forward_dtype="float32",
    )
    config = PretrainConfig(
        arch=arch,
        data_path=str(pack),
        data=DataConfig(task, str(pack), "none"),
        checkpoint_path=str(tmp_path / "run"),
        global_batch_size=32,
        epochs=epochs,
        eval_interval=None,
        lr=3e-3,
        lr_min_ratio=0.1,
        lr_warmup_steps=10,
        log_interval=1000,
        device="cpu",
        wandb="disabled",
    )
    pretrain(config)
    *_, evaluation = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 1 - evaluation["all/accuracy"] < usual_error / 2
