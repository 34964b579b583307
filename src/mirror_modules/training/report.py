"""The report of a run: one page that fetches nothing, and its pictures as files of their own."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirror_modules.data.transforms import image_pyramid, to_bytes, to_float
from mirror_modules.glam import GeneratedImages
from mirror_modules.models import MirrorGAN
from mirror_modules.models.pretrained import read_json, write_whole
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.log import BOOKKEEPING
from mirror_modules.training.pictures import Picture, captioned_grid, grid, heat_overlay, same_size, write_png
from mirror_modules.training.recipes import Recipe

try:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise ImportError("The report needs more packages: pip install 'mirror-modules[train]'") from error

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# Each attention map is a picture of its own, so a few captions and a moderate size must do.
ATTENTION_CAPTIONS, ATTENTION_RESOLUTION = 4, 128
STAGE_COLUMNS = 8
# Tiles of the overviews are enlarged up to these pixels.
TILE, ATTENTION_TILE = 192, 128
PHASES = {
    "stem": "Text and image encoder",
    "stream": "Captioner",
    "glam": "Generator and discriminators",
    "judge": "Judge of the evaluation",
}
# Figures that have a place of their own on the page.
SHOWN = (
    "r_precision",
    "word_accuracy",
    "image_information",
    "redescription",
    "attributes",
    "features",
    "seconds",
    "images_per_second",
    "waited_for_data",
)
FIGURES = {
    "frechet_distance": "Fréchet distance (FID)",
    "kernel_distance": "Kernel distance (KID)",
    "inception_score": "Inception Score",
    "diversity": "Diversity of one caption's images",
}
SOURCES = {"generated": "Generated", "real": "Real images", "shuffled": "Shuffled"}
# Legible on a light and on a dark page alike.
LINE_COLORS = ("#3f8f8a", "#d9783c", "#9068c4", "#c8508c", "#5b8bd6", "#94a03c")
AXIS_COLOR = "#858a92"


class Case(NamedTuple):
    """A caption whose image the judge finds it by, or does not."""

    caption: str
    generated: Tensor
    """In [-1, 1]. (3, R, R)"""
    real: Tensor
    """The image that belongs to the caption."""
    chance: float
    """The probability that the generated image ranks its caption first."""


class Showcase(NamedTuple):
    """What the report shows of N validation captions."""

    captions: list[str]
    """As they were written."""
    words: list[list[str]]
    """As they were read: cut at the model's `max_words`, unknown ones as "<unknown>"."""
    real: Tensor
    """The images that belong to the captions, in [-1, 1]. (N, 3, R, R)"""
    generated: GeneratedImages
    """The images generated from the captions, with attention maps if there are any."""
    real_descriptions: list[str]
    """The captioner's words for the real images."""
    generated_descriptions: list[str]
    """The captioner's words for the finest generated images."""
    cases: Mapping[str, Sequence[Case]] = {}
    """The "best" and the "worst" of all validation captions, for R-precision."""


