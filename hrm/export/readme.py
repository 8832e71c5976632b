"""What stands in an exported folder for people: what the files take and give, and a program that uses them."""

from __future__ import annotations

from hrm.inference.model import TrainedModel
from hrm.tasks.base import PuzzleSize

_PROGRAM = """\
import sys

import numpy as np
import onnxruntime

SYMBOLS = {symbols}  # {what}
cells = {cells}
tokens = np.array([[SYMBOLS.index(cell) for cell in cells]], dtype=np.int64)  # [1, {seq_len}]
session = onnxruntime.InferenceSession("solve.onnx", providers=["CPUExecutionProvider"])
feeds = {{"inputs": tokens, "puzzle_identifiers": np.zeros(1, dtype=np.int64)}}
logits, q_halt, q_continue = session.run(["logits", "q_halt", "q_continue"], feeds)
print({joint}.join(SYMBOLS[token] for token in logits[0].argmax(-1)))
print(f"the model takes this for right with probability {{1 / (1 + np.exp(-q_halt[0])):.3f}}", file=sys.stderr)
"""

_PAGE = """\
# {title}

Written by `hrm export`; this folder needs neither that package nor PyTorch. `export.json` says how it compares with
PyTorch.

`solve.onnx` takes {steps} ACT steps.

- inputs: `inputs` [B, {seq_len}] and `puzzle_identifiers` [B], int64. {identifiers}
- outputs: `logits` [B, {seq_len}, {vocab_size}], the scores of the answer's tokens; `q_halt` and `q_continue` [B],
  logits of the answer being right as it is, and of going on being worth it.

`step.onnx` takes one ACT step.

- inputs: those of `solve.onnx`; `halted` [B] bool, true for puzzles that begin, whose states are then not looked at
  (zeros will do); {states}, each [B, {num_tokens}, {width}].
- outputs: those of `solve.onnx`; {new_states}, the states to pass to the next step, with `halted` false. A puzzle may
  end where `q_halt > q_continue`, and leave its place in the batch to another one.

B, the number of puzzles, may be another one at each call. Numbers are float32.

Save as `solve.py` in this folder, `pip install numpy onnxruntime`, and give it a puzzle: `python solve.py "{example}"`

```python
{program}```
"""


def readme(model: TrainedModel, num_steps: int, example: str) -> str:
    """The page.

    Args:
        example: a puzzle as `program` takes it.
    """
    form, inner = model.form, model.model.model.inner
    return _PAGE.format(
        title=f"A model for {model.task.name}",
        steps=num_steps,
        seq_len=form.seq_len,
        vocab_size=form.vocab_size,
        states=" and ".join(f"`{name}`" for name in inner.initial_states),
        new_states=" and ".join(f"`new_{name}`" for name in inner.initial_states),
        num_tokens=inner.num_tokens,
        width=inner.config.hidden_size,
        identifiers=f"These are rows of a table of {form.num_puzzle_identifiers:,} puzzles."
        if form.num_puzzle_identifiers > 1
        else "These are zeros.",
        example=example,
        program=program(model),
    )


def program(model: TrainedModel) -> str:
    """A program that answers the puzzle in its first argument by `solve.onnx`, with numpy and onnxruntime alone."""
    if (symbols := _characters(model)) is not None:
        return _PROGRAM.format(
            symbols=f'"{symbols}"',
            what="what each token is written as",
            cells="sys.argv[1]",
            joint='""',
            seq_len=model.form.seq_len,
        )
    return _PROGRAM.format(
        symbols=f"[str(token) for token in range({model.form.vocab_size})]",
        what="the model's own tokens, written as numbers",
        cells="sys.argv[1].split()",
        joint='" "',
        seq_len=model.form.seq_len,
    )


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
