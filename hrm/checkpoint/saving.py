"""Saving training states and weights while training goes on."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hrm.checkpoint.run_folder import remove, sync
from hrm.checkpoint.states import METADATA_FILE, SUMS_FILE, StateMetadata, states_in
from hrm.distributed.world import World, is_of_an_exchange
from hrm.errors import first_sentence
from hrm.reading import sha256_of


class StateSaver:
    """Saves the training states of a run, and its weights, in a thread of its own.

    A save takes as long as the copy to the host's memory; the next one waits until the one before is on the disk. Jobs
    are done in order: when a training state has its name, all that was to be written before it has been.

    What cannot be written (a full disk, a folder that is gone) leaves what is there as it is, is said in a sentence,
    and does not end training: the next save tries again.

    Attributes:
        saved_step: of the newest training state that is on the disk, as known since the last `wait`.
        failed: what could not be written, each with the reason. Of a training state, all ranks know.
    """

    def __init__(
        self, folder: Path, keep: int, world: World, timeout: float, say: Callable[[str], None] = print
    ) -> None:
        """Keep the newest `keep` training states; ranks wait at most `timeout` seconds for each other."""
        self._folder = folder
        self._keep = keep
        self._world = world
        self._say = say
        self._thread = ThreadPoolExecutor(1, "saver")
        self._pending: tuple[str, Future[None], int | None] | None = None
        # Groups of its own: the thread exchanges while training does. The second is of those that save a part of the
        # batch: the first process of each.
        self._group = self._parts = None
        if world.processes > 1:
            first_of_parts = range(0, world.processes, world.processes // world.size)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._parts = dist.new_group(list(first_of_parts), backend="gloo", timeout=timedelta(seconds=timeout))
        self.saved_step: int | None = None
        self.failed: dict[str, str] = {}
        self._superseded: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([] if kind is None else [Exception])):  # the first error is the one to be told
            self.wait()
        self._thread.shutdown()

    def goes_on_from(self, step: int, superseded: Sequence[Path]) -> None:
        """Note that the run goes on from the training state of a step in its folder.

        Args:
            superseded: files to remove once something new is on the disk.
        """
        self.saved_step = step
        self._superseded = list(superseded)

    def save(self, metadata: StateMetadata, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Save a training state; every rank must do so after the same step.

        Args:
            shared: tensors that are equal on all ranks.
            own: this rank's slices, along the first dimension, of the others. Sizes are equal on all ranks.
        """
        self.wait()
        tensors = on_host(shared if self._world.is_main else {})
        if self._world.is_first_of_part:
            tensors |= _shards(on_host(own), self._parts)
        self._submit(f"state_{metadata.step}", lambda: self._write(metadata, tensors), metadata.step)

    def run(self, name: str, job: Callable[[], object]) -> None:
        """Do a job in the thread after those before; `name` is the file that it writes to the run folder."""
        self.wait()
        self._submit(name, job, None)

    def _submit(self, name: str, job: Callable[[], object], step: int | None) -> None:
        def work() -> None:
            job()
            for file in self._superseded if self._world.is_main else ():
                if file.name.removesuffix(".safetensors") != name:
                    file.unlink(missing_ok=True)
            self._superseded = []

        self._pending = name, self._thread.submit(work), step

    def wait(self) -> None:
        """Wait until what was to be written is on the disk, or could not be written, which is said.

        Raises:
            RuntimeError: another process stopped answering.
        """
        if self._pending is None:
            return
        name, future, step = self._pending
        error = future.exception()
        self._pending = None
        if error is None:
            self.failed.pop(name, None)
            self.saved_step = self.saved_step if step is None else step
            return
        if is_of_an_exchange(error):
            raise error
        self.failed[name] = reason = _reason(error)
        self._say(
            f"{self._folder / name} could not be written ({reason}): training goes on, older states stay, and the next "
            "save tries again."
        )

    def _write(self, metadata: StateMetadata, tensors: dict[str, Tensor]) -> None:
        final = self._folder / f"state_{metadata.step}"
        temporary = self._folder / f".{final.name}.tmp"
        try:
            self._on_main(self._check_folder)
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            # Where one rank cannot write, this raises on all.
            save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            self._on_main(lambda: self._complete(metadata, temporary, final))
        except BaseException:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # others need the room
            raise
        if self._world.is_main:
            with suppress(OSError):  # the new one is there all the same
                self._discard_all_but(metadata.progress["best_step"])

    def _check_folder(self) -> None:
        if not self._folder.is_dir():  # which saving would make anew, without the rest of the run
            raise FileNotFoundError(errno.ENOENT, "the run folder is gone")

    def _complete(self, metadata: StateMetadata, temporary: Path, final: Path) -> None:
        (temporary / METADATA_FILE).write_text(json.dumps(asdict(metadata), indent=1), encoding="utf-8")
        sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
        (temporary / SUMS_FILE).write_text(sums, encoding="utf-8")
        for path in (temporary / METADATA_FILE, temporary / SUMS_FILE, temporary):
            sync(path)
        temporary.rename(final)
        sync(self._folder)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main process alone; where it fails, raise on all."""
        error: Exception | None = None
        if self._world.is_main:
            try:
                work()
            except Exception as failure:
                error = failure
        if self._group is not None:
            reason = [None if error is None else _reason(error)]
            dist.broadcast_object_list(reason, src=0, group=self._group)
            if error is None and reason[0] is not None:
                raise OSError(reason[0])
        if error is not None:
            raise error

    def _discard_all_but(self, best_step: int | None) -> None:
        states = states_in(self._folder)
        for step in sorted(states)[: -self._keep]:
            if step != best_step:
                hidden = states[step].with_name(f".{states[step].name}.tmp")  # so that none is ever there in part
                states[step].rename(hidden)
                remove(hidden)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, each in its own; waits for the device once."""
    copies = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


def _shards(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Every rank's slices as global tensors, without an exchange."""
    if group is None:
        return tensors
    mesh = DeviceMesh.from_group(group, "cpu")
    return {name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for name, tensor in tensors.items()}


def _reason(error: BaseException) -> str:
    """Why something could not be written, in a few words."""
    if isinstance(error, CheckpointException):  # its own text is a traceback
        error, _ = next(iter(error.failures.values()))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else first_sentence(error)
