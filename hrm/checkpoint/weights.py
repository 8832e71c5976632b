"""Run folders: weights as `step_<n>`, the options as `all_config.yaml`, readable by the published code and reading its.

Weights are saved with the prefix `_orig_mod.` that torch.compile gives the published code's parameters: its
`evaluate.py` then takes them compiled or not. Reading strips the prefix. Nothing read from a checkpoint is executed.
Beside each `step_<n>` lie the same weights as `step_<n>.safetensors`, for tools other than PyTorch. What a run needs to
go on is in `hrm.checkpoint.states`.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yaml import YAMLError

from hrm.checkpoint.fetching import local_files
from hrm.checkpoint.quantized import from_int8
from hrm.checkpoint.run_folder import CONFIG_FILE, replacing
from hrm.errors import UserError, first_sentence, shortened
from hrm.reading import read_yaml_text
from hrm.remote.urls import is_url
from hrm.tasks.form import FORM_FILE, IDENTIFIERS_FILE

PUZZLE_TABLE = "model.inner.puzzle_emb.weights"  # its name among the weights

PRETRAINED = Path(__file__).parents[1] / "pretrained"
_COMPILED_PREFIX = "_orig_mod."
_WRAPPERS = ("_orig_mod", "module")  # torch.compile's, and DistributedDataParallel's
_CONTAINERS = ("model", "state_dict")  # of weights among other things
_OF_THE_MODEL = "model.inner."
_HUB_ID = re.compile(r"(?=.{3,96}$)[\w.-]+/[\w.-]+")
_HUB_WEIGHTS = "checkpoint"
# What `save_pretrained` writes, as other packages do on the hub.
PRETRAINED_WEIGHTS, PRETRAINED_CONFIG = "model.safetensors", "config.json"
_SAFETENSORS = ".safetensors"
_BESIDE_WEIGHTS = (CONFIG_FILE, PRETRAINED_CONFIG, FORM_FILE, IDENTIFIERS_FILE)
_HUB_FILES = [_HUB_WEIGHTS, "step_*", PRETRAINED_WEIGHTS, *_BESIDE_WEIGHTS]
_OPTION_REFERENCE = re.compile(r"\$\{\.*\w+(\.\w+)*\}")
_WEIGHTS_NAME = re.compile(r"step_(\d+)(_ema)?(\.safetensors|\.pt)?")


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk and the options they were trained with."""

    weights_file: Path
    config: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.weights_file.parent

    @property
    def config_file(self) -> Path:
        return _config_file(self.weights_file)

    @property
    def step(self) -> int:
        """Optimizer steps behind the weights; 0 where the file's name does not say."""
        named = _WEIGHTS_NAME.fullmatch(self.weights_file.name)
        return int(named[1]) if named else 0


def save_weights(weights: Mapping[str, Tensor], folder: Path, name: str) -> Path:
    """Write weights as `<name>`, in the published layout, and `<name>.safetensors`; a crash midway leaves no torn file.

    Args:
        weights: as the model's `state_dict()` names them; no two may share memory.
        name: `step_<n>`.
    """
    file = folder / name
    with replacing(file) as temporary, temporary.open("wb") as stream:  # a file of Python says why it cannot be written
        torch.save({_COMPILED_PREFIX + name: tensor for name, tensor in weights.items()}, stream)
    with replacing(file.with_name(name + _SAFETENSORS)) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary, {"format": "pt"})
    return file


