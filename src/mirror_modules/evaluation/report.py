"""HTML report of a run: a self-contained page, and the same pictures as separate files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mirror_modules._files import read_json, write_text, write_whole
from mirror_modules.data.transforms import to_bytes
from mirror_modules.evaluation.curves import PHASE_TITLES, LossPanel, as_svg, draw_losses, read_losses
from mirror_modules.glam import GeneratedImages
from mirror_modules.pictures.attention import AttentionMap, CaptionAttention, attention_maps, draw_attention
from mirror_modules.pictures.grids import Picture, as_data_url, captioned_grid, grid, same_size, write_png
from mirror_modules.stem.vocabulary import split_words
from mirror_modules.training.folder import RunFolder
from mirror_modules.training.recipes import Recipe

try:
    import jinja2
    from PIL import Image
except ImportError as error:
    raise ImportError("The report needs more packages: pip install 'mirror-modules[train]'") from error

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STAGE_COLUMNS = 8
# Images in the overviews are enlarged up to this many pixels.
TILE = 192
# Metrics with a place of their own on the page; all others are listed under "Further metrics".
SHOWN = (
    "r_precision",
    "chance",
    "candidates",
    "cannot_rank",
    "reasons",
    "evaluators",
    "extractor",
    "further_extractors",
    "word_accuracy",
    "image_information",
    "redescription",
    "attributes",
    "features",
    "seconds",
    "images_per_second",
    "waited_for_data",
)
FEATURE_METRICS = {
    "frechet_distance": "Fréchet distance (FID)",
    "kernel_distance": "Kernel distance (KID)",
    "inception_score": "Inception Score",
    "diversity": "Diversity of images of the same caption",
}
# The field of evaluation.json that holds the error of a metric.
FEATURE_ERRORS = {
    "kernel_distance": "kernel_distance_standard_error",
    "inception_score": "inception_score_deviation",
    "diversity": "diversity_standard_error",
}
SOURCES = {"generated": "Generated", "real": "Real images", "shuffled": "Shuffled"}
SPLIT_TITLES = {"validation": "Validation", "held_out": "Held-out images of training classes"}
CANDIDATE_TITLES = {"all_captions": "all captions", "other_classes": "other classes only"}


class Case(NamedTuple):
    """A caption and its images, as an example of successful or failed retrieval."""

    caption: str
    generated: Tensor
    """In [-1, 1]. (3, R, R)"""
    real: Tensor
    """The real image of the caption, in [-1, 1]. (3, R, R)"""
    precision: float
    """Probability, over draws of candidates, that the generated image ranks its own caption first."""


class Showcase(NamedTuple):
    """The examples in a report: N validation captions with their images and descriptions."""

    captions: list[str]
    """The captions as written."""
    words: list[list[str]]
    """The tokens of each caption as words: truncated at the model's `max_words`, unknown words as "<unknown>"."""
    real: Tensor
    """The real images of the captions, in [-1, 1]. (N, 3, R, R)"""
    generated: GeneratedImages
    """The images generated from the captions, with attention weights if the model has attention."""
    real_descriptions: list[str]
    """The captioner's descriptions of the real images."""
    generated_descriptions: list[str]
    """The captioner's descriptions of the finest generated images."""
    cases: Mapping[str, Sequence[Case]] = {}
    """The "best" and the "worst" validation captions by R-precision."""


