"""What is read off a model's inside: states of every step, changes, projections, who reads whom; and its pictures."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hrm
from hrm.batch import Batch
from hrm.errors import UserError
from hrm.evaluation.latent import (
    Walk,
    act_steps,
    by_definition,
    changes,
    initial_states,
    last_changes,
    nearby_states,
    pca,
    states_after,
    token_mixing,
    update_changes,
    updates,
    walk,
)
from hrm.evaluation.report.inside import Insight
from hrm.evaluation.report.latent import (
    draw_changes,
    draw_last_changes,
    draw_mixing,
    draw_paths,
    draw_reading,
    draw_starts,
    draw_update_changes,
)
from hrm.evaluation.report.recorder import Recorder
from hrm.evaluation.runner import record_act_steps
from hrm.inference.model import TrainedModel
from hrm.kernels import naive
from hrm.models import ACTLossHead
from hrm.tasks import all_tasks
from hrm.tasks.base import PuzzleSize, View
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import tiny
from tests.helpers.recordings import ARC_VIEW, maze_view

SIZE = PuzzleSize(16, 6)
ARCHITECTURES = {
    "hrm": {"name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1", "H_layers": 1, "L_layers": 2, "H_cycles": 2},
    "trm": {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "L_layers": 1,
        "H_cycles": 2,
        "L_cycles": 3,
        "mlp_t": True,
        "pos_encodings": "learned",
        "puzzle_emb_len": 2,
    },
    "transformer": {"name": "transformer", "num_layers": 2},
}


@pytest.fixture(params=ARCHITECTURES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(kind: str) -> ACTLossHead:
    arch = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 5, "forward_dtype": "float32", **ARCHITECTURES[kind]}
    built = hrm.build_model(arch, batch_size=3, seq_len=16, vocab_size=6, num_puzzle_identifiers=1, kernels="naive")
    return built.eval()


@pytest.fixture
def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(1, 6, (3, 16))
    return {"inputs": torch.from_numpy(tokens).int(), "puzzle_identifiers": torch.zeros(3, dtype=torch.int32)}


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_walk_is_what_the_model_goes_through(model: ACTLossHead, batch: Batch) -> None:
    walked = walk(model, batch, 4)
    inner, prefix_len = model.model.inner, model.model.inner.prefix_len
    assert walked.states.keys() == inner.initial_states.keys()
    for name, vector in inner.initial_states.items():
        states = walked.states[name]
        assert states.shape == (3, 5, prefix_len + 16, 16)
        assert (states[:, 0] == vector.numpy()).all()
        assert len({states[:, step].tobytes() for step in range(5)}) == 5, "each step changes them"
    with torch.no_grad():  # what is read off a state is what the model answers
        for step in range(4):
            states = {name: torch.from_numpy(each[:, step + 1]) for name, each in walked.states.items()}
            assert (inner.logits(states).argmax(-1).numpy() == walked.answers[:, step]).all()
            assert torch.sigmoid(inner.q_values(states)[0]).numpy() == pytest.approx(walked.q_halt[:, step])
        there = states_after(model, batch, 3)
    assert all(np.array_equal(there[name].numpy(), states[:, 3]) for name, states in walked.states.items())
    stepped: list[int] = []
    assert walk(model, batch, 2, keep=[], stepped=lambda: stepped.append(len(stepped))).states == {}
    assert stepped == [0, 1]


def test_a_walk_can_begin_anywhere(model: ACTLossHead, batch: Batch) -> None:
    whole = walk(model, batch, 4)
    middle = {name: torch.from_numpy(states[:, 2]) for name, states in whole.states.items()}
    rest = walk(model, batch, 2, middle)
    assert all(np.array_equal(states[:, 2:], rest.states[name]) for name, states in whole.states.items())
    assert np.array_equal(whole.answers[:, 2:], rest.answers)
    one, same, other = (nearby_states(model, batch, seed, 0.25) for seed in (0, 0, 1))
    own = initial_states(model, batch)
    for name, state in own.items():
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
        assert (one[name] - state).std().item() == pytest.approx(0.25, rel=0.1)


def test_by_definition_whatever_the_kernels(model: ACTLossHead, batch: Batch) -> None:
    inner = model.model.inner
    own, expected = inner.kernels, walk(model, batch, 2)
    with by_definition(model):
        assert inner.kernels.module is naive.reasoning_module
        found = walk(model, batch, 2)
    assert inner.kernels is own
    for name, states in expected.states.items():
        assert found.states[name] == pytest.approx(states, abs=1e-5)


def test_changes_and_what_settles() -> None:
    states = np.zeros((1, 4, 2, 2), dtype=np.float32)
    states[0, 1] = 3
    states[0, 2:, 0, 0] = 7
    assert changes(states)[0].tolist() == pytest.approx([3, np.sqrt((16 + 9 * 3) / 4), 0])
    answers = np.array([[[1, 1, 1], [1, 2, 1], [1, 1, 2], [1, 1, 2]], [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 2]]])
    assert last_changes(answers).tolist() == [[1, 3, 3], [1, 1, 4]]
    assert last_changes(answers.astype(np.uint8)[:, :1]).tolist() == [[1, 1, 1]] * 2
    assert Walk({}, answers, np.zeros((2, 4))).settled().tolist() == [True, False]


def test_pca_finds_the_plane_that_points_lie_on() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(4, 6, 2)) * [5, 2]
    directions = np.linalg.qr(rng.normal(size=(30, 2)))[0].T
    points, shares = pca((flat @ directions + 100).astype(np.float32))
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert shares[0] > shares[1] > 0.01
    distances = [np.linalg.norm(each.reshape(-1, 1, 2) - each.reshape(1, -1, 2), axis=-1) for each in (flat, points)]
    assert distances[0] == pytest.approx(distances[1], abs=1e-2)
    standing = pca(np.ones((2, 3, 4), dtype=np.float32))
    assert (standing.points == 0).all()
    assert standing.shares == (0, 0)


# --- within a step ----------------------------------------------------------------------------------------------------


def test_updates_are_those_of_an_act_step(model: ACTLossHead, batch: Batch, kind: str) -> None:
    walked = walk(model, batch, 2)
    start = {name: torch.from_numpy(states[:, 1]) for name, states in walked.states.items()}
    steps = list(updates(model, batch, start))
    schedule = list(model.model.inner.config.schedule())
    assert [(step.state, step.module) for step in steps] == [(update.state, update.module) for update in schedule]
    for name, states in walked.states.items():
        last = [step for step in steps if step.state == name][-1]
        assert last.after.numpy() == pytest.approx(states[:, 2], abs=1e-6)
    changed = update_changes(model, batch, walked.states)
    for name in walked.states:
        of_state = [step for step in steps if step.state == name]
        assert changed[name].shape == (3, 2, len(of_state))
        for number, step in enumerate(of_state):
            expected = (step.after - step.before).square().mean((1, 2)).sqrt()
            assert changed[name][:, 1, number] == pytest.approx(expected.numpy())


def test_attention_gives_the_weights_that_mix_the_values(batch: Batch) -> None:
    built = hrm.build_model(
        {"hidden_size": 16, "num_heads": 2, "forward_dtype": "float32", **ARCHITECTURES["hrm"]},
        batch_size=1,
        seq_len=16,
        vocab_size=6,
        num_puzzle_identifiers=1,
    ).eval()
    one = {name: field[:1] for name, field in batch.items()}
    start = initial_states(built, one)
    mixing = token_mixing(built, one, start)
    assert [(part.module, part.block, part.kind) for part in mixing] == [
        *(("L_level", number, "attention") for number in range(2)),
        ("H_level", 0, "attention"),
    ]
    assert all(part.maps.shape == (2, 17, 17) for part in mixing)
    for part in mixing:
        assert part.maps.sum(-1) == pytest.approx(np.ones((2, 17)), abs=1e-5)
    # The first block of L in its last update: its own attention, from the projections by hand.
    last = [step for step in updates(built, one, start) if step.module == "L_level"][-1]
    inner = built.model.inner
    with torch.no_grad():
        block, context = inner.prepare(one).blocks["L_level"][0], inner.prepare(one).context
        x = last.before + last.injection
        qkv = F.linear(x, block.qkv)
        _, _, values = naive.split_heads(qkv, context.rotary, context.num_heads)
        mixed = torch.from_numpy(mixing[0].maps) @ values[0]
        expected = naive.sdpa(qkv, context.rotary, context.num_heads)[0]
    assert mixed.transpose(0, 1).flatten(1).numpy() == pytest.approx(expected.numpy(), abs=1e-5)


def test_an_mlp_over_tokens_is_measured_by_its_derivatives(batch: Batch) -> None:
    arch = {"hidden_size": 16, "num_heads": 2, "forward_dtype": "float32", **ARCHITECTURES["trm"]}
    built = hrm.build_model(arch, batch_size=1, seq_len=16, vocab_size=6, num_puzzle_identifiers=1).eval()
    one = {name: field[:1] for name, field in batch.items()}
    start = initial_states(built, one)
    (mixing,) = token_mixing(built, one, start)
    assert (mixing.kind, mixing.maps.shape) == ("sensitivity", (1, 18, 18))
    *_, last = updates(built, one, start)
    prepared = built.model.inner.prepare(one)
    (block,) = prepared.blocks["L_level"]
    jacobian = torch.autograd.functional.jacobian(
        lambda x: naive.mix_tokens(x, block, prepared.context.eps), last.before + last.injection
    )[0, :, :, 0]
    own_feature = torch.diagonal(jacobian, dim1=1, dim2=3)  # [read by, read, feature]
    expected = own_feature.square().mean(-1).sqrt().detach().numpy()
    assert mixing.maps[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)


# --- from Python ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """An untrained model of 4x4 boards, whose sequences halt at different steps."""
    found = tiny(tmp_path_factory.mktemp("small"), PuzzleForm("sudoku", 16, 6))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 6, (3, 16))).int()
    given = {"inputs": tokens, "puzzle_identifiers": torch.zeros(3, dtype=torch.int32)}
    with torch.no_grad():
        _, outputs = next(act_steps(found.model, given))
        found.model.model.inner.q_head.bias[1] += (outputs["q_halt_logits"] - outputs["q_continue_logits"]).median()
    return found


def test_predict_gives_latents(small: TrainedModel, batch: Batch) -> None:
    tokens = batch["inputs"].numpy()
    whole = walk(small.model, batch, 3)
    out = small.predict(tokens, tokens=True, latents=True, halt=False)
    assert out.latents is not None
    assert out.trajectory is not None
    assert out.q_halts is not None
    assert out.latents.keys() == {"z_H", "z_L"}
    assert small.prefix_len == 1
    for name, states in whole.states.items():
        assert out.latents[name] == pytest.approx(states, abs=1e-6)
    assert (out.trajectory == whole.answers).all()
    assert out.q_halts == pytest.approx(whole.q_halt)
    plain = small.predict(tokens, tokens=True, halt=False)
    assert plain.latents is plain.q_halts is plain.trajectory is None
    assert (plain.answers == out.answers).all()

    halting = small.predict(tokens, tokens=True, latents=True, batch_size=2)
    assert halting.latents is not None
    assert halting.q_halts is not None
    assert len(set(halting.steps.tolist())) > 1, "the weights give both cases"
    for row, step in enumerate(halting.steps.tolist()):
        for at in range(4):
            expected = whole.states["z_H"][row, min(at, step)]
            assert halting.latents["z_H"][row, at] == pytest.approx(expected, abs=1e-6), "still, once it has halted"
        assert halting.q_halts[row, -1] == pytest.approx(whole.q_halt[row, step - 1])

    none = small.predict([], latents=True)
    assert none.latents is not None
    assert none.latents["z_L"].shape == (0, 4, 17, 16)
    chunks = list(small.predict(({"tokens": row} for row in tokens), stream=True, latents=True))
    assert sum(len(chunk.latents["z_H"]) for chunk in chunks if chunk.latents) == 3
    with pytest.raises(UserError, match="latents=True cannot be combined with augmentations"):
        small.predict(tokens, tokens=True, latents=True, augmentations=2)


def test_token_mixing_of_a_puzzle(small: TrainedModel, batch: Batch) -> None:
    tokens = batch["inputs"].numpy()[:1]
    one = {name: field[:1] for name, field in batch.items()}
    found = small.token_mixing(tokens, tokens=True, step=3)
    expected = token_mixing(small.model, one, states_after(small.model, one, 2))
    assert [part.module for part in found] == ["L_level", "H_level"]
    for part, other in zip(found, expected, strict=True):
        assert np.array_equal(part.maps, other.maps)
    halted = small.token_mixing(tokens, tokens=True)
    step = int(small.predict(tokens, tokens=True).steps[0])
    again = small.token_mixing(tokens, tokens=True, step=step)
    assert np.array_equal(halted[0].maps, again[0].maps)
    with pytest.raises(UserError, match="takes one puzzle, and is given 2"):
        small.token_mixing(np.concatenate([tokens, tokens]), tokens=True)
    with pytest.raises(UserError, match="step=0"):
        small.token_mixing(tokens, tokens=True, step=0)


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawn(figure: Any) -> str:
    """All that is written in a figure, of which no legend may cover a panel."""
    figure.canvas.draw()
    for legend in figure.legends:
        extent = legend.get_window_extent()
        assert not any(extent.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    texts = [figure._suptitle, figure._supxlabel, figure._supylabel]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    return "\n".join(text.get_text() for text in texts if text is not None)


@pytest.mark.parametrize("kind", ["hrm", "trm"], indirect=True)
def test_pictures(model: ACTLossHead, batch: Batch, kind: str) -> None:
    pytest.importorskip("matplotlib")
    walked = walk(model, batch, 5)
    names, right = ["7", "8", "9"], np.array([True, False, True])
    figure = draw_paths(walked.states, right, names)
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    text = drawn(figure)
    for words in ("principal component 1 (", "% of the variance)", "right at the end", "wrong at the end", *names):
        assert words in text
    assert all(f"{name} after each ACT step" in text for name in walked.states)
    assert "wrong at the end" not in drawn(draw_paths(walked.states, np.ones(3, dtype=bool), names))
    assert "ACT step" in drawn(draw_changes(walked.states, right))
    assert "updates a step" in drawn(draw_update_changes(update_changes(model, batch, walked.states)))
    view, last = all_tasks()["sudoku"].view(SIZE), last_changes(walked.answers)
    text = drawn(draw_last_changes(view, batch["inputs"].numpy(), walked.answers, right, names))
    assert "puzzle 8, wrong" in text
    open_cells = batch["inputs"].numpy() > 1  # those of an input are dots
    numbers = sorted(last[~open_cells].tolist())
    assert sorted(int(line) for line in text.split("\n") if line.isdigit()) == numbers
    one = {name: field[:1] for name, field in batch.items()}
    mixing = token_mixing(model, one, initial_states(model, one))
    prefix_len = model.model.inner.prefix_len
    text = drawn(draw_mixing(mixing, prefix_len))
    assert ("head 2" in text) is (kind != "trm")
    assert ("derivative" in text) is (kind == "trm")
    assert "row 2, column 3" in drawn(draw_reading(mixing, prefix_len, view, 6))
    state = next(iter(walked.states))
    text = drawn(draw_starts({"5": walked.states[state]}, {"5": right}, state))
    assert f"puzzle 5: {state} from 3 starts" in text
    assert "own start" in text


def test_pictures_of_large_grids_and_of_lists() -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 12, (1, 900))
    answers = np.repeat(tokens[:, None], 3, 1)
    text = drawn(draw_last_changes(ARC_VIEW, tokens, answers, np.ones(1, dtype=bool), ["0"]))
    assert "ACT step that changed the cell last" in text
    drawn(
        draw_last_changes(
            maze_view(5), rng.integers(1, 6, (2, 25)), rng.integers(1, 6, (2, 3, 25)), np.ones(2, bool), ["0", "1"]
        )
    )
    listed = View(("", "a", "b"))
    drawn(draw_last_changes(listed, rng.integers(1, 3, (1, 7)), rng.integers(1, 3, (1, 3, 7)), np.ones(1, bool), ["0"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hrm", "transformer"], indirect=True)
def test_the_section_of_a_report(model: ACTLossHead, batch: Batch, kind: str) -> None:
    pytest.importorskip("matplotlib")
    labelled = batch | {"labels": torch.randint(2, 6, (3, 16), generator=torch.Generator().manual_seed(0))}
    labelled["labels"][0] = torch.from_numpy(walk(model, batch, 5).answers[0, -1])
    _, _, steps = record_act_steps(model, labelled)
    recorder = Recorder(4)
    recorder.add(labelled, steps, np.arange(3))
    task = all_tasks()["sudoku"]
    content = Insight(model, recorder.recording().shown, task, SIZE, task.view(SIZE)).content()
    titles = [picture["title"] for picture in content["pictures"]]
    assert ("Within the steps" in titles) is (kind != "transformer")
    assert {"Where the states go", "Which cells change when", "What one cell reads", "From other starts"} <= set(titles)
    assert len({picture["png"] for picture in content["pictures"]}) == len(titles)
    fates = {fate["name"]: fate for fate in content["fates"]}
    assert list(fates)[-1] == "0", "those answered wrong come first"
    assert {name: fate["right"] for name, fate in fates.items()} == {"0": True, "1": False, "2": False}
    assert all(fate["starts"][1] == fate["symmetric"][1] == 4 for fate in fates.values())
    assert fates["1"]["starts"][0] == fates["1"]["symmetric"][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hrm"], indirect=True)
def test_of_long_puzzles_a_cpu_looks_into_one(
    model: ACTLossHead, batch: Batch, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("hrm.evaluation.report.inside._MOST_TOKENS_ON_CPU", 2 * 16 - 1)
    labelled = batch | {"labels": batch["inputs"]}
    _, _, steps = record_act_steps(model, labelled)
    recorder = Recorder(4)
    recorder.add(labelled, steps, np.arange(3))
    task = all_tasks()["sudoku"]
    assert len(Insight(model, recorder.recording().shown, task, SIZE, task.view(SIZE)).content()["fates"]) == 1


def test_a_step_that_is_more_than_updates_is_not_taken_apart(batch: Batch) -> None:
    pytest.importorskip("matplotlib")
    arch = {"name": "transformer", "num_layers": 1, "segment_len": 8, "halt_max_steps": 2, "hidden_size": 16}
    built = hrm.build_model(
        arch | {"num_heads": 2, "forward_dtype": "float32"},
        batch_size=3,
        seq_len=16,
        vocab_size=6,
        num_puzzle_identifiers=1,
    ).eval()
    with pytest.raises(UserError, match="more than updates of its states"):
        token_mixing(built, batch, initial_states(built, batch))
    labelled = batch | {"labels": batch["inputs"]}
    _, _, steps = record_act_steps(built, labelled)
    recorder = Recorder(1)
    recorder.add(labelled, steps, np.arange(3))
    task = all_tasks()["sudoku"]
    content = Insight(built, recorder.recording().shown, task, SIZE, task.view(SIZE)).content()
    assert [picture["title"] for picture in content["pictures"]] == [
        "Where the states go",
        "Do they come to rest?",
        "Which cells change when",
        "From other starts",
    ]


def test_a_model_that_diverged_has_no_section(batch: Batch) -> None:
    arch = {"hidden_size": 16, "num_heads": 2, "halt_max_steps": 2, "forward_dtype": "float32", "name": "transformer"}
    built = hrm.build_model(arch, batch_size=3, seq_len=16, vocab_size=6, num_puzzle_identifiers=1).eval()
    with torch.no_grad():
        built.model.inner.embed_tokens.embedding_weight.fill_(torch.nan)
    labelled = batch | {"labels": batch["inputs"]}
    _, _, steps = record_act_steps(built, labelled)
    recorder = Recorder(4)
    recorder.add(labelled, steps, np.arange(3))
    task = all_tasks()["sudoku"]
    content = Insight(built, recorder.recording().shown, task, SIZE, task.view(SIZE)).content()
    assert content == {"pictures": [], "fates": []}
