"""Models as functions of tensors: the parts compute what the model does, whole and apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hrm.errors import UserError
from hrm.evaluation.latent import by_definition
from hrm.export import gate
from hrm.export.format import Run
from hrm.export.graphs import Graph, module_graphs, schedule, traced, whole_graphs
from hrm.export.puzzles import Puzzles
from hrm.inference.model import TrainedModel
from tests.helpers.exporting import ACT_STEPS, ARCHITECTURES, answers_of, boards, loaded, run_folder


def eager(graph: Graph, model: TrainedModel) -> Run:
    """The graph as PyTorch computes it, with its inputs' and outputs' shapes and types checked."""

    @torch.no_grad()
    def run(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        given = [torch.from_numpy(values[each.name]) for each in graph.inputs]
        with by_definition(model.model):
            found = graph.module(*given)
        for tensors, specified in ((given, graph.inputs), (found, graph.outputs)):
            for tensor, each in zip(tensors, specified, strict=True):
                assert (tensor.dtype, tuple(tensor.shape[1:])) == (each.dtype, each.shape), each.name
        return {each.name: value.numpy() for each, value in zip(graph.outputs, found, strict=True)}

    return run


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_compute_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES[name]))
    graphs = list(whole_graphs(model, ACT_STEPS, solve=True))
    if model.model.model.inner.levels:
        graphs += module_graphs(model)
    inputs = boards(5)
    puzzles = Puzzles(inputs, answers_of(model, inputs), np.zeros(5, dtype=np.int64), "random tokens")
    runs = {graph.name: eager(graph, model) for graph in graphs}
    found = gate.compare(model, runs, ACT_STEPS, puzzles, batch_size=3)  # batches of 3, 2 and, alone, 1
    assert list(found.solved) == (["solve"] if name == "transformer" else ["solve", "modules"])
    for way in found.solved.values():
        assert (way.accuracy, way.same_answers) == (1.0, 1.0)
        assert way.logits_difference < 1e-3
    for apart in found.first_steps.values():
        assert apart.logits < 1e-4
        assert apart.states < 1e-4


def test_modules_of_hrm_hold_each_weight_once(tmp_path: Path) -> None:
    """What is traced of a part has no weight of another one, and its inputs are those of its update."""
    model = loaded(run_folder(tmp_path, ARCHITECTURES["hrm"]))
    graphs = {graph.name: graph for graph in module_graphs(model)}
    assert list(graphs) == ["embed", "L", "H", "heads"]
    assert [each.name for each in graphs["L"].inputs] == ["z_L", "z_H", "embeddings"]
    assert [each.name for each in graphs["H"].inputs] == ["z_H", "z_L"]
    assert [level.graph for level in schedule(model)] == ["L", "L", "H"]
    weights = [name.rpartition("inner.")[2] for graph in graphs.values() for name in traced(graph, model).state_dict]
    (step,) = whole_graphs(model, ACT_STEPS, solve=False)
    assert sorted(weights) == sorted(name.rpartition("inner.")[2] for name in traced(step, model).state_dict)


def test_without_a_solve_the_steps_are_taken_one_by_one(tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES["trm-mixer"]))
    (step,) = whole_graphs(model, ACT_STEPS, solve=False)
    inputs = boards(4)
    puzzles = Puzzles(inputs, answers_of(model, inputs), np.zeros(4, dtype=np.int64), "random tokens")
    found = gate.compare(model, {"step": eager(step, model)}, ACT_STEPS, puzzles, batch_size=4)
    assert list(found.solved) == ["step"]
    assert found.solved["step"].accuracy == 1.0


def test_a_model_without_levels_has_no_modules(tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES["transformer"]))
    with pytest.raises(
        UserError, match=r"step_7 cannot be exported apart: transformer has no levels; give parts=whole"
    ):
        list(module_graphs(model))


def test_files_that_give_no_numbers_fail_the_gate(tmp_path: Path) -> None:
    model = loaded(run_folder(tmp_path, ARCHITECTURES["trm-mixer"]))
    graphs = whole_graphs(model, ACT_STEPS, solve=True)
    runs = {graph.name: eager(graph, model) for graph in graphs}
    solve, inputs = runs["solve"], boards(4)
    runs["solve"] = lambda values: {name: array * np.float32(np.nan) for name, array in solve(values).items()}
    puzzles = Puzzles(inputs, answers_of(model, inputs), np.zeros(4, dtype=np.int64), "random tokens")
    found = gate.compare(model, runs, ACT_STEPS, puzzles, batch_size=4)
    assert not found.passes(0.5)
    assert found.solved["solve"].logits_difference > 1e38
    assert found.first_steps["step"].logits < 1e-4
