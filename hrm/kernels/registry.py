"""The backends there are: every file of `backends/` and `experimental/`, by its name.

Files are listed without being imported, and imported when they are asked for. One whose packages are not installed is a
backend that cannot run, and nothing else suffers.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from hrm.errors import UserError
from hrm.kernels import naive
from hrm.kernels.backend import Backend

BACKENDS = "hrm.kernels.backends"
EXPERIMENTAL = "hrm.kernels.experimental"


def backend_names(*packages: str) -> list[str]:
    """The names that `kernels.backend=` takes beside `auto`, or those of one of the two packages."""
    return sorted(name for package in packages or (BACKENDS, EXPERIMENTAL) for name in _names(package))


def load_backend(name: str) -> Backend:
    """What the backend of that name, one of `backend_names()`, says of itself."""
    package = BACKENDS if name in _names(BACKENDS) else EXPERIMENTAL
    return _load(f"{package}.{name}")


def _names(package: str) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]


@functools.cache
def _load(module: str) -> Backend:
    try:
        backend = getattr(importlib.import_module(module), "BACKEND", None)
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "hrm":
            raise
        missing = isinstance(error, ModuleNotFoundError)
        reason = f"{package} is not installed" if missing else f"it cannot be imported: {error}"
        return Backend(naive.reasoning_module, naive.first_token_block, why_not=lambda request: reason)
    if not isinstance(backend, Backend):
        raise UserError(f"{module} says nothing of itself: give it a BACKEND, see docs/add-a-backend.md.")
    return backend
