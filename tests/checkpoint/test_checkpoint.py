"""Checkpoints: ours are laid out as the published ones, theirs load here, and a crash or a bad file does no harm."""

import dataclasses
import fnmatch
import itertools
import os
import random
import shutil
import string
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import huggingface_hub
import pytest
import torch
import yaml
from torch import Tensor

from hrm.batch import Batch
from hrm.checkpoint.run_folder import save_config
from hrm.checkpoint.weights import find_checkpoint, load_weights, read_weights, save_weights
from hrm.config import PretrainConfig
from hrm.errors import UserError
from hrm.models import ACTLossHead, arch_config, build_model

ARCH: dict[str, Any] = {
    "name": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
    "loss": {"name": "losses@ACTLossHead", "loss_type": "softmax_cross_entropy"},
    "halt_exploration_prob": 0.1,
    "halt_max_steps": 3,
    "H_cycles": 1,
    "L_cycles": 2,
    "H_layers": 1,
    "L_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "expansion": 4,
    "puzzle_emb_ndim": 16,
    "pos_encodings": "learned",
}
SIZES: dict[str, Any] = {"batch_size": 3, "seq_len": 5, "vocab_size": 7, "num_puzzle_identifiers": 4}

# all_config.yaml as the published code writes it: every field of its PretrainConfig, and nothing else.
PUBLISHED_CONFIG: dict[str, Any] = {
    "arch": ARCH,
    "data_path": "data/arc-aug-1000",
    "global_batch_size": 768,
    "epochs": 100000,
    "lr": 1e-4,
    "lr_min_ratio": 1.0,
    "lr_warmup_steps": 2000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "puzzle_emb_lr": 0.01,
    "puzzle_emb_weight_decay": 0.1,
    "project_name": "Arc-aug-1000 ACT-torch",
    "run_name": "HierarchicalReasoningModel_ACTV1 curious-otter",
    "checkpoint_path": "checkpoints/Arc-aug-1000 ACT-torch/HierarchicalReasoningModel_ACTV1 curious-otter",
    "seed": 0,
    "checkpoint_every_eval": True,
    "eval_interval": 10000,
    "eval_save_outputs": [],
}


