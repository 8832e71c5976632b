"""The optimizers and the schedule of HRM (spec section 4)."""

from hrm.optim.adam import Adam
from hrm.optim.adam_atan2 import AdamATan2
from hrm.optim.adamw import FusedAdamW
from hrm.optim.muon import Muon
from hrm.optim.schedule import learning_rate, set_lr
from hrm.optim.sign_sgd import SparseSignSGD

__all__ = ["Adam", "AdamATan2", "FusedAdamW", "Muon", "SparseSignSGD", "learning_rate", "set_lr"]
