"""Pictures by matplotlib, for files and notebooks. pyplot, which may be the user's, is left alone."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from hrm.config.paths import install_hint
from hrm.errors import UserError
from hrm.writing import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#9AA0A6")
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""

_DPI = 150
_COLORS = 160  # of a picture in a report or a notebook


def require_matplotlib() -> None:
    """UserError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"Pictures need matplotlib: {install_hint('report')}, or ask for none.") from error


@cache
def _picture() -> type[Figure]:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows, whatever it has set up."""

        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture


def new_picture(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], sharey: bool = False
) -> tuple[Figure, NDArray[Any]]:
    """A figure of `size`, in inches, and its axes [rows, columns], with `sharey` of one y axis.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _picture()(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def save_picture(figure: Figure, file: Path) -> None:
    """Write a figure into a file of the kind that its name ends with.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib import rc_context

    with new_file(file), rc_context({"svg.fonttype": "none"}):  # text as text
        figure.savefig(file, dpi=_DPI)


def png(figure: Figure) -> bytes:
    """A figure as a PNG of few colours, which takes a third of the bytes."""
    from PIL import Image  # matplotlib needs it too

    whole, content = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=_DPI)
    # The most different colours, not the most frequent: a few marks keep theirs.
    few = Image.open(whole).convert("RGB").quantize(_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(content, "png", optimize=True)
    return content.getvalue()
