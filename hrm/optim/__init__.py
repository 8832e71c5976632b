"""The optimizers and the schedule of HRM (spec section 4)."""

from hrm.optim.adam_atan2 import AdamATan2
from hrm.optim.muon import Muon
from hrm.optim.schedule import learning_rate, set_lr
from hrm.optim.sign_sgd import SparseSignSGD

__all__ = ["AdamATan2", "Muon", "SparseSignSGD", "learning_rate", "set_lr"]