def write_report(folder: RunFolder, recipe: Recipe, showcase: Showcase, metrics: dict[str, Any]) -> Path:
    """Write the pictures of a run, then its HTML report.

    Args:
        folder: The run; its metrics.jsonl and config.json are read.
        recipe: The recipe of the run.
        showcase: The examples to show.
        metrics: The content of evaluation.json. Only its key `r_precision` is required; all keys are shown.

    Returns:
        The path of the report.

    Raises:
        ValueError: The showcase has no captions, or a field does not have one entry per caption; the metrics have
            another form than evaluation.json; or a file of the run is damaged.
        FileNotFoundError: The folder holds no config.json.

    Examples:
        >>> from mirror_modules.evaluation import write_report
        >>> from mirror_modules.training import RunFolder
        >>> folder = RunFolder("runs/demo")
        >>> write_report(folder, folder.read_recipe(), showcase, metrics)  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    if not isinstance(metrics, dict) or not isinstance(metrics.get("r_precision"), dict):
        raise ValueError("write_report: metrics lack 'r_precision'; pass the content of evaluation.json.")
    _check_showcase(showcase)
    # Raises if config.json is damaged.
    folder.read_recipe()
    # The images may be on a GPU.
    showcase = showcase._replace(
        real=showcase.real.cpu(), generated=GeneratedImages(*([t.cpu() for t in part] for part in showcase.generated))
    )
    panels = read_losses(folder.log)
    attention = attention_maps(showcase.captions, showcase.words, showcase.generated)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = {
        "cases": _cases(showcase),
        "gallery": _gallery(showcase),
        "mirror": _mirror(showcase),
        "attention": [
            {"caption": entry.caption, "image": _embedded(entry.image), "maps": list(map(_embedded_map, entry.maps))}
            for entry in attention
        ],
        "curves": [(panel.title, as_svg(panel)) for panel in panels],
    }
    try:
        page = template.render(
            recipe=recipe,
            metrics=metrics,
            sources=[(name, title) for name, title in SOURCES.items() if name in metrics["r_precision"]],
            scores=score_rows(metrics),
            phases=phase_rows(recipe, metrics),
            attributes=attribute_rows(metrics),
            evaluators=evaluator_tables(metrics),
            features=feature_tables(metrics),
            other=[(title_of(name), value) for name, value in flatten(metrics, without=SHOWN)],
            configuration=flatten(recipe.to_dict()),
            versions=flatten(read_json(folder.config).get("versions", {})),
            **pictures,
        )
    except (AttributeError, LookupError, TypeError, jinja2.UndefinedError) as error:
        raise ValueError(f"write_report: metrics have another form than evaluation.json: {error}.") from error
    write_pictures(folder.pictures, showcase, attention, panels)
    write_text(folder.report, page)
    return folder.report


def write_pictures(
    folder: Path, showcase: Showcase, attention: Sequence[CaptionAttention], panels: Sequence[LossPanel]
) -> None:
    """Write all pictures as PNG files: overviews, and each generated image separately at its original size."""
    folder.mkdir(parents=True, exist_ok=True)
    stages, finest = same_size(showcase.generated.images), showcase.generated.images[-1]
    scale = max(1, TILE // finest.shape[2])
    write_png(captioned_grid(finest, showcase.captions, columns=6, scale=scale), folder / "generated.png")
    shown = stages[:, :STAGE_COLUMNS]
    write_png(grid(shown.flatten(0, 1), columns=shown.shape[1], scale=scale, gap=4), folder / "stages.png")
    pairs = same_size([showcase.real, finest]).transpose(0, 1).flatten(0, 1)
    descriptions = zip(showcase.captions, showcase.real_descriptions, showcase.generated_descriptions)
    labels = [
        label
        for caption, real, generated in descriptions
        for label in (
            f"Real image of: {caption}\nDescribed as: {real}",
            f"Generated from the caption\nDescribed as: {generated}",
        )
    ]
    write_png(captioned_grid(pairs, labels, columns=6, scale=scale), folder / "mirror.png")
    if attention:
        write_png(draw_attention(attention), folder / "attention.png")
    if panels:
        figure = draw_losses(panels)
        write_whole(folder / "losses.png", lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    for i, image in enumerate(finest):
        write_png(to_bytes(image.unsqueeze(0))[0].numpy(), folder / f"image-{i:03}.png")


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
                    "precision": case.precision,
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
    """Split a description into words, each with a flag whether it also occurs in the caption."""
    caption_words = set(split_words(caption))
    return [(word, word in caption_words) for word in description.split()]


def _embedded(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return as_data_url("image/png", buffer.getvalue())


def _embedded_map(attention: AttentionMap) -> tuple[str, str, str]:
    return attention.name, attention.note, _embedded(attention.picture)


def _check_showcase(showcase: Showcase) -> None:
    if not showcase.captions or not showcase.generated.images:
        raise ValueError("write_report: the showcase has no captions or no generated images; give at least one.")
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
    """A row of the results table; values in [0, 1]."""

    name: str
    values: list[float | None]
    """One value per source of images that has an R-precision; None if it was not measured."""
    errors: list[float | None]
    """Standard errors of the values; None if unknown."""
    chance: float | None
    """Expected value of a random ranking; None if the metric has none."""


def score_rows(metrics: dict[str, Any]) -> list[Score]:
    """Rows of the results table: R-precision for each k, word accuracy, redescription quality, overlap with boxes."""
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
        quality = [metrics["redescription"].get(name, {}) for name in SOURCES if name in metrics["r_precision"]]
        for metric, title in (("bleu4", "BLEU-4"), ("chrf", "chrF"), ("words_in_place", "Words in place")):
            rows.append(Score(title, [each.get(metric) for each in quality], [None] * len(sources), None))
    if "box_overlap" in metrics:
        overlaps = [metrics["box_overlap"].get(name, {}) for name in SOURCES if name in metrics["r_precision"]]
        means, errors = ([each.get(name) for each in overlaps] for name in ("mean", "standard_error"))
        rows.append(Score("Overlap with the box", means, errors, None))
    return [row for row in rows if any(value is not None for value in row.values)]


class EvaluatorTable(NamedTuple):
    """Top-1 R-precision by one evaluator."""

    title: str
    """The phase that trained it, in words, or "CLIP"."""
    description: str
    """The evaluator and what it was trained on."""
    rows: list[tuple[list[str], str]]
    """For each split and set of candidates, and for the CLIPScore of each split, its cells, and the reasons for which
    it cannot rank images; empty if it can."""


def evaluator_tables(metrics: dict[str, Any]) -> list[EvaluatorTable]:
    """A table for each evaluator: split, candidates, the sources of images, other captions, class alone, chance."""
    tables = []
    for phase, result in metrics.get("evaluators", {}).items():
        rows: list[tuple[list[str], str]] = []
        for split, candidates in ((split, each) for split in SPLIT_TITLES for each in CANDIDATE_TITLES):
            figures = result.get(split, {}).get(candidates)
            if figures is None:
                continue
            images = f"{SPLIT_TITLES[split]}, {result[split]['images']:,} images"
            cells = [
                images,
                f"{figures['candidates']} of {CANDIDATE_TITLES[candidates]}",
                *(_top1(figures.get(source)) for source in (*SOURCES, "text_ceiling")),
                show(None) if figures.get("class_oracle") is None else f"{figures['class_oracle']:.1%}",
                f"{figures['chance']:.1%}",
            ]
            rows.append((cells, "; ".join(figures["reasons"]) if figures["cannot_rank"] else ""))
            if candidates == "all_captions" and "own_class" in result[split]:
                within = result[split]["own_class"]
                shares = [_own_class(within.get(source)) for source in (*SOURCES, "text_ceiling")]
                rows.append(([images, "2 of its own class", *shares, "50.0%", "50.0%"], ""))
            if candidates == "all_captions" and "clip_score" in result[split]:
                scores = [_clip_score(result[split]["clip_score"].get(source)) for source in SOURCES]
                rows.append(([images, "CLIPScore", *scores, *[show(None)] * 3], ""))
        title = "CLIP" if phase == "clip" else title_of(phase)
        tables.append(EvaluatorTable(title, result["description"], rows))
    return tables


def _clip_score(score: dict[str, float] | None) -> str:
    return show(None) if score is None else _plus_minus(f"{score['mean']:.2f}", f"{score['standard_error']:.2f}")


def _own_class(share: dict[str, float] | None) -> str:
    if share is None:
        return show(None)
    return _plus_minus(f"{share['share']:.1%}", f"{100 * share['standard_error']:.1f}")


def _top1(precision: dict[str, Any] | None) -> str:
    if precision is None:
        return show(None)
    return _plus_minus(f"{precision['top1']:.1%}", f"{100 * precision['standard_errors'][0]:.1f}")


def attribute_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of the attribute table: the attribute, the method that measured it, and the accuracy of each source."""
    measured = metrics.get("attributes", {})
    sources = [name for name in SOURCES if name in measured]
    methods = {"classifier": "classifier", "measured_colors": "pixels"}
    return [
        [name.replace("_", " "), title, *(_accuracy(measured[source].get(method, {}).get(name)) for source in sources)]
        for method, title in methods.items()
        for name in measured.get("generated", {}).get(method, {})
    ]