@pytest.fixture
def model() -> ACTLossHead:
    """A model none of whose weights has the value it starts with."""
    model = build_model(ARCH, **SIZES, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture
def published(tmp_path: Path, model: ACTLossHead) -> Callable[[str], Path]:
    """Writes the folder of a published checkpoint of `model`, its weights in a file of the name given."""

    def write(weights_name: str) -> Path:
        folder = tmp_path / "published"
        folder.mkdir()
        (folder / "all_config.yaml").write_text(yaml.safe_dump(PUBLISHED_CONFIG))
        compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(compiled, folder / weights_name)
        return folder

    return write


def assert_same_answers(left: ACTLossHead, right: ACTLossHead, batch: Batch) -> None:
    wanted = ["logits", "q_halt_logits", "q_continue_logits"]
    outputs = [model(carry=model.initial_carry(batch), batch=batch, return_keys=wanted)[3] for model in (left, right)]
    for name in wanted:
        assert torch.equal(outputs[0][name], outputs[1][name]), name


# --- the published layout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights_name", "step"), [("checkpoint", 0), ("step_123", 123), ("step_7.pt", 7)])
@pytest.mark.parametrize("by", ["folder", "file"])
def test_published_folders_load(
    weights_name: str,
    step: int,
    by: str,
    published: Callable[[str], Path],
    model: ACTLossHead,
    random_batch: Callable[..., Batch],
) -> None:
    folder = published(weights_name)
    checkpoint = find_checkpoint(str(folder if by == "folder" else folder / weights_name))
    assert (checkpoint.weights_file, checkpoint.folder, checkpoint.step) == (folder / weights_name, folder, step)
    assert checkpoint.config == PUBLISHED_CONFIG

    other = build_model(arch_config(checkpoint.config["arch"]), **SIZES, seed=7).eval()
    load_weights(other, read_weights(checkpoint.weights_file), checkpoint.weights_file)
    assert_same_answers(model, other, random_batch(**SIZES))


def test_weights_without_the_prefix_load_too(tmp_path: Path, model: ACTLossHead) -> None:
    torch.save(model.state_dict(), tmp_path / "step_1")
    assert read_weights(tmp_path / "step_1").keys() == model.state_dict().keys()


def test_our_weights_have_the_published_names(tmp_path: Path, model: ACTLossHead) -> None:
    file = save_weights(model.state_dict(), tmp_path, "step_40")
    assert file == tmp_path / "step_40"
    assert {path.name for path in tmp_path.iterdir()} == {"step_40", "step_40.safetensors"}
    saved = torch.load(file, weights_only=True)
    layers = [("H", 0), ("L", 0), ("L", 1)]
    parts = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    names = ["H_init", "L_init", "embed_tokens.embedding_weight", "embed_pos.embedding_weight", "puzzle_emb.weights"]
    names += ["lm_head.weight", "q_head.weight", "q_head.bias"]
    names += [f"{level}_level.layers.{i}.{part}.weight" for (level, i), part in itertools.product(layers, parts)]
    assert saved.keys() == {f"_orig_mod.model.inner.{name}" for name in names}
    for name, tensor in model.state_dict().items():
        is_state = name.endswith(("H_init", "L_init"))  # kept in the compute dtype, as published
        assert saved[f"_orig_mod.{name}"].dtype == (torch.bfloat16 if is_state else torch.float32)
        assert torch.equal(saved[f"_orig_mod.{name}"], tensor), name


def test_saved_weights_come_back(tmp_path: Path, model: ACTLossHead, random_batch: Callable[..., Batch]) -> None:
    file = save_weights(model.state_dict(), tmp_path, "step_40")
    other = build_model(ARCH, **SIZES, seed=7).eval()
    load_weights(other, read_weights(file), file)
    assert_same_answers(model, other, random_batch(**SIZES))


def test_safetensors_hold_the_same_weights(tmp_path: Path, model: ACTLossHead) -> None:
    file = save_weights(model.state_dict(), tmp_path, "step_40")
    weights, beside = read_weights(file), read_weights(tmp_path / "step_40.safetensors")
    assert beside.keys() == model.state_dict().keys()
    assert all(torch.equal(beside[name], weights[name]) for name in weights)


def test_our_config_has_what_the_published_code_requires(tmp_path: Path) -> None:
    config = PretrainConfig(
        **(PUBLISHED_CONFIG | {"arch": arch_config(ARCH), "eval_save_outputs": ["logits"], "run_name": "süß: it's #1"})
    )
    save_config(config, tmp_path / "new" / "run")
    saved = yaml.safe_load((tmp_path / "new" / "run" / "all_config.yaml").read_text(encoding="utf-8"))
    expected = PUBLISHED_CONFIG | {"eval_save_outputs": ["logits"], "run_name": "süß: it's #1"}
    for name, value in expected.items():
        if name != "arch":
            assert (name, type(saved[name]), saved[name]) == (name, type(value), value)
    arch = saved["arch"]
    assert {name: arch[name] for name in ARCH} == ARCH  # and no more in loss, all of which goes to the loss's function
    left_out = {"expansion": 4.0, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "forward_dtype": "bfloat16"}
    assert {name: arch[name] for name in left_out} == left_out
    # Further fields are left alone, but for those that the published evaluate.py passes to the model itself.
    assert not arch.keys() & {"batch_size", "seq_len", "vocab_size", "num_puzzle_identifiers", "causal"}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"q_weight": 0.25}])
def test_our_config_comes_back(options: dict[str, float], tmp_path: Path, model: ACTLossHead) -> None:
    config = PretrainConfig(arch=arch_config(ARCH | {"loss": ARCH["loss"] | options}), data_path="data/pack")
    save_config(config, tmp_path)
    save_weights(model.state_dict(), tmp_path, "step_1")
    loaded = find_checkpoint(str(tmp_path)).config
    assert loaded["arch"].pop("loss") == ARCH["loss"] | options
    expected = dataclasses.asdict(config)
    del expected["arch"]["loss"]
    assert loaded == expected
    assert arch_config(find_checkpoint(str(tmp_path)).config["arch"]) == config.arch