def find_checkpoint(where: str, option: str = "checkpoint", *, needs_config: bool = True) -> Checkpoint:
    """Locate weights and read their options.

    Args:
        where: a weights file, a run folder (its last step is taken), the URL of one of these, a hub id `owner/name`,
            or one of `pretrained()`.
        option: which gave it, for errors.
        needs_config: False where weights without options beside them will do: the options are empty then.

    Raises:
        UserError: nothing is there, or the options beside the weights are missing or unreadable.
    """
    path = local_files(where, _BESIDE_WEIGHTS, _of_model) if is_url(where) else Path(where)
    # os.path, for pathlib raises errors about names that are too long or hold a NUL.
    if os.path.isdir(path):
        weights_file = _last_weights(path)
    elif os.path.isfile(path):
        weights_file = path
    elif _HUB_ID.fullmatch(where) and not os.path.isdir(path.parent):
        weights_file = _last_weights(_download(where))
    elif where in pretrained():
        weights_file = _last_weights(PRETRAINED / where)
    else:
        raise UserError(
            f"{option}={shortened(where)} does not exist; give a weights file, a run folder, a URL of one, a hub id, "
            f"or a model that comes with this package: {', '.join(pretrained())}."
        )
    file = _config_file(weights_file)
    return Checkpoint(weights_file, _read_config(file) if needs_config or file.exists() else {})


def _config_file(weights_file: Path) -> Path:
    """The options beside weights."""
    folder = weights_file.parent
    if not (folder / CONFIG_FILE).exists() and (folder / PRETRAINED_CONFIG).exists():
        return folder / PRETRAINED_CONFIG
    return folder / CONFIG_FILE


def pretrained() -> list[str]:
    """Names of the trained models that come with this package."""
    return sorted(folder.name for folder in PRETRAINED.iterdir() if _config_file(folder / PRETRAINED_WEIGHTS).is_file())


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by their names in a plain model, on the CPU; int8 (`quantized`) as float32.

    The file is a `state_dict()`, or holds one as `model` or `state_dict`, as whole training states and Lightning's
    checkpoints do. What torch.compile, DistributedDataParallel and a module around the model add to names is left out.

    Raises:
        UserError: the file is torn, or holds anything but named tensors (such a file is not executed), or asks for more
            memory than it has bytes.
    """
    try:
        if file.suffix == _SAFETENSORS:
            loaded = load_file(file)
        else:
            _check_unpacked_size(file)
            with warnings.catch_warnings(action="ignore"):  # about pickle protocols: whether it loads is what counts
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} holds more than tensors, or is no checkpoint, and was not loaded; save its state_dict() alone."
        ) from error
    except Exception as error:  # what loading raises over damaged files shares no base class
        raise UserError(f"{file} is torn or no checkpoint ({first_sentence(error)}); copy it anew.") from error
    held = _state_dict_in(loaded)
    if held is None:
        raise UserError(f"{file} does not hold a state_dict (names and tensors); save model.state_dict().")
    for name, tensor in held.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{file} has {shortened(str(name))} of shape {tuple(tensor.shape)}, but fewer numbers are stored for "
                "it: save a contiguous copy."
            )
    plain = _plain_names([str(name) for name in held])
    if len(set(plain)) < len(plain):
        twice = next(name for name in plain if plain.count(name) > 1)
        raise UserError(f"{file} has {shortened(twice)} several times, under prefixes: keep one of them.")
    return from_int8(dict(zip(plain, held.values(), strict=True)), file)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Put weights into a model, in place.

    Raises:
        UserError: names or shapes are not the model's; the first difference is named.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"{file} lacks {name}: it was trained with another architecture than its {CONFIG_FILE}.")
        if name not in own:
            raise UserError(f"{file} has {name}, which the architecture in its {CONFIG_FILE} does not.")
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"{file} has {name} of shape {tuple(weights[name].shape)}, but the architecture and the data need "
                f"{tuple(own[name].shape)}: use the config and the pack it was trained with."
            )
    model.load_state_dict(weights)


def refilled(table: Tensor, how: str, rows: int) -> Tensor:
    """A puzzle table of other rows: each the mean of those of `table` [N, ndim] (`how` is mean), or zeros (zero)."""
    row = table.mean(0, keepdim=True) if how == "mean" else torch.zeros_like(table[:1])
    return row.expand(rows, -1).contiguous()


def nonfinite_weights(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"  # not meta, which holds no numbers
        and (value.is_floating_point() or value.dtype == torch.int8)
    )


def _state_dict_in(loaded: object) -> Mapping[object, Tensor] | None:
    """The names and tensors in what was loaded, which may hold them as one of its parts."""
    for part in (loaded, *(loaded.get(key) for key in _CONTAINERS if isinstance(loaded, Mapping))):
        if isinstance(part, Mapping) and all(map(_is_weight, part.values())):
            return part
    return None


def _check_unpacked_size(file: Path) -> None:
    """UserError for an archive whose parts are larger than it: unpacked, they could take all memory."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            claimed, size = sum(part.file_size for part in archive.infolist()), file.stat().st_size
        if claimed > size:
            raise UserError(f"{file} has {size:,} bytes but unpacks to {claimed:,}, and was not loaded: save it anew.")