class FeatureTable(NamedTuple):
    """Metrics on the features of one extractor."""

    extractor: str
    """Its name."""
    images: int
    """Images of each side of the distances."""
    rows: list[list[str]]
    """For each metric its title, and its value for generated and for real images."""


def feature_tables(metrics: dict[str, Any]) -> list[FeatureTable]:
    """A table for each extractor."""
    return [
        FeatureTable(each["extractor"], each["features"]["generated"]["distance_images"], feature_rows(each))
        for each in [metrics, *metrics.get("further_extractors", [])]
        if "features" in each
    ]


def feature_rows(metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of the table of metrics on extractor features, for generated and for real images."""
    measured = metrics.get("features", {})
    return [
        [title, *(_with_error(measured[source], name) for source in ("generated", "real") if source in measured)]
        for name, title in FEATURE_METRICS.items()
        if name in measured.get("generated", {})
    ]


def _with_error(values: dict[str, float], name: str) -> str:
    value, error = values.get(name), values.get(FEATURE_ERRORS.get(name, ""))
    if value is None or error is None:
        return show(value, digits=3)
    if not (math.isfinite(error) and error > 0):
        return _plus_minus(show(value, digits=3), show(error, digits=2))
    # Two digits of the error, and as many decimals of the value.
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return _plus_minus(f"{value:,.{decimals}f}", f"{error:,.{decimals}f}")


def _accuracy(accuracy: dict[str, float] | None) -> str:
    if accuracy is None:
        return show(None)
    return _plus_minus(f"{accuracy['share']:.1%}", f"{100 * accuracy['standard_error']:.1f}")


def _plus_minus(value: str, error: str) -> str:
    # The no-break space keeps the sign with the error in narrow columns.
    return f"{value} ±\N{NO-BREAK SPACE}{error}"


def phase_rows(recipe: Recipe, metrics: dict[str, Any]) -> list[list[str]]:
    """Rows of the phase table: name, title, steps, seconds, images per second, share of time waiting for data."""
    seconds, speed = metrics.get("seconds", {}), metrics.get("images_per_second", {})
    waited = metrics.get("waited_for_data", {})
    return [
        [
            name,
            PHASE_TITLES.get(name, ""),
            show(getattr(getattr(recipe, name, None), "steps", None)),
            f"{seconds[name]:,.1f}" if name in seconds else show(None),
            f"{speed[name]:,.1f}" if name in speed else show(None),
            f"{waited[name]:.1%}" if name in waited else show(None),
        ]
        for name in {**seconds, **speed}
    ]


def flatten(fields: dict[str, Any], without: Sequence[str] = (), prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested fields into dotted names with their values as text."""
    rows: list[tuple[str, str]] = []
    for name, value in fields.items():
        if name in without:
            continue
        rows += flatten(value, prefix=f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, show(value))]
    return rows


def title_of(name: str) -> str:
    """Turn the dotted name of a metric into words, such as "parameters.generator" into "Parameters: generator"."""
    words = name.replace("_", " ").replace(".", ": ")
    return words[:1].upper() + words[1:]


def show(value: Any, digits: int = 4) -> str:
    """Format a value for the report, with a number of significant digits."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(each, digits) for each in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
