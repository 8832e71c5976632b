"""Train, evaluate and study Hierarchical Reasoning Models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hrm.errors import UserError
from hrm.openmp import share_cores
from hrm.version import __version__

if TYPE_CHECKING:
    from hrm.api import evaluate, train
    from hrm.inference.model import TrainedModel, from_pretrained
    from hrm.inference.predictor import Predictions
    from hrm.models import build_model

__all__ = [
    "Predictions",
    "TrainedModel",
    "UserError",
    "__version__",
    "build_model",
    "evaluate",
    "from_pretrained",
    "train",
]

share_cores()

# Imported on first use: they need PyTorch, which the dataset builders do without.
_WHERE = {
    "Predictions": "hrm.inference.predictor",
    "TrainedModel": "hrm.inference.model",
    "build_model": "hrm.models",
    "evaluate": "hrm.api",
    "from_pretrained": "hrm.inference.model",
    "train": "hrm.api",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = globals()[name] = getattr(import_module(_WHERE[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
