"""Weights stored as int8: a round trip through a file, what is read without asking for int8, and damaged files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hrm
from hrm.checkpoint.weights import PUZZLE_TABLE, pretrained, read_weights
from hrm.errors import UserError
from hrm.evaluation.latent import by_definition
from hrm.inference.model import TrainedModel
from hrm.kernels import int8
from hrm.tasks.form import PuzzleForm
from tests.helpers.inference import untrained

FORM = PuzzleForm("tokens", 6, 5, 3, symbols=("a", "b", "c", "d"), identifiers=("<blank>", "one", "two"))
PUZZLES = [{"input": list(text), "puzzle": name} for text in ("abcdab", "dddddd", "cabdca") for name in ("one", "two")]
QKV = "model.inner.H_level.layers.0.self_attn.qkv_proj.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run"), FORM, hidden_size=32)


@pytest.fixture(scope="module")
def saved(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    hrm.from_pretrained(run, device="cpu", quantize="int8").save_pretrained(folder)
    return folder


def test_a_model_in_int8_comes_back(run: Path, saved: Path) -> None:
    before, after = (hrm.from_pretrained(folder, device="cpu", quantize="int8") for folder in (run, saved))
    in_file = load_file(saved / "model.safetensors")
    of_blocks = [name for name in in_file if name.endswith("proj.weight")]
    assert len(of_blocks) == 8
    assert all(in_file[name].dtype == torch.int8 for name in (*of_blocks, PUZZLE_TABLE))
    assert in_file["model.inner.lm_head.weight"].dtype == torch.float32
    size, float_size = (
        (folder / name).stat().st_size for folder, name in ((saved, "model.safetensors"), (run, "step_7"))
    )
    assert size < 0.3 * float_size
    for name, weight in before.model.state_dict().items():
        if name == PUZZLE_TABLE:  # which int8 does not compute with
            assert (weight - after.model.state_dict()[name]).abs().max() <= weight.abs().max() / 254
            before.model.model.inner.puzzle_emb.weights.copy_(after.model.state_dict()[name])
    ours, theirs = before.predict(PUZZLES), after.predict(PUZZLES)
    assert (ours.answers == theirs.answers).all()
    assert abs(ours.q_halt - theirs.q_halt).max() < 1e-5
    assert len({tuple(answer) for answer in ours.answers.tolist()}) > 2


def test_it_is_read_without_int8_too(run: Path, saved: Path) -> None:
    """Everything that reads weights gets the numbers that the file stands for, in float32."""
    plain, stored = read_weights(run / "step_7"), load_file(saved / "model.safetensors")
    read = read_weights(saved / "model.safetensors")
    assert read.keys() == plain.keys()
    assert all(weight.dtype == torch.float32 for name, weight in read.items() if name in stored)
    assert torch.equal(read[QKV], stored[QKV].float() * stored[f"{QKV}_scale"][:, None])
    assert (read[QKV] - plain[QKV]).abs().max() <= plain[QKV].abs().max() / 250
    model = hrm.from_pretrained(saved, device="cpu")
    assert model.model.kernels.int8 == "none"
    assert torch.equal(model.model.state_dict()[QKV], read[QKV])


def test_it_can_come_with_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hrm.checkpoint.weights.PRETRAINED", saved.parent)
    assert saved.name in pretrained()
    assert hrm.from_pretrained(saved.name, device="cpu").form == FORM


@pytest.mark.parametrize("what", ["missing", "too few", "a matrix of its own"])
def test_scales_that_do_not_fit(what: str, saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    scales = weights.pop(f"{QKV}_scale")
    if what != "missing":
        weights[f"{QKV}_scale"] = scales[1:] if what == "too few" else scales[:, None]
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    with pytest.raises(UserError, match=f"has {QKV} in int8, but not {QKV}_scale, a scale for each of its rows"):
        read_weights(file)


def test_weights_are_rounded_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While weights are at hand, though there are many ACT steps; afterwards they may have changed."""
    rounded: list[object] = []
    quantize_blocks = int8.quantize_blocks
    monkeypatch.setattr(int8, "quantize_blocks", lambda blocks: rounded.append(blocks) or quantize_blocks(blocks))
    model = hrm.from_pretrained(run, device="cpu", quantize="int8")

    def q_halts(model: TrainedModel) -> list[float]:
        rounded.clear()
        return model.predict(PUZZLES, halt=False).q_halt.tolist()

    first = q_halts(model)
    assert len(rounded) == 2  # H and L
    with torch.no_grad():
        model.model.get_parameter(QKV).mul_(2)
    assert q_halts(model) != first
    with by_definition(model.model):
        q_halts(model)
        assert not rounded