def write_report(folder: RunFolder, recipe: Recipe, showcase: Showcase, metrics: dict[str, Any]) -> Path:
    """Write the pictures of a run and then its page.

    Args:
        folder: The run; its metrics.jsonl and config.json are read.
        recipe: What was trained.
        showcase: What to show.
        metrics: The content of evaluation.json. Of its keys only `r_precision` is required; all are shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: The showcase has not one entry for each caption, or metrics.jsonl is damaged.
    """
    _check_showcase(showcase)
    # Images come from where they were generated.
    showcase = showcase._replace(
        real=showcase.real.cpu(), generated=GeneratedImages(*([t.cpu() for t in part] for part in showcase.generated))
    )
    attention, panels = attention_maps(showcase), read_losses(folder.log)
    write_pictures(folder.pictures, showcase, attention, panels)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=recipe,
        metrics=metrics,
        sources=[(name, title) for name, title in SOURCES.items() if name in metrics["r_precision"]],
        scores=score_rows(metrics),
        phases=phase_rows(recipe, metrics),
        attributes=attribute_rows(metrics),
        features=feature_rows(metrics),
        cases=_cases(showcase),
        other=flatten(metrics, without=SHOWN),
        gallery=_gallery(showcase),
        mirror=_mirror(showcase),
        attention=[
            {"caption": entry.caption, "image": _embedded(entry.image), "maps": list(map(_embedded_map, entry.maps))}
            for entry in attention
        ],
        curves=[(panel.title, _svg(panel)) for panel in panels],
        configuration=flatten(recipe.to_dict()),
        versions=flatten(read_json(folder.config).get("versions", {})),
    )
    write_whole(folder.report, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return folder.report


class AttentionMap(NamedTuple):
    """Where the generator looked at one word, or at the sentence."""

    name: str
    note: str
    picture: Picture


class CaptionAttention(NamedTuple):
    """All maps of one caption, beside the image that they belong to."""

    caption: str
    image: Picture
    maps: list[AttentionMap]


def attention_maps(showcase: Showcase) -> list[CaptionAttention]:
    """Overlays of the finest stage's attention for the first captions; none if the model has no attention.

    A word's map shows its share among the words at each position, from 0 to the largest. Over channels, the sentence's
    shares sum to 1 at each position; its map shows the largest of them, from where it is least to where it is most.
    """
    generated, shown = showcase.generated, []
    finest = generated.images[-1][:ATTENTION_CAPTIONS]
    if not generated.word_weights:
        return []
    images = image_pyramid(finest, [min(finest.shape[2], ATTENTION_RESOLUTION)])[0]
    for i, image in enumerate(images):
        maps = []
        for word, weights in zip(showcase.words[i], generated.word_weights[-1][i]):
            maps.append(AttentionMap(word, f"{weights.max():.0%}", heat_overlay(image, weights)))
        if generated.sentence_weights:
            strength = generated.sentence_weights[-1][i].amax(dim=0)
            least, most = float(strength.min()), float(strength.max())
            overlay = heat_overlay(image, strength - least)
            maps.append(AttentionMap("sentence", f"{least:.0%} to {most:.0%}", overlay))
        shown.append(CaptionAttention(showcase.captions[i], to_bytes(image.unsqueeze(0))[0].numpy(), maps))
    return shown


def attention_sheet(model: MirrorGAN, captions: Sequence[str], generated: GeneratedImages) -> Picture | None:
    """The attention maps of the first captions as one picture; None if the model has no attention."""
    tokens, word_mask = model.vocabulary.encode(captions, max_words=model.config.max_words, warn_unknown=False)
    words = [[model.vocabulary.words[t] for t in row[mask].tolist()] for row, mask in zip(tokens, word_mask)]
    nothing = [""] * len(captions)
    showcase = Showcase(list(captions), words, generated.images[-1], generated, nothing, nothing)
    maps = attention_maps(showcase)
    return _attention_picture(maps) if maps else None


def write_pictures(
    folder: Path, showcase: Showcase, attention: Sequence[CaptionAttention], panels: Sequence[LossPanel]
) -> None:
    """Write all pictures as PNG: overviews, and each generated image by itself at its own size."""
    folder.mkdir(parents=True, exist_ok=True)
    stages, finest = same_size(showcase.generated.images), showcase.generated.images[-1]
    scale = max(1, TILE // finest.shape[2])
    write_png(captioned_grid(finest, showcase.captions, columns=6, scale=scale), folder / "generated.png")
    few = stages[:, :STAGE_COLUMNS]
    write_png(grid(few.flatten(0, 1), columns=few.shape[1], scale=scale, gap=4), folder / "stages.png")
    pairs = same_size([showcase.real, finest]).transpose(0, 1).flatten(0, 1)
    described = zip(showcase.captions, showcase.real_descriptions, showcase.generated_descriptions)
    labels = [
        label
        for caption, real, made in described
        for label in (f"Real image of: {caption}\nRead as: {real}", f"Generated from it\nRead as: {made}")
    ]
    write_png(captioned_grid(pairs, labels, columns=6, scale=scale), folder / "mirror.png")
    if attention:
        write_png(_attention_picture(attention), folder / "attention.png")
    if panels:
        figure = draw_losses(panels)
        write_whole(folder / "losses.png", lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    for i, image in enumerate(finest):
        write_png(to_bytes(image.unsqueeze(0))[0].numpy(), folder / f"image-{i:03}.png")


def _attention_picture(attention: Sequence[CaptionAttention]) -> Picture:
    """One row for each caption, its maps after its image, filled up with white."""
    columns = 1 + max(len(entry.maps) for entry in attention)
    pictures, labels = [], []
    for entry in attention:
        blanks = columns - 1 - len(entry.maps)
        tiles = [entry.image, *(each.picture for each in entry.maps)] + [entry.image * 0 + 255] * blanks
        pictures += [torch.from_numpy(tile) for tile in tiles]
        labels += ["generated", *(each.name for each in entry.maps)] + [""] * blanks
    scale = max(1, ATTENTION_TILE // pictures[0].shape[0])
    return captioned_grid(to_float(torch.stack(pictures)), labels, columns, scale)


def _gallery(showcase: Showcase) -> list[dict[str, Any]]:
    stages = [to_bytes(batch).numpy() for batch in showcase.generated.images]
    return [
        {"caption": caption, "stages": [(len(batch[i]), _embedded(batch[i])) for batch in stages]}
        for i, caption in enumerate(showcase.captions)
    ]


def _cases(showcase: Showcase) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (
            name,
            [
                {
                    "caption": case.caption,
                    "chance": case.chance,
                    "sides": [
                        (side, _embedded(to_bytes(image.unsqueeze(0))[0].cpu().numpy()))
                        for side, image in (("Generated", case.generated), ("Real", case.real))
                    ],
                }
                for case in cases
            ],
        )
        for name, cases in showcase.cases.items()
        if cases
    ]


def _mirror(showcase: Showcase) -> list[dict[str, Any]]:
    sides = (
        ("Real", to_bytes(showcase.real).numpy(), showcase.real_descriptions),
        ("Generated", to_bytes(showcase.generated.images[-1]).numpy(), showcase.generated_descriptions),
    )
    return [
        {
            "caption": caption,
            "sides": [
                (name, _embedded(images[i]), mark_words(descriptions[i], caption))
                for name, images, descriptions in sides
            ],
        }
        for i, caption in enumerate(showcase.captions)
    ]


def mark_words(description: str, caption: str) -> list[tuple[str, bool]]:
    """The words of a description, each with whether it also occurs in the caption."""
    known = set(split_words(caption))
    return [(word, word in known) for word in description.split()]


def _embedded(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return _data_url("image/png", buffer.getvalue())


def _embedded_map(attention: AttentionMap) -> tuple[str, str, str]:
    return attention.name, attention.note, _embedded(attention.picture)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _check_showcase(showcase: Showcase) -> None:
    counts = {
        "words": len(showcase.words),
        "real": len(showcase.real),
        "real_descriptions": len(showcase.real_descriptions),
        "generated_descriptions": len(showcase.generated_descriptions),
        **{f"generated.images[{i}]": len(batch) for i, batch in enumerate(showcase.generated.images)},
    }
    for name, count in counts.items():
        if count != len(showcase.captions):
            raise ValueError(
                f"write_report: {name} has {count} entries for {len(showcase.captions)} captions; give one for each."
            )


class Score(NamedTuple):
    """A row of the table of results; shares in [0, 1]."""

    name: str
    values: list[float | None]
    """One for each source that R-precision was measured of; None where there is none."""
    errors: list[float | None]
    """Standard errors of the values, where known."""
    chance: float | None


def score_rows(metrics: dict[str, Any]) -> list[Score]:
    """R-precision for each k, then word accuracy."""
    sources = [metrics["r_precision"][name] for name in SOURCES if name in metrics["r_precision"]]
    rows = []
    for k in (1, 2, 3):
        errors = [source.get("standard_errors", [None] * 3)[k - 1] for source in sources]
        chance = k * metrics["chance"] if "chance" in metrics else None
        rows.append(Score(f"R-precision, top {k}", [source.get(f"top{k}") for source in sources], errors, chance))
    if "word_accuracy" in metrics:
        accuracy = [metrics["word_accuracy"].get(name) for name in SOURCES if name in metrics["r_precision"]]
        rows.append(Score("Word accuracy", accuracy, [None] * len(sources), None))
    if "redescription" in metrics:
        told = [metrics["redescription"].get(name, {}) for name in SOURCES if name in metrics["r_precision"]]
        for figure, title in (("bleu4", "BLEU-4"), ("chrf", "chrF"), ("words_in_place", "Words in place")):
            rows.append(Score(title, [each.get(figure) for each in told], [None] * len(sources), None))
    return [row for row in rows if any(value is not None for value in row.values)]


def attribute_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """For each attribute of synthetic flowers: who read it, and how often images have the value that was named."""
    measured = metrics.get("attributes", {})
    sources = [name for name in SOURCES if name in measured]
    readers = {"judge": "judge", "measured_colors": "measured"}
    return [
        [name.replace("_", " "), title, *(_share(measured[source].get(reader, {}).get(name)) for source in sources)]
        for reader, title in readers.items()
        for name in measured.get("generated", {}).get(reader, {})
    ]


def feature_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Figures of the extractor's features, of generated images and of real ones."""
    measured = metrics.get("features", {})
    return [
        [title, *(_with_error(measured[source], figure) for source in ("generated", "real") if source in measured)]
        for figure, title in FIGURES.items()
        if figure in measured.get("generated", {})
    ]


def _with_error(figures: dict[str, float], name: str) -> str:
    value, error = figures.get(name), figures.get(f"{name}_standard_error")
    return show(value) if error is None else f"{show(value)} ± {show(error)}"


def _share(figure: dict[str, float] | None) -> str:
    return show(None) if figure is None else f"{figure['share']:.1%} ± {100 * figure['standard_error']:.1f}"


def phase_rows(recipe: Recipe, metrics: dict[str, Any]) -> list[list[str]]:
    """Name, meaning, steps, seconds, images per second and share of waiting of each phase that was timed."""
    seconds, speed = metrics.get("seconds", {}), metrics.get("images_per_second", {})
    waited = metrics.get("waited_for_data", {})
    return [
        [
            name,
            PHASES.get(name, ""),
            show(getattr(getattr(recipe, name, None), "steps", None)),
            f"{seconds[name]:,.1f}" if name in seconds else show(None),
            f"{speed[name]:,.1f}" if name in speed else show(None),
            f"{waited[name]:.1%}" if name in waited else show(None),
        ]
        for name in {**seconds, **speed}
    ]


def flatten(fields: dict[str, Any], without: Sequence[str] = (), prefix: str = "") -> list[tuple[str, str]]:
    """Nested fields as dotted names with their values as text."""
    rows: list[tuple[str, str]] = []
    for name, value in fields.items():
        if name in without:
            continue
        rows += flatten(value, prefix=f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, show(value))]
    return rows


def show(value: Any) -> str:
    """A value as people write it."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


class LossPanel(NamedTuple):
    """Curves that share an axis."""

    title: str
    ylabel: str
    curves: dict[str, list[tuple[float, float]]]
    """Points (step, value) by the name of the curve."""


def read_losses(log: Path) -> list[LossPanel]:
    """The losses of metrics.jsonl: a panel for each phase, and one more for each loss that every stage has.

    The losses of the stages are recognized by the resolution at the end of their names, such as `generator_64`.

    Raises:
        ValueError: A line is not a JSON object with `phase` and `step`.
    """
    panels: dict[tuple[str, str], LossPanel] = {}
    for number, line in enumerate(log.read_text(encoding="utf-8").splitlines() if log.exists() else [], start=1):
        try:
            entry = json.loads(line)
            phase, step = entry["phase"], entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{log} is damaged: line {number} is not a logged step ({error!r}).") from error
        for name, value in entry.items():
            if name in BOOKKEEPING or "norm" in name or "learning_rate" in name or not isinstance(value, (int, float)):
                continue
            family, _, resolution = name.rpartition("_")
            if not resolution.isdigit():
                family, resolution = "", ""
            title, what = PHASES.get(phase, phase), family.replace("_", " ")
            panel = LossPanel(f"{title}: {what}" if what else title, what or "loss", {})
            curves = panels.setdefault((phase, family), panel).curves
            curves.setdefault(f"{resolution} px" if resolution else name.replace("_", " "), []).append((step, value))
    return list(panels.values())


def draw_losses(panels: Sequence[LossPanel]) -> Figure:
    """All panels in one figure on white."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axes, panel)
        axes.set_title(panel.title, fontsize=10)
    return figure


def _svg(panel: LossPanel) -> str:
    """One panel without background, as an image of its own: two inline drawings would share ids."""
    figure, buffer = Figure(figsize=(4.6, 3.0), layout="constrained"), io.BytesIO()
    figure.patch.set_alpha(0)
    _draw_panel(figure.add_subplot(), panel)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_url("image/svg+xml", buffer.getvalue())


def _draw_panel(axes: Axes, panel: LossPanel) -> None:
    for i, (name, points) in enumerate(panel.curves.items()):
        axes.plot(*zip(*points), label=name, color=LINE_COLORS[i % len(LINE_COLORS)], linewidth=1.4)
    # Losses of one phase can differ a hundredfold; a curve that merely falls stays on a linear axis.
    everything = [[value for _, value in points] for points in panel.curves.values()]
    middles = list(map(statistics.median, everything))
    if min(map(min, everything)) > 0 and max(middles) > 20 * min(middles):
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
