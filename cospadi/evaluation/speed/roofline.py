"""A plot of time against the number of tokens, with the time of reading the weights as the floor."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cospadi.errors import UnavailableError, UsageError
from cospadi.evaluation.speed.contenders import BASELINES, DENSE
from cospadi.evaluation.speed.layer_figures import LayerFigures, LayerRow

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which colour-blind readers can distinguish."""
_COLUMNS = 3


def require_matplotlib() -> None:
    """Check that plots can be drawn, before anything is measured.

    Raises
    ------
    UnavailableError
        matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UnavailableError("a plot needs matplotlib: pip install matplotlib")


def plot_layers(figures: LayerFigures, path: str | Path) -> None:
    """Draw one panel per layer: microseconds of a call over the number of tokens, both logarithmic.

    Dashed lines are the time in which the machine reads the bytes of the dense weight and of the compressed one: no
    kernel that reads its weights can be below its line.

    Parameters
    ----------
    figures : LayerFigures
        If calls were replayed from CUDA graphs, these are shown, else eager ones.
    path : Path
        The file; its ending names the format.

    Raises
    ------
    UnavailableError
        matplotlib is not installed.
    UsageError
        The file cannot be written, or matplotlib does not know its ending.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = figures.rows
    mode = "graph" if any(row.mode == "graph" for row in rows) else "eager"
    rows = [row for row in rows if row.mode == mode]
    panels = list(dict.fromkeys((row.layer, row.dtype) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    colours = dict(zip([name for name in names if name not in BASELINES], _COLOURS * len(names), strict=False))
    columns = min(_COLUMNS, len(panels))
    n_lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * n_lines + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_lines, columns, squeeze=False).flatten()
    for axis, (layer, dtype) in zip(axes, panels, strict=False):
        shown = [row for row in rows if (row.layer, row.dtype) == (layer, dtype)]
        _panel(axis, shown, names, colours, figures.rates.bandwidth)
        axis.set_title(f"{layer}, {dtype}", fontsize=10)
    for axis in axes[len(panels) :]:
        axis.remove()
    axes[0].set_ylabel("microseconds per call")
    handles = {line.get_label(): line for axis in axes[: len(panels)] for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(f"Time of one linear layer, {mode} calls, weights not in cache", fontsize=11)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"the plot {path} cannot be written: {' '.join(str(error).split())}") from error


def _panel(axis: Any, rows: Sequence[LayerRow], names: Sequence[str], colours: dict[str, str], rate: float) -> None:
    """Draw the contenders and the two floors of one layer."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    tokens = sorted({row.n_tokens for row in rows})
    # For a single number of tokens the line of a floor still needs a width.
    span = [tokens[0], tokens[-1]] if len(tokens) > 1 else [tokens[0] / 2, tokens[0] * 2]
    compressed = next((row.stored_bytes for row in rows if row.contender not in BASELINES), None)
    dense = next((row.stored_bytes for row in rows if row.contender == DENSE), None)
    for what, n_bytes, colour in (("dense", dense, "0.35"), ("compressed", compressed, "0.65")):
        if n_bytes is not None:
            floor = n_bytes / rate * 1e6
            axis.plot(span, [floor, floor], "--", color=colour, linewidth=1.2, label=f"{what} bytes / bandwidth")
    for name in names:
        mine = sorted((row for row in rows if row.contender == name), key=lambda row: row.n_tokens)
        if not mine:
            continue
        x = [row.n_tokens for row in mine]
        style = {"color": colours.get(name, "black"), "label": name, "linewidth": 1.6, "marker": "o", "markersize": 4}
        if name in BASELINES and name != DENSE:
            style |= {"color": "0.5", "marker": "s"}
        axis.plot(x, [row.microseconds for row in mine], **style)
        axis.fill_between(
            x, [row.low for row in mine], [row.high for row in mine], color=style["color"], alpha=0.2, linewidth=0
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(n) for n in tokens])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.grid(alpha=0.3, linewidth=0.5)
