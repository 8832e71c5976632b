"""Options of work shared by several processes: `parallel`."""

from __future__ import annotations

from dataclasses import dataclass

from hrm.config.checks import at_least
from hrm.errors import UserError


@dataclass
class ParallelConfig:
    """How the processes that torchrun started share the work.

    `tensor * pipeline` of them train together on one part of the batch; there are as many parts as that leaves.
    """

    tensor: int = 1  # processes that share the heads and the MLP of every block
    pipeline: int = 1  # processes that share the layers of each level, in stages
    micro_batches: int = 4  # what a rank's batch is cut into on its way through the pipeline; at least its stages
    fsdp: bool = False  # keep the levels' weights and their optimizer state in shards over the data ranks
    bucket_mb: float = 0.0  # sum gradients in buckets of this many MB while backward goes on; 0: all at once after it
    cuda_graphs: bool | None = None  # record the exchange between GPUs into kernels.cuda_graphs; null: where possible

    @property
    def records_exchange(self) -> bool:
        """Whether `kernels.cuda_graphs` takes in what several processes exchange."""
        return self._can_record if self.cuda_graphs is None else self.cuda_graphs

    @property
    def _can_record(self) -> bool:
        return not self.fsdp and self.pipeline == 1

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        at_least("parallel.micro_batches", self.micro_batches, self.pipeline)
        at_least("parallel.bucket_mb", self.bucket_mb, 0)
        if self.fsdp and self.pipeline > 1:
            raise UserError("parallel.fsdp=true does not go with parallel.pipeline: drop one of them.")
        if self.cuda_graphs and not self._can_record:
            raise UserError(
                "parallel.cuda_graphs=true goes with data and tensor parallelism only: drop it, parallel.fsdp or "
                "parallel.pipeline."
            )
