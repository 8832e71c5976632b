"""A model as functions of tensors alone: one ACT step, a whole solve as a loop over it, and its modules apart.

Shapes: B sequences, which may be any number, S input tokens, T tokens with the puzzle prefix, D hidden size, V tokens
of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from hrm.errors import UserError, first_sentence
from hrm.evaluation.latent import by_definition
from hrm.inference.model import TrainedModel
from hrm.models.act import AdaptiveComputation, Carry
from hrm.models.recurrent import RecurrentModel

SOLVE, STEP, EMBED, HEADS = "solve", "step", "embed", "heads"
INPUTS = ("inputs", "puzzle_identifiers")
OUTPUTS = ("logits", "q_halt", "q_continue")
NEW = "new_"  # before a state's name, where a graph gives it


class Values(NamedTuple):
    """A tensor that a graph takes or gives, of B sequences."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one sequence


@dataclass(frozen=True)
class Graph:
    """A part of a model as a function of tensors."""

    name: str  # of its files
    about: str  # what it computes, in Markdown
    module: nn.Module  # from the inputs in order to a tuple of the outputs
    inputs: tuple[Values, ...]
    outputs: tuple[Values, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)  # for formats that keep such


class Level(NamedTuple):
    """An update of an ACT step, as a program makes it."""

    graph: str
    inputs: tuple[str, ...]  # the state that it replaces, and what is added to it before


class _Step(nn.Module):
    def __init__(self, act: AdaptiveComputation) -> None:
        super().__init__()
        self.act = act

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inputs, puzzle_identifiers, halted, *states = given
        names = self.act.inner.initial_states
        batch = dict(zip(INPUTS, (inputs, puzzle_identifiers), strict=True))
        steps = torch.zeros_like(halted, dtype=torch.int32)  # counted by whoever calls
        after, outputs = self.act(Carry(dict(zip(names, states, strict=True)), steps, halted, batch), batch)
        answers = (outputs["logits"], outputs["q_halt_logits"], outputs["q_continue_logits"])
        return *answers, *(after.states[name] for name in names)


