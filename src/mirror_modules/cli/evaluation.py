"""The command `evaluate`, and the table of metrics that `train` prints too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror_modules.cli.parsing import Device, device_of, parse


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a trained run again; writes evaluation.json, pictures and report.html."""

    run_dir: Path
    """Folder of the run, such as runs/demo."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""
    threads: int | None = None
    """Threads on a CPU; torch's default is the number of cores."""
    fit_classifier: bool = False
    """Train the classifier for FID, KID, Inception Score, diversity and attribute accuracy, once per run; on drawn
    flowers this is the default, and the classifier is kept for other runs. On photographs, the pretrained
    backbones of the run's evaluators are the default, if it has any."""
    no_fit_classifier: bool = False
    """Do without these metrics."""
    inception: bool = False
    """Use torchvision's Inception v3 for FID, KID, Inception Score and diversity; its weights are downloaded."""
    clip: str | None = None
    """Also rank the captions with CLIP or SigLIP: a folder with the model, its tokenizer and its image processor, or a
    name on the Hugging Face Hub, from which it is downloaded."""

    def fits_classifier(self) -> bool | None:
        """The value of --fit-classifier or --no-fit-classifier; None without either."""
        if self.fit_classifier and self.no_fit_classifier:
            raise ValueError("--fit-classifier and --no-fit-classifier exclude each other; give one of them.")
        return self.fit_classifier or (False if self.no_fit_classifier else None)


def evaluate(arguments: list[str]) -> None:
    """Run `mirror-modules evaluate`."""
    options: EvaluateOptions = parse(EvaluateOptions, arguments, "evaluate", positional=("run_dir",))
    # Imported here because it imports torch, which takes a second.
    from mirror_modules.evaluation.evaluation import evaluate

    metrics = evaluate(
        options.run_dir,
        device=device_of(options.device),
        threads=options.threads,
        fit_classifier=options.fits_classifier(),
        inception=options.inception,
        clip=options.clip,
    )
    print_metrics(metrics)
    print(f"Open {options.run_dir / 'report.html'}")


def print_metrics(metrics: Mapping[str, Any]) -> None:
    """Print the content of evaluation.json as tables."""
    print(f"R-precision among {metrics['candidates']} captions (chance {metrics['chance']:.1%}), top 1 / 2 / 3:")
    for name, value in metrics["r_precision"].items():
        print(f"  {name:<10} {value['top1']:6.1%} {value['top2']:6.1%} {value['top3']:6.1%}")
    if metrics["cannot_rank"]:
        print(f"R-precision cannot rank these images: {'; '.join(metrics['reasons'])}.")
    _print_evaluators(metrics["evaluators"])
    if "clip" in metrics["evaluators"]:
        _print_clip_scores(metrics["evaluators"]["clip"])
    print("Word accuracy of the captioner:")
    for name, value in metrics["word_accuracy"].items():
        print(f"  {name:<10} {value:6.1%}")
    print("Pointwise mutual information of image and caption under the captioner, nats per token:")
    for name, value in metrics["image_information"].items():
        # Adding 0.0 turns -0.0 into 0.0.
        print(f"  {name:<10} {round(value, 2) + 0.0:6.2f}")
    for method, title in (
        ("classifier", "by the attribute classifier"),
        ("measured_colors", "colors measured in pixels"),
    ):
        _print_attributes(
            {name: each[method] for name, each in metrics.get("attributes", {}).items() if method in each}, title
        )
    for each in [metrics, *metrics.get("further_extractors", [])]:
        if "features" in each:
            print(f"Features of the extractor: {each['extractor']}")
            for name, figures in each["features"].items():
                print(f"  {name:<10} {_feature_figures(figures)}")
    if "not_measured" in metrics:
        print(f"Without the metrics of --fit-classifier: {metrics['not_measured']}")
    if any(metrics["skipped"].values()):
        counts = ", ".join(f"{count:,} of the {split} split" for split, count in metrics["skipped"].items())
        print(f"Damaged samples skipped: {counts}")


def _print_evaluators(evaluators: Mapping[str, Any]) -> None:
    """A row for each evaluator, split and set of candidates; none for a single one, which is printed already."""
    rows = [
        (f"{phase}, {split}, {candidates}".replace("_", " "), result[split][candidates])
        for phase, result in evaluators.items()
        for split in ("validation", "held_out")
        for candidates in ("all_captions", "other_classes")
        if candidates in result.get(split, {})
    ]
    if len(rows) < 2:
        return
    print("R-precision, top 1: generated / real / other captions of the same image / class alone / chance:")
    for title, figures in rows:
        values = [figures[name]["top1"] if name in figures else None for name in ("generated", "real", "text_ceiling")]
        values += [figures.get("class_oracle"), figures["chance"]]
        shown = "".join(f" {'-' if value is None else f'{value:.1%}':>6}" for value in values)
        print(f"  {title:<43}{shown}{'  cannot rank' if figures['cannot_rank'] else ''}")


def _print_clip_scores(evaluator: Mapping[str, Any]) -> None:
    """A row for each split."""
    print("CLIPScore, 100 times the cosine of an image and its caption: generated / real / shuffled:")
    for split in (each for each in ("validation", "held_out") if each in evaluator):
        scores = evaluator[split]["clip_score"].values()
        shown = "".join(f" {each['mean']:6.2f} ± {each['standard_error']:.2f}" for each in scores)
        print(f"  {split.replace('_', ' '):<10}{shown}")


def _print_attributes(accuracy: Mapping[str, Any], title: str) -> None:
    """A row for each attribute, a column for each kind of image."""
    if not accuracy:
        return
    print(f"Attribute accuracy, {title}:")
    print(f"  {'':<16}" + "".join(f" {name:>10}" for name in accuracy))
    for attribute in next(iter(accuracy.values())):
        shares = "".join(f" {each[attribute]['share']:>10.1%}" for each in accuracy.values())
        print(f"  {attribute.replace('_', ' '):<16}{shares}")


def _feature_figures(figures: Mapping[str, float]) -> str:
    kernel_error = figures.get("kernel_distance_standard_error")
    parts = [
        f"FID {figures['frechet_distance']:.3g}",
        f"KID {figures['kernel_distance']:.3g}" + ("" if kernel_error is None else f" ± {kernel_error:.1g}"),
    ]
    if "inception_score" in figures:
        score, deviation = figures["inception_score"], figures["inception_score_deviation"]
        parts.append(f"Inception Score {score:.3g} ± {deviation:.1g}")
    if "diversity" in figures:
        parts.append(f"diversity {figures['diversity']:.3g} ± {figures['diversity_standard_error']:.1g}")
    return ", ".join(parts) + f" ({figures['distance_images']:,} images)"
