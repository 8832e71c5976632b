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

    tensor: int = 1  # tensor parallelism: processes that share the heads and the MLP of every block
    pipeline: int = 1  # pipeline parallelism: processes that share the layers of each module, in stages
    micro_batches: int = 4  # micro-batches of a rank's batch in the pipeline; at least `pipeline`
    fsdp: bool = False  # shard the modules' weights and their optimizer state over the data-parallel ranks
    bucket_mb: float = 0.0  # all-reduce gradients in buckets of this many MB during backward; 0: all at once after it
    # Capture collective communication in the CUDA graphs of kernels.cuda_graphs; null: wherever that is possible.
    cuda_graphs: bool | None = None

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
            raise UserError("parallel.fsdp=true cannot be combined with parallel.pipeline: drop one of them.")
        if self.cuda_graphs and not self._can_record:
            raise UserError(
                "parallel.cuda_graphs=true works under data and tensor parallelism only: drop it, parallel.fsdp or "
                "parallel.pipeline."
            )
