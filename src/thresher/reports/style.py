"""The look of every figure: one palette, one frame. Figures need matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.rows import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000")  # Okabe and Ito's palette
MARKERS = "osD^vP*X"
LIGHT, MIDDLE, DARK = "#B8B8B8", "#6E6E6E", "#303030"
GREYS = {"dense-padded": LIGHT, "dense-unpadded": MIDDLE}  # a dense model is grey
DENSE: dict[str, Any] = {"color": MIDDLE, "linestyle": "--", "linewidth": 1, "zorder": 1}  # the line of its quality
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.08,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "figure.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "thresher",  # the same figure is the same file
    "svg.fonttype": "none",
}


def require_matplotlib() -> None:
    """Raise ValueError where matplotlib is missing: before an hour of work, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the figure needs matplotlib: pip install 'thresher-pruning[plot]'") from None


@contextmanager
def drawing(path: str | Path, width: float, height: float, title: str | None = None) -> Iterator[Figure]:
    """Give a figure of so many inches, and save it at the end as the suffix of ``path`` says (png or svg).

    Raises:
        ValueError: matplotlib is missing.
        OSError: the file cannot be written; an older one is then what it was.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure, kind = Figure(figsize=(width, height), dpi=150, layout="constrained"), Path(path).suffix[1:]
        if title:
            figure.suptitle(title)
        yield figure
        with whole(path) as temporary:
            figure.savefig(temporary, format=kind or "png", metadata={"Date": None} if kind == "svg" else None)


def legend_below(figure: Any, columns: int = 6) -> None:
    """Put one legend of all panels below them; what has one label stands there once."""
    known: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=min(columns, len(known)))


def shades(count: int) -> Any:
    """So many colours in an order, from dark to light."""
    from matplotlib import colormaps

    return colormaps["viridis"]([0.9 * i / max(1, count - 1) for i in range(count)])