# --- finding weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder whose weights a test adds."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_config.yaml").write_text(yaml.safe_dump(PUBLISHED_CONFIG))
    return folder


@pytest.mark.parametrize(
    ("names", "found", "step"),
    [
        (["step_9", "step_10"], "step_10", 10),
        (["step_100", "step_99", "step_0"], "step_100", 100),
        (["step_5", "step_30_all_preds.0"], "step_5", 5),
        (["step_5", "step_30.bak", "xstep_40", "step_", "step_-50", "step_6e1"], "step_5", 5),
        (["step_5", ".step_9.tmp"], "step_5", 5),
        (["step_5", "step_5.safetensors"], "step_5", 5),
        (["step_5", "step_10.safetensors"], "step_10.safetensors", 10),
        (["step_5", "step_9_ema", "step_9_ema.safetensors", "step_9.safetensors.tmp"], "step_5", 5),
        (["checkpoint"], "checkpoint", 0),
        (["checkpoint", "metrics.jsonl", ".checkpoint.tmp"], "checkpoint", 0),
    ],
)
def test_a_folder_stands_for_its_last_step(names: list[str], found: str, step: int, run_folder: Path) -> None:
    for name in names:
        (run_folder / name).touch()
    checkpoint = find_checkpoint(str(run_folder))
    assert (checkpoint.weights_file, checkpoint.step) == (run_folder / found, step)


def test_folders_are_no_weights(run_folder: Path) -> None:
    (run_folder / "step_5").touch()
    (run_folder / "step_9").mkdir()
    assert find_checkpoint(str(run_folder)).step == 5


def test_a_file_stands_for_itself(run_folder: Path) -> None:
    for name in ("step_9", "step_10", "best.pt", "step_10_ema.safetensors"):
        (run_folder / name).touch()
    for name, step in (("step_9", 9), ("best.pt", 0), ("step_10_ema.safetensors", 10)):
        checkpoint = find_checkpoint(str(run_folder / name))
        assert (checkpoint.weights_file, checkpoint.step) == (run_folder / name, step)


def test_nothing_there(run_folder: Path) -> None:
    with pytest.raises(UserError, match=r"run holds no weights \(a file step_<n>, checkpoint or model.safetensors\)"):
        find_checkpoint(str(run_folder))
    with pytest.raises(UserError, match=r"run/step_3 does not exist"):
        find_checkpoint(str(run_folder / "step_3"))


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, published: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """A hub with one repository, some/model, that records what is asked of it."""
    repository, asked = published("checkpoint"), list[str]()
    (repository / "optimizer.bin").touch()

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(repo_id)
        if repo_id != "some/model":
            raise OSError("no such repository")
        cache = tmp_path / "cache"
        cache.mkdir()
        for file in repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_hub_checkpoints_are_fetched(hub: list[str], tmp_path: Path) -> None:
    checkpoint = find_checkpoint("some/model")
    assert hub == ["some/model"]
    assert checkpoint.config == PUBLISHED_CONFIG
    assert checkpoint.weights_file == tmp_path / "cache" / "checkpoint"
    assert read_weights(checkpoint.weights_file)
    assert {file.name for file in (tmp_path / "cache").iterdir()} == {"checkpoint", "all_config.yaml"}


def test_hub_failures_name_the_checkpoint(hub: list[str]) -> None:
    with pytest.raises(UserError, match=r"checkpoint=some/mdoel .*no such repository.*check the name"):
        find_checkpoint("some/mdoel")


@pytest.mark.parametrize("where", ["nothing", "published/step_7", "a/b/c", "/some/model", "some/model/", "./model", ""])
def test_paths_are_not_looked_for_on_the_hub(where: str, hub: list[str]) -> None:
    with pytest.raises(UserError):
        find_checkpoint(where)
    assert hub == []


