"""Saving training states and weights while training goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
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

from hrm.checkpoint.run_folder import sync
from hrm.checkpoint.states import METADATA_FILE, SUMS_FILE, StateMetadata, states_in
from hrm.data.pack import sha256_of
from hrm.distributed.world import World
from hrm.errors import UserError, first_sentence


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

    def save(self, metadata: StateMetadata, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Save a training state; every rank must do so after the same step.

        Args:
            shared: tensors that are equal on all ranks.
            own: this rank's slices, along the first dimension, of the others. Sizes are equal on all ranks.
        """
        self.wait()
        self.saved_step = metadata.step
        tensors = on_host(shared if self._world.is_main else {})
        if self._world.is_first_of_part:
            tensors |= _shards(on_host(own), self._parts)
        self.run(f"state_{metadata.step}", lambda: self._write(metadata, tensors))

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

    def _write(self, metadata: StateMetadata, tensors: dict[str, Tensor]) -> None:
        final = self._folder / f"state_{metadata.step}"
        temporary = self._folder / f".{final.name}.tmp"
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        if self._world.is_main:
            (temporary / METADATA_FILE).write_text(json.dumps(asdict(metadata), indent=1), encoding="utf-8")
            sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
            (temporary / SUMS_FILE).write_text(sums, encoding="utf-8")
            for path in (temporary / METADATA_FILE, temporary / SUMS_FILE, temporary):
                sync(path)
            temporary.rename(final)
            sync(self._folder)
            self._discard_all_but(metadata.progress["best_step"])

    def _discard_all_but(self, best_step: int | None) -> None:
        states = states_in(self._folder)
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


def _shards(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Every rank's slices as global tensors, without an exchange."""
    if group is None:
        return tensors
    mesh = DeviceMesh.from_group(group, "cpu")
    return {name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for name, tensor in tensors.items()}
