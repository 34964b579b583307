"""The command `study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mirror_modules.cli.parsing import Device, device_of, parse, read_captions

if TYPE_CHECKING:
    from mirror_modules.evaluation import Study


@dataclass(frozen=True)
class StudyOptions:
    """Write a page on which people compare images of runs without knowing the runs, or summarize their answers.

    The page is a single file that works without a network. It saves each rater's answers to a file; --results
    summarizes these files.
    """

    runs: tuple[Path, ...]
    """Two or more folders of trained runs, of models, or of images with captions.txt, one caption per line."""
    out: Path = Path("study")
    """Folder of the study: for the page and its key, and for the results."""
    results: tuple[Path, ...] = ()
    """Files of answers, to summarize in results.md and results.json in the folder of the study, in place of runs."""
    captions: Path | None = None
    """Text file with captions, one per line; by default, validation captions that are in no run's training data, or
    those of the folders of images."""
    max_captions: int = 50
    """Captions at most; if there are more, they are drawn at random."""
    pairs: int = 100
    """Different pairs of images that each rater sees at most."""
    repeats: int = 10
    """Pairs that each rater sees a second time with the sides exchanged; at most a third of the others."""
    raters: int = 20
    """Number of raters; each chooses a number on the page, and has an order of the pairs of their own."""
    seed: int = 0
    """Seed of the choice of captions, of the images, and of the order of the pairs."""
    resolution: int | None = None
    """Reduce larger images to this height and width, so that their size does not give their run away."""
    device: Device = "auto"
    """Device; auto uses a GPU if there is one."""


def study(arguments: list[str]) -> None:
    """Run `mirror-modules study`."""
    options: StudyOptions = parse(StudyOptions, arguments, "study", positional=("runs",))
    if options.results:
        _summarize(options)
        return
    if "--results" in arguments:
        raise ValueError("--results needs one or more files of answers, which raters saved from the page.")
    from mirror_modules.evaluation import make_study

    made = make_study(
        options.runs,
        options.out,
        captions=None if options.captions is None else read_captions(options.captions),
        max_captions=options.max_captions,
        pairs=options.pairs,
        repeats=options.repeats,
        raters=options.raters,
        seed=options.seed,
        resolution=options.resolution,
        device=device_of(options.device),
    )
    _print_size(made)
    size = f"{made.page.stat().st_size / 1e6:.1f} MB"
    print(f"Send {made.page} ({size}) to the raters; keep {made.key}, which names the run of each image.")
    print(f"Open {made.page}")


def _summarize(options: StudyOptions) -> None:
    from mirror_modules.evaluation import study_results

    if options.runs:
        raise ValueError(
            f"--results summarizes answers to a study that exists, without runs, but {options.runs[0]} was given; give "
            "the folder of the study with --out."
        )
    study_results(options.out, options.results)
    print((options.out / "results.md").read_text(encoding="utf-8"), end="")


def _print_size(made: Study) -> None:
    repeated = f", and {made.repeats} of them a second time" if made.repeats else ""
    print(f"{len(made.captions)} captions; each rater sees {made.pairs} pairs{repeated}.")
    print("Expected 95 % interval of a win rate near 50 %, by the number of raters who answer everything:")
    for raters, (narrow, wide) in made.half_widths.items():
        widths = [f"±{100 * width:.1f}" for width in (narrow, wide)]
        print(f"  {raters:>3}  {' to '.join(dict.fromkeys(widths))} percentage points")
    print("The wider one holds if raters always agree: then only more captions help.")
