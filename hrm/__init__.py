"""Train, evaluate and study Hierarchical Reasoning Models."""

from hrm.errors import UserError
from hrm.models import build_model

__all__ = ["UserError", "build_model"]
__version__ = "0.1.0"
