"""Results of several runs: mean and deviation over seeds, paired differences with bootstrap intervals, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirror_modules._files import write_whole
from mirror_modules.evaluation.retrieval import OwnClass, cannot_rank

RESAMPLES = 10_000
INTERVAL = 0.95
# The row of the baseline in the tables.
REAL = "real images"


def r_precision_name(phase: str, split: str, candidates: str) -> str:
    """The name of a metric: who ranks which images among which candidates."""
    parts = [
        "second" if phase == "second_evaluator" else "",
        "held_out" if split == "held_out" else "",
        "r_precision",
        "other_classes" if candidates == "other_classes" else "",
    ]
    return "_".join(filter(None, parts))


_SPLITS = {"validation": "", "held_out": ", training classes"}
_EVALUATORS = {"evaluator": "", "second_evaluator": ", second evaluator"}
_CANDIDATES = {"all_captions": "", "other_classes": ", among other classes"}
TITLES = {
    **{
        r_precision_name(phase, split, candidates): "R-precision, top 1" + by + of + among
        for phase, by in _EVALUATORS.items()
        for split, of in _SPLITS.items()
        for candidates, among in _CANDIDATES.items()
    },
    "attributes": "attribute accuracy",
    "colors": "color accuracy",
    "box_overlap": "overlap with the box",
    "words": "word accuracy",
}

# Rows below the cells: what R-precision is without seeing the image.
BOUNDS = {
    "text_ceiling": "other captions of the same image",
    "class_oracle": "class alone",
    "chance": "chance",
}


def summarize(
    results: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    seeds: Sequence[int],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and paired differences between cells with bootstrap intervals.

    Args:
        results: For each cell, the metrics of each seed as `measure` returns them.
        seeds: The seeds, in the order of the results.
        pairs: Pairs of a cell and its baseline; those with a cell that has no results are left out.

    Returns:
        "figures": for each cell and metric, its mean, its standard deviation over the seeds, and its value per seed.
        "differences": for each pair of cells and each metric, the mean difference and the bounds of its interval.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        figures[name] = {}
        for metric in runs[0]:
            values = [float(np.mean(run[metric])) for run in runs]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            figures[name][metric] = {"mean": float(np.mean(values)), "deviation": deviation, "seeds": values}
    compared = []
    for name, baseline in pairs:
        if name not in results or baseline not in results:
            continue
        for metric in results[name][0]:
            paired = [
                np.asarray(run[metric]) - np.asarray(baseline_run[metric])
                for run, baseline_run in zip(results[name], results[baseline])
            ]
            low, high = bootstrap_interval(paired)
            mean = float(np.mean([difference.mean() for difference in paired]))
            compared.append(
                {"cell": name, "against": baseline, "figure": metric, "mean": mean, "low": low, "high": high}
            )
    return {"seeds": list(seeds), "figures": figures, "differences": compared}


def unrankable(
    results: Mapping[str, Sequence[Mapping[str, Sequence[float]]]], bounds: Mapping[str, Mapping[str, float]]
) -> dict[str, list[str]]:
    """For each R-precision that cannot rank images the reasons; see `retrieval.cannot_rank`.

    Args:
        results: As in `summarize`, with the row `REAL`.
        bounds: Of each R-precision "chance", as a mean over the seeds; with classes also "class_oracle", and the fields
            of `OwnClass` for the real images, "own_class" and "own_class_error".
    """
    found = {}
    for metric, each in bounds.items():
        means = {name: float(np.mean([np.mean(run[metric]) for run in runs])) for name, runs in results.items()}
        squares = [np.var(run[metric], ddof=1) / len(run[metric]) for run in results[REAL]]
        reasons = cannot_rank(
            means.pop(REAL),
            float(np.sum(squares) ** 0.5 / len(squares)),
            chance=each["chance"],
            class_oracle=each.get("class_oracle"),
            own_class=OwnClass(each["own_class"], each["own_class_error"]) if "own_class" in each else None,
            generated=max(means.values(), default=None),
        )
        if reasons:
            found[metric] = reasons
    return found


def bootstrap_interval(differences: Sequence[np.ndarray[Any, Any]], *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean paired difference, over both seeds and captions.

    Each resample draws seeds with replacement, and for each of them captions with replacement. The interval covers the
    middle 95 % of the resampled means. With few seeds it tends to be too narrow.

    Args:
        differences: For each seed, the difference at each caption.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper bound.
    """
    rng = np.random.default_rng(seed)
    seeds = rng.integers(len(differences), size=(RESAMPLES, len(differences)))
    # A seed that is drawn twice gets an independent resample of captions each time.
    means = [np.mean([rng.choice(differences[i], len(differences[i])).mean() for i in drawn]) for drawn in seeds]
    low, high = np.quantile(means, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(low), float(high)


def as_markdown(content: Mapping[str, Any]) -> str:
    """Format two Markdown tables: the metrics of each cell, and the paired differences with their intervals."""
    figures = content["figures"]
    columns = [name for name in TITLES if name in next(iter(figures.values()))]
    notes = {name: i for i, name in enumerate(content.get("cannot_rank", {}), start=1)}
    titles = {name: TITLES[name] + (f" [{notes[name]}]" if name in notes else "") for name in columns}
    seeds = ", ".join(map(str, content["seeds"]))
    lines = [
        f"Mean and standard deviation over seeds {seeds}, in %.",
        "",
        "| | " + " | ".join(titles.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in figures.items():
        cells = [mean_and_deviation(row[each]["mean"], row[each]["deviation"]) for each in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for bound, title in BOUNDS.items():
        values = [content.get("bounds", {}).get(each, {}).get(bound) for each in columns]
        if any(value is not None for value in values):
            texts = ("–" if value is None else f"{100 * value:.1f}" for value in values)
            lines.append(f"| {title} | " + " | ".join(texts) + " |")
    for name, number in notes.items():
        reasons = "; ".join(content["cannot_rank"][name])
        lines += ["", f"[{number}] Cannot rank these images: {reasons}. Differences in this column have no meaning."]
    lines += [
        "",
        f"Paired differences in percentage points, with {INTERVAL:.0%} bootstrap intervals over seeds and captions.",
        "",
        "| | against | " + " | ".join(titles.values()) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    by_pair: dict[tuple[str, str], dict[str, str]] = {}
    for each in content["differences"]:
        text = f"{100 * each['mean']:+.1f}"
        # A single value of a single seed has no interval.
        if each["low"] < each["high"]:
            text += f" ({100 * each['low']:+.1f} to {100 * each['high']:+.1f})"
        by_pair.setdefault((each["cell"], each["against"]), {})[each["figure"]] = text
    for (name, baseline), row in by_pair.items():
        lines.append(f"| {name} | {baseline} | " + " | ".join(row[each] for each in columns) + " |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(mean: float, deviation: float | None, unit: float = 100, digits: int = 1) -> str:
    """Both times `unit`, rounded to `digits`; the mean alone if there is no deviation."""
    numbers = [mean] if deviation is None else [mean, deviation]
    return " ± ".join(f"{unit * number:,.{digits}f}" for number in numbers)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Plot each metric of each cell: a dot per seed, a bar for the mean."""
    from matplotlib.figure import Figure

    figures = content["figures"]
    names = list(figures)[::-1]
    columns = [name for name in TITLES if name in figures[names[0]]]
    picture = Figure(figsize=(4.2 * len(columns), 0.36 * len(names) + 1.2), layout="constrained")
    panels = picture.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns):
        for y, name in enumerate(names):
            result = figures[name][column]
            axes.barh(y, 100 * result["mean"], color="#d9cce0", height=0.7)
            axes.plot(
                [100 * value for value in result["seeds"]], [y] * len(result["seeds"]), "o", color="#7d4a92", ms=4
            )
        axes.set_xlabel(f"{TITLES[column]} (%)")
        axes.spines[["top", "right"]].set_visible(False)
    # Names may contain dollar signs.
    panels[0].set_yticks(range(len(names)), names, parse_math=False)
    write_whole(path, lambda temporary: picture.savefig(temporary, dpi=120, format="png"))
