"""Writes examples of a small reasoning task as JSON lines, for `hrm data custom`.

hrm data example topological_order --count 5000 --output data/order.jsonl
hrm data custom --train data/order.jsonl --test-fraction 0.1 --output-dir data/order

dag_path           input: start, goal, and for every pair of nodes whether an edge leads from the first to the second
                   output: the nodes of a path of fewest edges
recall             input: names, each with the value it has, then the same names in another order
                   output: nothing for the first part, then the value of each name
topological_order  input: for every pair of nodes whether an edge leads from the first to the second
                   output: all nodes, none before one that leads to it
tool_routing       input: the type of what there is, the type of what is wanted, and what each tool takes and gives
                   output: the fewest tools that turn the one into the other, in the order of their use
reranking          input: the type and the topic that a query asks for, and the type and the topic of each candidate
                   output: each candidate and why it stands there, best first: both match, the type, the topic, neither
retrieval_critique input: a subject, an attribute of it and the value that an answer gives, and the same three of each
                   entry of a memory
                   output: for each entry whether it supports the answer, contradicts it, or is about something else

Of several right answers it is the first in dictionary order, so that every question has one answer; candidates that
match equally well keep their order. Answers shorter than the longest are filled up with "end". No question comes twice,
so that a test split shares none with training.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrm.data.builders.common import check_at_least, run_command
from hrm.errors import UserError

COMMAND = "example"  # `hrm data example`

END = "end"
NO_EDGE, EDGE = ".", ">"
EDGE_SHARE = 0.4
VALUES = ("black", "green", "red", "white")
TYPES = ("audio", "chart", "image", "query", "table", "text")
TOPICS = ("art", "food", "law", "music")
REASONS = ("both", "type", "topic", "neither")  # why a candidate stands where it does, best first
MATCH_SHARE = 0.5  # of the candidates, of each field; so that every reason is as frequent
SUBJECTS = ("anna", "ben", "carla")
ATTRIBUTES = {  # and the values of each
    "city": ("lima", "oslo", "rome"),
    "job": ("baker", "doctor", "pilot"),
}
ABOUT_SHARE = 0.8  # of a memory's entries, of the subject and of the attribute: about two thirds match in both
SUPPORTS, CONTRADICTS, UNRELATED = "supports", "contradicts", "unrelated"

Symbols = list[int | str | None]  # None in an output is not learned
Steps = Sequence[tuple[int, int]]  # from a place to another one

# So many random questions in a row that are not new, and the generator gives up.
PATIENCE = 10_000


def first_shortest_route(steps: Steps, start: int, goal: int) -> list[int] | None:
    """Numbers of the fewest steps that lead from start to goal, the first such list in dictionary order; None: none."""
    left = {goal: 0}  # fewest steps from a place to the goal
    while start not in left:
        reached = {origin: max(left.values()) + 1 for origin, end in steps if end in left and origin not in left}
        if not reached:
            return None
        left |= reached
    route, place = [], start
    while place != goal:
        step = next(i for i, (origin, end) in enumerate(steps) if origin == place and left.get(end) == left[place] - 1)
        route.append(step)
        place = steps[step][1]
    return route


def random_dag(nodes: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Edges `[nodes, nodes]`, bool: random ones that point forward in a random order of the nodes."""
    rank: NDArray[np.int64] = rng.permutation(nodes)
    edges: NDArray[np.bool_] = (rank[:, None] < rank) & (rng.random((nodes, nodes)) < EDGE_SHARE)
    return edges


def dag_path(nodes: int, rng: np.random.Generator) -> tuple[Symbols, Symbols] | None:
    edges = random_dag(nodes, rng)
    start, goal = map(int, rng.choice(nodes, 2, replace=False))
    steps = [(int(origin), int(end)) for origin, end in np.argwhere(edges)]  # ordered by their ends, as paths are
    route = first_shortest_route(steps, start, goal)
    if route is None:
        return None
    path = [start, *(steps[step][1] for step in route)]
    return [start, goal, *np.where(edges, EDGE, NO_EDGE).ravel().tolist()], filled(path, nodes)


def recall(pairs: int, rng: np.random.Generator) -> tuple[Symbols, Symbols]:
    names = [f"x{number}" for number in rng.choice(2 * pairs, pairs, replace=False)]
    values = rng.choice(VALUES, pairs).tolist()
    shown = [symbol for pair in zip(names, values, strict=True) for symbol in pair]
    order = rng.permutation(pairs)
    return [*shown, *(names[i] for i in order)], [*[None] * len(shown), *(values[i] for i in order)]


