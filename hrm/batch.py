"""What a batch is: the ground that the loader, the models and the losses share."""

from torch import Tensor

Batch = dict[str, Tensor]
"""`inputs` and `labels` int32 [B, S], `puzzle_identifiers` int32 [B]; B is the batch of one rank."""

IGNORE_LABEL_ID = -100
"""Label of a token that counts neither in the loss nor in the metrics."""
