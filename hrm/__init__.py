"""Train, evaluate and study Hierarchical Reasoning Models."""

from typing import TYPE_CHECKING, Any

from hrm.errors import UserError
from hrm.version import __version__

if TYPE_CHECKING:
    from hrm.models import build_model

__all__ = ["UserError", "__version__", "build_model"]


def __getattr__(name: str) -> Any:
    if name == "build_model":  # on first use: it needs PyTorch, which the dataset builders do without
        from hrm.models import build_model

        return build_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