def test_local_folders_come_before_the_hub(hub: list[str], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "published", tmp_path / "some" / "model")
    assert find_checkpoint("some/model").weights_file == Path("some/model/checkpoint")
    assert hub == []


# --- crashes ---------------------------------------------------------------------------------------------------------


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def test_failing_to_save_leaves_no_file_of_that_name(
    run_folder: Path, model: ACTLossHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(model.state_dict(), run_folder, "step_5")
    before = (run_folder / "step_5").read_bytes()
    with torch.no_grad():
        model.model.inner.lm_head.weight.zero_()
    save = torch.save

    def failing(content: object, stream: BinaryIO) -> None:
        save(content, stream)
        stream.flush()
        _cut(Path(stream.name))
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    for step in (5, 6):
        with pytest.raises(OSError, match="No space left"):
            save_weights(model.state_dict(), run_folder, f"step_{step}")
    assert (run_folder / "step_5").read_bytes() == before
    assert not (run_folder / "step_6").exists()
    assert find_checkpoint(str(run_folder)).step == 5  # whatever else the failure left there


def test_a_save_after_a_crash_succeeds(run_folder: Path, model: ACTLossHead) -> None:
    (run_folder / ".step_5.tmp").write_bytes(b"left by a crash")
    file = save_weights(model.state_dict(), run_folder, "step_5")
    assert read_weights(file).keys() == model.state_dict().keys()


def test_failing_to_save_the_config_keeps_the_old_one(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run_folder / "all_config.yaml").read_text()

    def failing(file: Path, content: bytes) -> int:
        with file.open("wb") as opened:
            opened.write(content)
        _cut(file)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", failing)
    with pytest.raises(OSError, match="No space left"):
        save_config(PretrainConfig(arch=arch_config(ARCH), data_path="other"), run_folder)
    assert (run_folder / "all_config.yaml").read_text() == before


# --- files that are no checkpoints -----------------------------------------------------------------------------------


def damaged(whole: bytes) -> Iterator[bytes]:
    """Files that are not what they should be: short texts, noise, and weights cut off."""
    rng = random.Random(0)
    for _ in range(150):
        yield "".join(rng.choices(string.printable, k=rng.randrange(60))).encode()
        yield rng.randbytes(rng.randrange(60))
    for _ in range(100):
        yield whole[: rng.randrange(len(whole))]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_end_in_a_sentence(kind: str, tmp_path: Path, model: ACTLossHead) -> None:
    if kind == "safetensors":
        save_weights(model.state_dict(), tmp_path, "step_1")
        file = tmp_path / "step_1.safetensors"
    else:
        file = tmp_path / "step_1"
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    assert read_weights(file).keys() == model.state_dict().keys()
    escaped: dict[str, bytes] = {}
    for content in damaged(file.read_bytes()):
        file.write_bytes(content)
        try:
            read_weights(file)
            escaped["accepted"] = content[:40]
        except UserError as error:
            if not str(error).startswith(f"{file} ") or "\n" in str(error):
                escaped[str(error)] = content[:40]
        except Exception as error:
            escaped[type(error).__name__] = content[:40]
    assert not escaped


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        [torch.zeros(2)],
        {"step": 3},
        {"model": {"weight": 1.0}},
        {"optimizer": {"weight": torch.zeros(2)}},
        {"weight": torch.zeros(2, device="meta")},
        {"weight": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])},
        {"weight": torch.zeros(2).to_sparse()},
        {"weight": torch.zeros(2, dtype=torch.complex64)},
    ],
    ids=["tensor", "list", "number", "no tensor", "other container", "meta", "nested", "sparse", "complex"],
)
def test_only_named_tensors_are_weights(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "step_1")
    with pytest.raises(UserError, match=r"step_1 does not hold a state_dict"):
        read_weights(tmp_path / "step_1")


