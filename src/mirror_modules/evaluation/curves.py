"""Loss curves of a run, read from metrics.jsonl and drawn in panels."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mirror_modules.pictures.grids import as_data_url
from mirror_modules.training.log import BOOKKEEPING, read_log

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The report needs more packages: pip install 'mirror-modules[train]'") from error

# Legible on both a light and a dark page.
LINE_COLORS = ("#3f8f8a", "#d9783c", "#9068c4", "#c8508c", "#5b8bd6", "#94a03c")
AXIS_COLOR = "#858a92"
PHASE_TITLES = {
    "stem": "Text and image encoder",
    "stream": "Captioner",
    "first_stage": "First stage and its discriminator",
    "keypoints": "Key-point generator and its discriminator",
    "glam": "Generator and discriminators",
    "evaluator": "Evaluation encoders",
}


class LossPanel(NamedTuple):
    """Curves that share their axes."""

    title: str
    ylabel: str
    curves: dict[str, list[tuple[float, float]]]
    """For each curve, its points (step, value)."""


def read_losses(log: Path) -> list[LossPanel]:
    """Read the losses of metrics.jsonl: a panel per phase, and one more per loss that is logged for each stage.

    The losses of a stage are recognized by the resolution at the end of their names, such as `generator_64`. An
    incomplete last line, from a run that was killed, is ignored.

    Args:
        log: Path of the metrics.jsonl.

    Returns:
        The panels in the order of the log; empty if there is no file.

    Raises:
        ValueError: A line is not a logged step.
    """
    panels: dict[tuple[str, str], LossPanel] = {}
    for entry in read_log(log) if log.exists() else []:
        phase, step = entry["phase"], entry["step"]
        for name, value in entry.items():
            if name in BOOKKEEPING or "norm" in name or "learning_rate" in name or not isinstance(value, (int, float)):
                continue
            family, _, resolution = name.rpartition("_")
            if not resolution.isdigit():
                family, resolution = "", ""
            title, loss = PHASE_TITLES.get(phase, phase), family.replace("_", " ")
            panel = LossPanel(f"{title}: {loss}" if loss else title, loss or "loss", {})
            curves = panels.setdefault((phase, family), panel).curves
            curves.setdefault(f"{resolution} px" if resolution else name.replace("_", " "), []).append((step, value))
    return list(panels.values())


def draw_losses(panels: Sequence[LossPanel]) -> Figure:
    """Draw all panels into one figure with a white background."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axes, panel)
        axes.set_title(panel.title, fontsize=10)
    return figure


def as_svg(panel: LossPanel) -> str:
    """Draw one panel as an SVG data URL with a transparent background.

    Each panel is a separate image, because the element ids of two inline SVGs would collide.
    """
    figure, buffer = Figure(figsize=(4.6, 3.0), layout="constrained"), io.BytesIO()
    figure.patch.set_alpha(0)
    _draw_panel(figure.add_subplot(), panel)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return as_data_url("image/svg+xml", buffer.getvalue())


def _draw_panel(axes: Axes, panel: LossPanel) -> None:
    for i, (name, points) in enumerate(panel.curves.items()):
        axes.plot(*zip(*points), label=name, color=LINE_COLORS[i % len(LINE_COLORS)], linewidth=1.4)
    # Use a log axis if curves differ by over an order of magnitude; a curve that merely falls stays on a linear axis.
    values = [[value for _, value in points] for points in panel.curves.values()]
    medians = list(map(statistics.median, values))
    if min(map(min, values)) > 0 and max(medians) > 20 * min(medians):
        axes.set_yscale("log")
    axes.set_facecolor("none")
    axes.set_xlabel("step", color=AXIS_COLOR)
    axes.set_ylabel(panel.ylabel, color=AXIS_COLOR)
    axes.tick_params(colors=AXIS_COLOR, which="both", labelsize=8)
    axes.grid(color=AXIS_COLOR, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(AXIS_COLOR)
    axes.legend(frameon=False, fontsize=8, labelcolor=AXIS_COLOR)