def topological_order(nodes: int, rng: np.random.Generator) -> tuple[Symbols, Symbols]:
    edges = random_dag(nodes, rng)
    order: list[int] = []
    while len(order) < nodes:
        left = [node for node in range(nodes) if node not in order]
        order.append(next(node for node in left if not edges[left, node].any()))
    return np.where(edges, EDGE, NO_EDGE).ravel().tolist(), [*order]


def tool_routing(tools: int, rng: np.random.Generator) -> tuple[Symbols, Symbols] | None:
    (have, want), *steps = [tuple(rng.choice(len(TYPES), 2, replace=False).tolist()) for _ in range(1 + tools)]
    route = first_shortest_route(steps, have, want)
    if route is None:
        return None
    return [TYPES[kind] for kind in (have, want, *(kind for step in steps for kind in step))], filled(route, tools)


def reranking(candidates: int, rng: np.random.Generator) -> tuple[Symbols, Symbols]:
    query = [str(rng.choice(TYPES)), str(rng.choice(TOPICS))]
    given = [
        (same_or_other(query[0], TYPES, MATCH_SHARE, rng), same_or_other(query[1], TOPICS, MATCH_SHARE, rng))
        for _ in range(candidates)
    ]
    # both, type alone, topic alone, neither: numbers 0 to 3
    ranks = [2 * (kind != query[0]) + (topic != query[1]) for kind, topic in given]
    order = sorted(range(candidates), key=lambda number: ranks[number])  # stable
    answer: Symbols = []
    for number in order:
        answer += [number, REASONS[ranks[number]]]
    return [*query, *(symbol for candidate in given for symbol in candidate)], answer


def retrieval_critique(entries: int, rng: np.random.Generator) -> tuple[Symbols, Symbols]:
    subject, attribute = str(rng.choice(SUBJECTS)), str(rng.choice([*ATTRIBUTES]))
    value = str(rng.choice(ATTRIBUTES[attribute]))
    question: Symbols = [subject, attribute, value]
    labels: Symbols = []
    for _ in range(entries):
        of_whom = same_or_other(subject, SUBJECTS, ABOUT_SHARE, rng)
        of_what = same_or_other(attribute, [*ATTRIBUTES], ABOUT_SHARE, rng)
        told = same_or_other(value, ATTRIBUTES[of_what], 0.5, rng)
        question += [of_whom, of_what, told]
        if (of_whom, of_what) != (subject, attribute):
            labels.append(UNRELATED)
        else:
            labels.append(SUPPORTS if told == value else CONTRADICTS)
    return question, labels


def same_or_other(symbol: str, symbols: Sequence[str], share: float, rng: np.random.Generator) -> str:
    """The symbol, with probability `share` if it is one of the symbols, or another one of these."""
    others = [other for other in symbols if other != symbol]
    return symbol if symbol in symbols and rng.random() < share else str(rng.choice(others))


def filled(answer: Sequence[int], length: int) -> Symbols:
    return [*answer, *[END] * (length - len(answer))]


TASKS: dict[str, Callable[[int, np.random.Generator], tuple[Symbols, Symbols] | None]] = {
    "dag_path": dag_path,
    "recall": recall,
    "reranking": reranking,
    "retrieval_critique": retrieval_critique,
    "topological_order": topological_order,
    "tool_routing": tool_routing,
}


def write_examples(path: Path, task: str, size: int, count: int, rng: np.random.Generator) -> None:
    """Writes `count` lines with different questions.

    Raises:
        UserError: if random search finds no more, or the file cannot be written.
    """
    lines: dict[tuple[int | str | None, ...], str] = {}
    barren = 0
    while len(lines) < count:
        example = TASKS[task](size, rng)
        known = len(lines)
        if example is not None:
            lines[tuple(example[0])] = json.dumps({"input": example[0], "output": example[1]})
        barren = 0 if len(lines) > known else barren + 1
        if barren == PATIENCE:
            raise UserError(
                f"--count {count} is more than the {known} questions of {task} with --size {size} found by random "
                "search; ask for fewer or for larger ones."
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines.values()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}); give another file.") from error


def write(arguments: argparse.Namespace) -> str:
    """Write the examples that the command line asks for and return a one-line summary."""
    check_at_least(arguments, {"count": 1, "size": 2, "seed": 0})
    rng = np.random.default_rng(arguments.seed)
    write_examples(arguments.output, arguments.task, arguments.size, arguments.count, rng)
    return f"{arguments.output}: {arguments.count:,} examples of {arguments.task} with --size {arguments.size}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--count", type=int, default=5000, help="examples (%(default)s)")
    parser.add_argument("--size", type=int, default=6, help="nodes, tools, pairs, candidates, entries (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of every random choice (%(default)s)")
    return run_command(write, lambda: parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