@pytest.mark.parametrize("container", [None, "model", "state_dict"])
@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "net.", "model."]
)
def test_containers_and_prefixes_of_weights(
    container: str | None, prefix: str, tmp_path: Path, model: ACTLossHead
) -> None:
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    whole = {container: weights, "optimizers": [], "step": 1} if container else weights
    torch.save(whole, tmp_path / "step_1")
    found = read_weights(tmp_path / "step_1")
    assert list(found) == list(model.state_dict())
    load_weights(model, found, tmp_path / "step_1")


def test_one_weight_under_two_prefixes_is_an_error(tmp_path: Path) -> None:
    torch.save({"module.a": torch.zeros(2), "_orig_mod.a": torch.ones(2)}, tmp_path / "step_1")
    with pytest.raises(UserError, match="step_1 has a several times"):
        read_weights(tmp_path / "step_1")


def test_weights_that_ask_for_more_memory_than_they_have_bytes(tmp_path: Path) -> None:
    file = tmp_path / "step_1"
    torch.save({"wide": torch.zeros(1, 1).expand(10**6, 10**6)}, file)
    with pytest.raises(UserError, match=r"has wide of shape \(1000000, 1000000\), but fewer numbers are stored"):
        read_weights(file)
    torch.save({"zeros": torch.zeros(1 << 22)}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "step_2", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in whole.infolist():
            packed.writestr(part.filename, whole.read(part))
    with pytest.raises(UserError, match=r"step_2 has [\d,]+ bytes but unpacks to 16,\d+,\d+, and was not loaded"):
        read_weights(tmp_path / "step_2")


@pytest.mark.parametrize(
    ("options", "said"),
    {
        "itself": ("arch: &a {x: *a}", "within what it refers to"),
        "deep": ("arch: " + "{a: " * 3000 + "1" + "}" * 3000, "nested deeper than 64"),
        "10,000 digits": ("arch: {hidden_size: " + "9" * 10_000 + "}", "not readable"),
        "a list as key": ("arch: {[1, 2]: 3}", "not readable"),
        "Python": ("arch: !!python/object/apply:os.system [id]", "not readable"),
        "a variable": (
            "arch: {name: '${oc.env:HOME}'}",
            r"arch.name: \${oc.env:HOME}, which stands for something outside",
        ),
        "a default": ("arch: {loss: {loss_type: '${oc.env:X,softmax}'}}", "arch.loss.loss_type: .* is not looked up"),
        "in a list": ("arch: {x: [1, '${oc.decode:y}']}", "arch.x.1: .* is not looked up"),
        "a name of names": ("arch: {x: '${${y}:HOME}', y: oc.env}", "arch.x: .* is not looked up"),
        "elsewhere": ("arch: {}\ndata_path: ${oc.env:HOME}/data", "data_path: .* is not looked up"),
    }.values(),
)
def test_options_that_are_no_options_end_in_a_sentence(options: str, said: str, run_folder: Path) -> None:
    (run_folder / "step_1").touch()
    (run_folder / "all_config.yaml").write_text(options)
    with pytest.raises(UserError, match=said) as told:
        find_checkpoint(str(run_folder))
    assert str(told.value).startswith(f"{run_folder / 'all_config.yaml'} ")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("where", ["x" * 300, "a/" + "x" * 300, "a\0b", "x" * 5000])
def test_impossible_paths_do_not_exist(where: str) -> None:
    with pytest.raises(UserError, match=r"does not exist") as told:
        find_checkpoint(where)
    assert len(str(told.value)) < 400


def _change(weights: dict[str, Tensor], change: str) -> str:
    """Damages weights in one way; returns the name that the error must give."""
    name = "model.inner.L_level.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "additional":
        name = "model.inner.M_level.layers.0.mlp.down_proj.weight"
        weights[name] = torch.zeros(1)
    elif change == "reshaped":
        weights[name] = weights[name].T
    return name


@pytest.mark.parametrize("change", ["missing", "additional", "reshaped"])
def test_weights_that_do_not_fit_are_named(change: str, model: ACTLossHead) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    name = _change(weights, change)
    with pytest.raises(UserError, match=rf"run/step_4 .*{name.replace('.', '[.]')}\b"):
        load_weights(model, weights, Path("run/step_4"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "loaded in part"
