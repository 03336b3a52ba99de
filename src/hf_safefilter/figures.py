"""Pictures as SVG files, equal byte for byte where they show the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import replacing


def draw_svgs(folder: Path, plots: Mapping[str, Callable[[Any], None]]) -> list[Path]:
    """Draw each picture, `NAME.svg`, and return their paths.

    Args:
        folder: where to write.
        plots: by name what draws on the given matplotlib axes.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib: run  pip install 'hf-safefilter[validate]', or pass --no-figures") from error
    paths = []
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        plot(figure.add_subplot())
        path = folder / f"{name}.svg"
        # No date, and names within the file that are not random.
        with replacing(path) as temporary, rc_context({"svg.hashsalt": name}):
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        paths.append(path)
    return paths


def plain(name: str) -> str:
    """A label: no mathtext from a column's name, nothing very long."""
    return name.replace("$", r"\$").replace("_", " ")[:60]