def _plain_names(names: Sequence[str]) -> list[str]:
    """Names of weights without what wrappers put into them: `module.model.inner.x` is `model.inner.x`."""
    plain = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    around = {name.partition(_OF_THE_MODEL)[0] if _OF_THE_MODEL in name else None for name in plain}
    if len(around) == 1 and (prefix := around.pop()):  # what all stand below, such as a LightningModule's attribute
        return [name.removeprefix(prefix) for name in plain]
    return plain


def _last_weights(folder: Path) -> Path:
    if (name := _last_of([file.name for file in folder.iterdir() if file.is_file()])) is None:
        raise UserError(
            f"{folder} holds no weights (a file step_<n>, {_HUB_WEIGHTS} or {PRETRAINED_WEIGHTS}); give a run folder."
        )
    return folder / name


def _last_of(names: Collection[str]) -> str | None:
    """The file of weights of the last step, of the files of a run folder; or those that have no step."""
    steps: dict[int, str] = {}
    # Backwards, so that of one step the published layout takes the place of .safetensors.
    for name in sorted(names, reverse=True):
        named = _WEIGHTS_NAME.fullmatch(name)
        if named and not named[2]:
            steps[int(named[1])] = name
    if steps:
        return steps[max(steps)]
    return next((name for name in (_HUB_WEIGHTS, PRETRAINED_WEIGHTS) if name in names), None)


def _of_model(names: Collection[str]) -> list[str]:
    """The files of a folder that make a model: the last weights, and what belongs to them."""
    return [name for name in (_last_of(names), *_BESIDE_WEIGHTS) if name is not None and name in names]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # imported here: slow, and most runs read from disk

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's failures share no base class
        raise UserError(
            f"checkpoint={hub_id} is no local path, and fetching it from the hub failed ({first_sentence(error)}): "
            "check the name and the network."
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise UserError(f"{file} is missing: put the run's {CONFIG_FILE} beside its weights.")
    try:
        config = OmegaConf.to_container(OmegaConf.load(io.StringIO(read_yaml_text(file))))
    # What a YAML library makes of a date, of 10,000 digits or of a key that is a list shares no base class.
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} is not readable as YAML ({first_sentence(error)}); restore it.") from error
    if reference := _reference(config):
        raise UserError(
            f"{file} has {reference}, which stands for something outside of the file, such as a variable of this "
            "machine, and is not looked up: write the value itself."
        )
    if not isinstance(config, dict) or not isinstance(config.get("arch"), dict):
        raise UserError(f"{file} has no section arch: it is not the config of an HRM run; restore it.")
    return {str(name): value for name, value in config.items()}


def _reference(value: object, name: str = "") -> str | None:
    """The first option, as name: value, that OmegaConf would look up elsewhere than among the options beside it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found = (_reference(inner, f"{name}.{key}" if name else str(key)) for key, inner in items)
        return next(filter(None, found), None)
    if isinstance(value, str) and "${" in _OPTION_REFERENCE.sub("", value):
        return f"{name}: {shortened(value)}"
    return None
