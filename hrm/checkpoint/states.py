"""Training states: all that shapes the rest of a run, saved as `state_<n>` in its folder while training goes on.

A folder `state_<n>` holds what the run was after step n, and before the evaluation there, if that was one:

    *.safetensors  tensors, by torch.distributed.checkpoint; each rank writes a file, any number of ranks reads them
    state.json     the rest: `Facts`
    SHA256SUMS     of these files, as `sha256sum --check` takes it

It gets its name when all of it is on the disk, and its files are checked before they are read. Nothing read from it is
executed. Ranks on several hosts need a run folder that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hrm import __version__
from hrm.batch import Batch
from hrm.checkpoint.weights import sync
from hrm.config import PROJECT_DIR, HRMConfig, PretrainConfig
from hrm.data.pack import Pack, sha256_of
from hrm.distributed.world import World
from hrm.errors import UserError, first_sentence
from hrm.kernels import describe
from hrm.models import ACTLossHead
from hrm.training.metrics import MetricWindow, OpenSums
from hrm.training.step import TrainState

AUTO = "auto"
_FORMAT = 1
_FACTS_FILE = "state.json"
_SUMS_FILE = "SHA256SUMS"
_STATE_NAME = re.compile(r"state_(\d+)")

# One process without a process group is no accident here.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass
class Progress:
    """Where a run stands among its batches and evaluations."""

    pass_index: int = 0
    batches: int = 0  # of the pass that were trained on
    train_accuracy: float | None = None  # exact, in the last window of steps that had one
    best_accuracy: float | None = None  # exact, at the best evaluation
    best_step: int | None = None
    evaluations_since_best: int = 0


@dataclass(frozen=True)
class Facts:
    """What a training state holds besides tensors."""

    step: int
    num_ranks: int
    progress: dict[str, Any]  # fields of `Progress`
    window_names: list[str]  # of the metrics in the window that was open, see `OpenSums`
    window_steps: int
    metrics_size: int  # bytes of metrics.jsonl up to here
    wandb_id: str | None
    config: dict[str, Any]
    pack: dict[str, Any]  # metadata of the training split
    made_by: dict[str, str]  # versions, device, kernels
    format: int = _FORMAT


@dataclass(frozen=True)
class SavedState:
    """A training state on disk whose files were checked."""

    folder: Path
    facts: Facts
    passed_over: list[str] = field(default_factory=list)  # why later ones were not taken, a sentence each

    def is_of(self, run_folder: Path) -> bool:
        """Whether it lies in that run folder."""
        return self.folder.parent.resolve() == run_folder.resolve()


# ---------------------------------------------------------------------------------------------------------------------
# Saving


class StateSaver:
    """Saves the training states of a run, and its weights, in a thread of its own.

    A save takes as long as the copy to the host's memory; the next one waits until the one before is on the disk. Jobs
    are done in order: when a training state has its name, all that was to be written before it has been.
    """

    def __init__(self, folder: Path, keep: int, world: World, timeout: float) -> None:
        """Keep the newest `keep` training states; ranks wait at most `timeout` seconds for each other."""
        self._folder = folder
        self._keep = keep
        self._world = world
        self._thread = ThreadPoolExecutor(1, "saver")
        self._pending: Future[None] | None = None
        # Groups of its own: the thread exchanges while training does. The second is of those that save a part of the
        # batch: the first process of each.
        self._group = self._parts = None
        if world.processes > 1:
            first_of_parts = range(0, world.processes, world.processes // world.size)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._parts = dist.new_group(list(first_of_parts), backend="gloo", timeout=timedelta(seconds=timeout))
        self.saved_step: int | None = None
        if world.is_main:
            for left in folder.glob(".state_*.tmp"):
                shutil.rmtree(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([] if kind is None else [UserError])):  # the first error is the one to be told
            self.wait()
        self._thread.shutdown()

    def save(self, facts: Facts, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Save a training state; every rank must do so after the same step.

        Args:
            shared: tensors that are equal on all ranks.
            own: this rank's slices, along the first dimension, of the others. Sizes are equal on all ranks.
        """
        self.wait()
        self.saved_step = facts.step
        tensors = on_host(shared if self._world.is_main else {})
        if self._world.is_first_of_part:
            tensors |= _shards(on_host(own), self._parts)
        self.run(f"state_{facts.step}", lambda: self._write(facts, tensors))

    def run(self, name: str, job: Callable[[], object]) -> None:
        """Do a job in the thread after those before; `name` is the file that it writes to the run folder."""
        self.wait()

        def work() -> None:
            try:
                job()
            except Exception as error:
                cause: BaseException = error
                if isinstance(error, CheckpointException):  # its own text is a traceback
                    cause, _ = next(iter(error.failures.values()))
                raise UserError(
                    f"{self._folder / name} could not be written ({first_sentence(cause)}): mend that, and go on with "
                    "resume=auto."
                ) from error

        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait until all is on the disk.

        Raises:
            UserError: something could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, facts: Facts, tensors: dict[str, Tensor]) -> None:
        final = self._folder / f"state_{facts.step}"
        temporary = self._folder / f".{final.name}.tmp"
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        if self._world.is_main:
            (temporary / _FACTS_FILE).write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
            sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
            (temporary / _SUMS_FILE).write_text(sums, encoding="utf-8")
            for path in (temporary / _FACTS_FILE, temporary / _SUMS_FILE, temporary):
                sync(path)
            temporary.rename(final)
            sync(self._folder)
            self._discard_all_but(facts.progress["best_step"])

    def _discard_all_but(self, best_step: int | None) -> None:
        states = _states_in(self._folder)
        for step in sorted(states)[: -self._keep]:
            if step != best_step:
                hidden = states[step].with_name(f".{states[step].name}.tmp")  # so that none is ever there in part
                states[step].rename(hidden)
                shutil.rmtree(hidden)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, each in its own; waits for the device once."""
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def shared_tensors(state: TrainState) -> dict[str, Tensor]:
    """What of a training state belongs to no rank in particular; every process must call this."""
    tensors = _named("weights", state.shared.gather(state.model.state_dict()))
    if state.average is not None:
        tensors |= _named("average", state.shared.gather(state.average.model.state_dict()))
    dense, _ = state.optimizers[0]  # the puzzle table's keeps nothing
    values = dense.state_dict()["state"]
    some: dict[str, Any] = {}  # a process may have nothing of a weight, and Muon's matrices have no second moment
    for value in values.values():
        some |= value
    for key, example in some.items():
        if torch.as_tensor(example).ndim:
            parts = {
                name: values[number][key] if number in values else torch.empty_like(weight)
                for number, (name, weight) in enumerate(state.shared.weights.items())
                if key in values.get(number, some)
            }
            tensors |= _named(f"moments.{key}", state.shared.gather(parts))
        else:
            counts = [values.get(number, some)[key] for number in range(len(state.shared.weights))]
            tensors[f"counts.{key}"] = torch.stack([torch.as_tensor(count) for count in counts])
    return tensors


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def own_tensors(state: TrainState, window: MetricWindow, world: World) -> dict[str, Tensor]:
    """What each rank has of its own: the carry of its sequences, its random generator, its sums of metrics."""
    assert state.carry is not None
    tensors = {f"carry.{number}": tensor for number, tensor in enumerate(state.carry.tensors())}
    tensors["exploration"] = state.model.model.exploration(world.device).get_state().unsqueeze(0)
    if begun := window.open_sums():
        tensors["window"] = begun.sums.unsqueeze(0)
    return tensors


def describe_maker(state: TrainState, world: World) -> dict[str, str]:
    """What the bits of a run depend on besides its options. To be called at its start, while the sources are as run."""
    code = hashlib.sha256()
    for file in sorted((PROJECT_DIR / "hrm").rglob("*.py")):
        code.update(file.read_bytes())
    return {
        "hrm": f"{__version__} with sources {code.hexdigest()[:12]}",
        "PyTorch": str(torch.__version__),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "kernels": describe(state.model.kernels),
        "processes": str(world.processes),
    }


def _shards(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Every rank's slices as global tensors, without an exchange."""
    if group is None:
        return tensors
    mesh = DeviceMesh.from_group(group, "cpu")
    return {name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Finding and checking


def find_state(resume: str, run_folder: Path) -> SavedState | None:
    """The training state that `resume` asks for.

    Args:
        resume: `auto`, for the last good one in `run_folder` (None if there is none yet); or the path of a training
            state, or of a run folder, for its last good one.

    Raises:
        UserError: there is none at that path, or none that is whole.
    """
    folder = run_folder if resume == AUTO else Path(resume)
    if _STATE_NAME.fullmatch(folder.name) and folder.is_dir():
        return SavedState(folder, read_facts(folder))
    states = _states_in(folder)
    passed_over: list[str] = []
    for step in sorted(states, reverse=True):
        try:
            return SavedState(states[step], read_facts(states[step]), passed_over)
        except UserError as error:
            passed_over.append(str(error))
    if passed_over:
        raise UserError(f"no training state in {folder} is whole: {passed_over[0]}")
    if resume == AUTO:
        return None
    raise UserError(
        f"resume={resume} is no training state (a folder state_<n>) and no run folder with one; weights alone do not "
        "say how a run goes on."
    )


def read_facts(folder: Path) -> Facts:
    """What a training state holds besides tensors, once all its files are found to be as they were saved.

    Raises:
        UserError: a file is missing, changed, or not of this program.
    """
    try:
        lines = (folder / _SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is no training state, as it has no readable {_SUMS_FILE}.") from error
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {file.name for file in folder.iterdir()} - {_SUMS_FILE}
    for name in sorted(found | expected.keys()):
        if name not in found:
            raise UserError(f"{folder} lacks {name}, which its {_SUMS_FILE} names: resume from another training state.")
        if expected.get(name) != sha256_of(folder / name):
            raise UserError(
                f"{folder / name} is not what was saved (its SHA-256 is not that in {_SUMS_FILE}): resume from another "
                "training state."
            )
    try:
        content = json.loads((folder / _FACTS_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise UserError(
                f"{folder} has format {content['format']} of training states, but this version reads {_FORMAT}: "
                "resume with the version that saved it."
            )
        return Facts(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no training state of this program ({_FACTS_FILE}: {error!r}).") from error


def check_options(saved: SavedState, config: PretrainConfig, pack: Pack) -> list[str]:
    """Compare a training state's options with those it is to go on with.

    Returns:
        What changed by consent, an option each.

    Raises:
        UserError: an option that matters changed, and `config.resume_changed` does not consent, or cannot.
    """
    now = _flat({**asdict(config), "pack": asdict(pack.metadata)})
    # Options newer than the state had their defaults.
    defaults = _flat(asdict(PretrainConfig(arch=HRMConfig())))
    had = defaults | _flat({**saved.facts.config, "pack": saved.facts.pack})
    changed = {name: f"{name}={now.get(name)} (it had {had.get(name)})" for name in sorted(now.keys() | had.keys())}
    changed = {name: text for name, text in changed.items() if not _is_free(name) and now.get(name) != had.get(name)}
    if fixed := [text for name, text in changed.items() if name in _FIXED or name.startswith("pack.")]:
        raise UserError(
            f"the run in {saved.folder} cannot go on with {' and '.join(fixed)}: give what it had, or start anew with "
            "resume=null."
        )
    if changed and not config.resume_changed:
        raise UserError(
            f"the run in {saved.folder} would go on with {' and '.join(changed.values())}: give what it had, or add "
            "resume_changed=true if this is meant."
        )
    return list(changed.values())


# These say where things go and how often, or when to end: the steps stay the same.
_FREE = (
    *("resume", "resume_changed", "checkpoint_interval", "keep_checkpoints", "checkpoint_every_eval"),
    *("checkpoint_path", "project_name", "run_name", "eval_save_outputs", "log_interval", "num_workers", "wandb"),
    *("stop_after", "stop_at_train_accuracy", "abort_after", "profile", "dist_timeout"),
)
# The place among the batches, the carry and the moments mean nothing under others. (And so with the pack.)
_FIXED = ("global_batch_size", "eval_interval", "optim.name")


def _is_free(name: str) -> bool:
    # How a pack is made (which one is read is data_path), and who computes what of the same steps.
    return name in _FREE or name.startswith(("data.", "parallel."))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted names, as JSON returns their values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _states_in(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    named = ((_STATE_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match[1]): path for match, path in named if match}


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def restore(saved: SavedState, state: TrainState, world: World, config: PretrainConfig, pack: Pack) -> OpenSums | None:
    """Bring a fresh run to where a training state was; to be called before its first step.

    On as many ranks as before, and on one machine, what follows has the same bits as if the run had never stopped. On
    another number of ranks each takes its share of the sequences, and explores by a random stream of its own that
    follows from seed, step and rank.

    Returns:
        What was in the window of metrics that was open.

    Raises:
        UserError: the tensors are not those of this model and its optimizers.
    """
    tensors = _read_tensors(saved.folder)
    _fill(state, state.model, dict(_below("weights.", tensors)), saved.folder)
    if state.average is not None:  # if it was off before, it starts now
        average = dict(_below("average.", tensors)) or dict(_below("weights.", tensors))
        _fill(state, state.average.model, average, saved.folder)
    values: list[dict[str, Tensor]] = [{} for _ in state.shared.weights]
    for key, counts in _below("counts.", tensors):
        for own, count in zip(values, counts, strict=True):
            own[key] = count.clone()
    for path, moment in _below("moments.", tensors):
        key, _, name = path.partition(".")
        values[list(state.shared.weights).index(name)][key] = state.shared.scatter({name: moment})[name].clone()
    dense, _ = state.optimizers[0]
    # Rates, betas and the like are the options' business.
    dense.load_state_dict({"state": dict(enumerate(values)), "param_groups": dense.state_dict()["param_groups"]})
    state.step = saved.facts.step

    local = config.global_batch_size // world.size
    state.carry = state.model.initial_carry(_blank_batch(local, pack, world))
    for number, tensor in enumerate(state.carry.tensors()):
        tensor.copy_(tensors[f"carry.{number}"][world.rank * local : (world.rank + 1) * local])

    generator, streams = state.model.model.exploration(world.device), tensors["exploration"]
    same_ranks = saved.facts.num_ranks == world.size
    if same_ranks and streams.shape[1:] == generator.get_state().shape:
        generator.set_state(streams[world.rank].clone())
    else:
        entropy = np.random.SeedSequence(config.seed, spawn_key=(state.step, world.rank))
        state.model.model.seed_exploration(int(entropy.generate_state(1, np.uint64)[0]))

    if not saved.facts.window_steps:
        return None
    sums = tensors["window"][world.rank] if same_ranks else tensors["window"].sum(0) * world.is_main
    return OpenSums(saved.facts.window_names, saved.facts.window_steps, sums.to(world.device))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors, whole, on the host."""
    reader = HuggingFaceStorageReader(str(folder))
    about = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in about.items()}  # type: ignore[union-attr]
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


@torch.no_grad()
def _fill(state: TrainState, model: ACTLossHead, whole: Mapping[str, Tensor], folder: Path) -> None:
    """Copy whole weights, or this process's parts of them, into a model's, which stay where they are in memory."""
    own = model.state_dict()
    own |= {name: tensor.to_local() for name, tensor in own.items() if isinstance(tensor, DTensor)}
    parts = state.shared.scatter(whole)
    for name in sorted(own.keys() | whole.keys()):
        if name not in own or name not in parts or own[name].shape != parts[name].shape:
            has = tuple(whole[name].shape) if name in whole else "nothing"
            raise UserError(
                f"{folder} has {has} for {name}, which does not fit this model: resume with the architecture that the "
                "run had."
            )
    for name, tensor in own.items():
        tensor.copy_(parts[name])


def _blank_batch(size: int, pack: Pack, world: World) -> Batch:
    board = torch.zeros(size, pack.metadata.seq_len, dtype=torch.int32, device=world.device)
    return {"inputs": board, "labels": board.clone(), "puzzle_identifiers": board[:, 0].clone()}
