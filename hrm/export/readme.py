"""What stands in an exported folder for people: what the files take and give, and a program that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import torch

from hrm.export.format import Format, Snippets
from hrm.export.graphs import SOLVE, STEP, Graph, Values, schedule
from hrm.inference.model import TrainedModel
from hrm.tasks.base import PuzzleSize

PROGRAM_FILE = "solve.py"

_PROGRAM = '''\
"""Answer puzzles: `python solve.py PUZZLE ...`, or one a line from the standard input."""

{standard}
from pathlib import Path

{imports}

FOLDER = Path(__file__).parent
SYMBOLS = {symbols}  # {what}
{load}

{setup}
for puzzle in sys.argv[1:] or sys.stdin.read().splitlines():
    puzzles = {{
        "inputs": {array}.asarray([[SYMBOLS.index(cell) for cell in {cells}]]),
        "puzzle_identifiers": {array}.asarray([0]),
    }}
{solve}
    print({joint}.join(SYMBOLS[token] for token in logits[0].argmax(-1)))
    print(f"right with probability {{1 / (1 + math.exp(-float(q_halt[0]))):.3f}}, says the model", file=sys.stderr)
'''

_BY_SOLVE = (
    'solve = load("solve")',
    "    logits, q_halt, q_continue = solve(**puzzles)",
)
_BY_STEP = (
    'step = load("step")',
    """\
    states = {{name: {array}.zeros({shape}, dtype={array}.float32) for name in {states}}}
    for number in range({num_steps}):
        begins = {array}.asarray([number == 0])  # the states are not looked at then
        logits, q_halt, q_continue, *new = step(**puzzles, halted=begins, **states)
        states = dict(zip(states, new))""",
)
_BY_MODULES = (
    """\
embed, heads = load("embed"), load("heads")
# What an update takes, the state that it replaces first; and the updates of an ACT step in order.
takes = {inputs}
order = "{order}".split()
updates = {{name: load(name) for name in takes}}
""",
    """\
    known = dict(zip({known}, embed(**puzzles)))
    for number in range({num_steps}):
        for name in order:
            (known[takes[name][0]],) = updates[name](**{{state: known[state] for state in takes[name]}})
    logits, q_halt, q_continue = heads({output_state}=known["{output_state}"])""",
)

_PAGE = """\
# A model for {task}

Written by `hrm export format={format}`. `export.txt` and `export.json` say how it compares with PyTorch.

{usage}
```bash
python solve.py "{example}"
```

`logits` are the scores of the answer's tokens; `q_halt` and `q_continue` are logits of the answer being right as it is,
and of going on being worth it. `puzzle_identifiers` are {identifiers}. B, the number of puzzles, may be another one at
each call{most}.

{graphs}"""

_TYPES = {torch.bool: "bool", torch.int64: "int64", torch.float32: "float32"}


def readme(
    model: TrainedModel,
    name: str,
    chosen: Format,
    graphs: Sequence[Graph],
    max_batch_size: int,
    example: str,
) -> str:
    """The page.

    Args:
        name: of the format.
        example: a puzzle as `program` takes it.
    """
    count = model.form.num_puzzle_identifiers
    return _PAGE.format(
        task=model.task.name,
        format=name,
        usage=chosen.usage(model.device),
        example=example,
        most=f", {max_batch_size} at most" if chosen.bounded else "",
        identifiers=f"rows of a table of {count:,} puzzles" if count > 1 else "zeros",
        graphs="\n".join(_described(graph, chosen) for graph in graphs),
    )


def _described(graph: Graph, chosen: Format) -> str:
    rows = [
        f"| {kind} | `{each.name}` | {_TYPES[each.dtype]} | {_shape(each)} |"
        for kind, values in (("takes", graph.inputs), ("gives", graph.outputs))
        for each in values
    ]
    table = "\n".join(["| | tensor | type | shape |", "|---|---|---|---|", *rows])
    return f"## `{chosen.files(graph.name)[0]}`\n\n{fill(graph.about, 120)}\n\n{table}\n"


def _shape(values: Values) -> str:
    return f"[{', '.join(['B', *map(str, values.shape)])}]"


def program(model: TrainedModel, chosen: Format, graphs: Sequence[Graph], num_steps: int) -> str:
    """A program that answers puzzles by the files alone."""
    characters, snippets = _characters(model), chosen.snippets(graphs, model.device)
    setup, solve = _solving(model, snippets, {graph.name for graph in graphs}, num_steps)
    if characters is not None:
        written_as = {"symbols": f'"{characters}"', "what": "what each token is written as"}
        written_as |= {"cells": "puzzle", "joint": '""'}
    else:
        written_as = {
            "symbols": f"[str(token) for token in range({model.form.vocab_size})]",
            "what": "the model's own tokens, written as numbers",
            "cells": "puzzle.split()",
            "joint": '" "',
        }
    standard = "\n".join(f"import {name}" for name in sorted({"math", "sys", *snippets.standard}))
    return _PROGRAM.format(**snippets._asdict() | {"standard": standard}, **written_as, setup=setup, solve=solve)


def _solving(model: TrainedModel, snippets: Snippets, graphs: set[str], num_steps: int) -> tuple[str, str]:
    """What the program does before the first puzzle, and for each."""
    inner = model.model.model.inner
    states, levels = list(inner.initial_states), schedule(model) if inner.levels else []
    fields = {
        "array": snippets.array,
        "num_steps": num_steps,
        "shape": (1, inner.num_tokens, inner.config.hidden_size),
        "states": states,
        "known": ["embeddings", *states],
        "output_state": inner.output_state,
        "inputs": dict(levels),
        "order": " ".join(level.graph for level in levels),
    }
    chosen = _BY_SOLVE if SOLVE in graphs else _BY_STEP if STEP in graphs else _BY_MODULES
    setup, solve = (text.format(**fields) for text in chosen)
    return setup, solve


def written(model: TrainedModel, tokens: list[int]) -> str:
    """A puzzle of tokens [S] as `program` takes it."""
    if (symbols := _characters(model)) is not None:
        return "".join(symbols[token] for token in tokens)
    return " ".join(map(str, tokens))


def _characters(model: TrainedModel) -> str | None:
    """A character for each token, "?" for padding; None where the task has no such."""
    view = model.task.view(PuzzleSize(model.form.seq_len, model.form.vocab_size))
    symbols = [symbol or ("." if token == view.blank else "?") for token, symbol in enumerate(view.symbols)]
    are_characters = all(len(symbol) == 1 and symbol.isascii() and symbol not in '"\\' for symbol in symbols)
    if not are_characters or len(set(symbols)) < len(symbols) or len(symbols) != model.form.vocab_size:
        return None
    return "".join(symbols)