class _Solve(nn.Module):
    def __init__(self, act: AdaptiveComputation, num_steps: int) -> None:
        super().__init__()
        self.act, self.num_steps = act, num_steps

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        inner = self.act.inner
        names = list(inner.initial_states)
        batch = dict(zip(INPUTS, given, strict=True))
        initial, _, _ = self.act.reset_carry(self.act.initial_carry(batch), batch)
        prepared = inner.prepare(batch)

        def goes_on(step: Tensor, *_: Tensor) -> Tensor:
            return step < self.num_steps

        def advance(step: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            new = inner.recur(dict(zip(names, states, strict=True)), prepared)
            return step + 1, *(new[name] for name in names)

        _, *last = torch.while_loop(  # type: ignore[no-untyped-call]
            goes_on, advance, (torch.tensor(0), *(initial[name] for name in names))
        )
        states = dict(zip(names, last, strict=True))
        return inner.logits(states), *inner.q_values(states)


class _Embed(nn.Module):
    def __init__(self, act: AdaptiveComputation) -> None:
        super().__init__()
        self.act = act

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        batch = dict(zip(INPUTS, given, strict=True))
        states, _, _ = self.act.reset_carry(self.act.initial_carry(batch), batch)
        return self.act.inner.prepare(batch).embeddings, *states.values()


class _Level(nn.Module):
    def __init__(self, inner: RecurrentModel, level: str) -> None:
        super().__init__()
        self.inner, self.level = inner, level

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        update = self.inner.levels[self.level]
        states = dict(zip((update.state, *update.inputs), given, strict=True))
        # A level that takes no embeddings does not look at them.
        embeddings = states.pop("embeddings", states[update.state])
        return (self.inner.update(states, self.inner.prepare_embedded(embeddings), self.level)[update.state],)


class _Heads(nn.Module):
    def __init__(self, inner: RecurrentModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        states = {self.inner.output_state: given[0]}
        return self.inner.logits(states), *self.inner.q_values(states)


def whole_graphs(model: TrainedModel, num_steps: int, *, solve: bool) -> Iterator[Graph]:
    """One ACT step and, if `solve`, all of them.

    Args:
        num_steps: ACT steps of a solve.
    """
    act, states = model.model.model, _states(model)
    if solve:
        yield Graph(
            SOLVE,
            f"A whole solve: {num_steps} ACT steps from the initial states, without early halting.",
            _Solve(act, num_steps),
            _puzzles(model),
            _answers(model),
            {"act_steps": str(num_steps)},
        )
    yield Graph(
        STEP,
        "One ACT step. `halted` is true for puzzles that begin: their states are not looked at, zeros will do. The new "
        "states are for the next step, with `halted` false. A puzzle may end where `q_halt > q_continue`, and leave "
        "its row of the batch to another one.",
        _Step(act),
        (*_puzzles(model), Values("halted", torch.bool, ()), *states),
        (*_answers(model), *_renamed(states)),
    )


def module_graphs(model: TrainedModel) -> Iterator[Graph]:
    """The levels of a model, one update each, and what stands before and after them.

    Raises:
        UserError: an ACT step of this model is not made of such updates.
    """
    act, states = model.model.model, {state.name: state for state in _states(model)}
    inner = act.inner
    if not inner.levels:
        raise UserError(
            f"the modules of {model.checkpoint.weights_file} cannot be exported apart: {inner.config.name} has no "
            "levels; give parts=whole."
        )
    embeddings = next(iter(states.values()))._replace(name="embeddings")
    order = ", ".join(level.graph for level in schedule(model))
    yield Graph(
        EMBED,
        "What stays the same while a puzzle is solved, `embeddings`, and the states that it begins with.",
        _Embed(act),
        _puzzles(model),
        (embeddings, *states.values()),
    )
    for name, update in inner.levels.items():
        yield Graph(
            name,
            f"One update of `{update.state}`. The updates of an ACT step: {order}.",
            _Level(inner, name),
            tuple((states | {"embeddings": embeddings})[each] for each in (update.state, *update.inputs)),
            _renamed([states[update.state]]),
        )
    yield Graph(
        HEADS,
        f"The answer in `{inner.output_state}`, after the last update of an ACT step.",
        _Heads(inner),
        (states[inner.output_state],),
        _answers(model),
    )


def schedule(model: TrainedModel) -> list[Level]:
    """The updates of an ACT step in order, of a model that has levels."""
    inner = model.model.model.inner
    graphs = {update: name for name, update in inner.levels.items()}
    return [Level(graphs[update], (update.state, *update.inputs)) for update in inner.plan.schedule]


def traced(graph: Graph, model: TrainedModel, max_batch_size: int | None = None) -> torch.export.ExportedProgram:
    """A graph as PyTorch's exporter writes it down, by the definition of the blocks, for any number of sequences.

    Args:
        max_batch_size: the largest number of sequences, at least 2, for formats that must know it.

    Raises:
        UserError: this PyTorch cannot.
    """
    batch, device = torch.export.Dim("batch", max=max_batch_size), model.device
    # Two sequences: with one, PyTorch would take their number for a constant.
    example = tuple(torch.zeros(2, *each.shape, dtype=each.dtype, device=device) for each in graph.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad(), by_definition(model.model):
            warnings.simplefilter("ignore")
            program = torch.export.export(
                graph.module.eval(), example, dynamic_shapes=(tuple({0: batch} for _ in example),), strict=False
            )
    except RuntimeError as error:  # what the exporter cannot take has many names, all of them of this kind
        raise cannot_write(graph, model, error) from error
    _drop_unused_weights(program)
    return program


def _drop_unused_weights(program: torch.export.ExportedProgram) -> None:
    """Leave out the weights of the model that this part of it does not use: the exporter takes all of them in."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and not node.users}
    signature = program.graph_signature
    for spec in list(signature.input_specs):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.arg.name in nodes:
            program.graph.erase_node(nodes[spec.arg.name])
            signature.input_specs.remove(spec)
            values = program.state_dict if spec.target in program.state_dict else program.constants
            del values[spec.target]
    program.graph_module.recompile()


def cannot_write(graph: Graph, model: TrainedModel, error: BaseException) -> UserError:
    """That a library cannot write a graph, in its own words."""
    return UserError(
        f"PyTorch {torch.__version__} cannot write {graph.name} of {model.checkpoint.weights_file} "
        f"({first_sentence(error)}): take another PyTorch or another format."
    )


def _puzzles(model: TrainedModel) -> tuple[Values, ...]:
    return tuple(
        Values(name, torch.int64, shape) for name, shape in zip(INPUTS, ((model.form.seq_len,), ()), strict=True)
    )


def _answers(model: TrainedModel) -> tuple[Values, ...]:
    shapes = ((model.form.seq_len, model.form.vocab_size), (), ())
    return tuple(Values(name, torch.float32, shape) for name, shape in zip(OUTPUTS, shapes, strict=True))


def _states(model: TrainedModel) -> list[Values]:
    inner = model.model.model.inner
    shape = (inner.num_tokens, inner.config.hidden_size)
    return [Values(name, inner.dtype, shape) for name in inner.initial_states]


def _renamed(states: Sequence[Values]) -> tuple[Values, ...]:
    return tuple(state._replace(name=f"{NEW}{state.name}") for state in states)
