"""Options of the optimizers: the group `optim`."""

from __future__ import annotations

from dataclasses import dataclass

from hrm.config.checks import at_least, choice, fraction, positive

OPTIMIZERS = ("adam_atan2", "adamw", "muon")
MUON_SCALES = ("adam", "spectral")
MUON_SPLITS = ("projections", "heads")


@dataclass
class OptimConfig:
    """The optimizer of the dense weights; rates and betas are the top-level options of the published code."""

    name: str = "adam_atan2"  # adam_atan2, adamw or muon
    eps: float = 1e-8  # AdamW only: added to the denominator of its update; Adam-atan2 has none
    momentum: float = 0.95  # Muon only: momentum of the hidden matrices, whose rate and decay are lr and weight_decay
    rest_lr_ratio: float = 0.1  # Muon only: learning rate of embeddings and heads, by Adam-atan2, as a multiple of lr
    rest_weight_decay: float = 1.0  # Muon only: weight decay of embeddings and heads
    # Muon only: what an orthogonal step of R rows and C columns is multiplied by. adam: 0.2 sqrt(max(R, C)), about the
    # size of Adam's steps; spectral: sqrt(max(1, R / C)), which bounds what the step changes in outputs.
    scale: str = "adam"
    # Muon only: what is made orthogonal by itself. projections: q, k, v, gate and up; heads: q, k and v of each head,
    # and gate and up as one matrix.
    split: str = "projections"
    iterations: int = 5  # Muon only: Newton-Schulz steps; with fewer, directions of small gradient move less

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZERS)
        fraction("optim.momentum", self.momentum, below_one=True)
        positive("optim.rest_lr_ratio", self.rest_lr_ratio)
        at_least("optim.rest_weight_decay", self.rest_weight_decay, 0)
        choice("optim.scale", self.scale, MUON_SCALES)
        choice("optim.split", self.split, MUON_SPLITS)
        at_least("optim.iterations", self.iterations, 1)
