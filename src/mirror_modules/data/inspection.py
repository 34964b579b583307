"""Statistics of a data set on disk: images, sizes, classes, captions, words, damaged and ignored files."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mirror_modules._checks import check_positive
from mirror_modules.data.readers.damage import DamagedSample, ErrorReport, Ignored, Skipped, printable
from mirror_modules.data.readers.files import SPLITS, CaptionedFiles
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.data.sources import open_captions, recognize
from mirror_modules.stem.vocabulary import split_words

MAX_LISTED = 20
RESOLUTION = 64  # default of the samples


class Spread(NamedTuple):
    """Minimum, median and maximum."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """The spread of `numbers`; None if there are none."""
        values = list(numbers)
        return cls(min(values), median(values), max(values)) if values else None

    def __str__(self) -> str:
        return " / ".join(f"{number:g}" for number in self)


class SplitFacts(NamedTuple):
    """Statistics of one split. All but `damaged` and `ignored` count intact samples only."""

    images: int
    captions_each: Spread | None
    """Captions per image."""
    captions: int
    shorter_side: Spread | None
    """Pixels of the images as stored."""
    longer_side: Spread | None
    caption_words: Spread | None
    """Words per caption."""
    long_captions: int
    """Captions with more than `max_words` words."""
    classes: frozenset[int]
    words: Counter[str]
    """Occurrences of each word."""
    damaged: tuple[Skipped, ...]
    ignored: tuple[Ignored, ...]
    """Files that belong to no sample, and intact images with damaged metadata."""
    samples: tuple[CaptionedImage, ...]
    """A few samples, evenly spaced."""


def inspect_split(
    dataset: CaptionedFiles, *, max_words: int = 18, samples: int = 8, progress: Callable[[], object] = lambda: None
) -> SplitFacts:
    """Read every image of a split and collect statistics.

    Args:
        dataset: The split, opened with `on_error="list"`.
        max_words: Captions with more words count as long.
        samples: Number of samples to keep.
        progress: Called after each sample.

    Returns:
        The statistics.

    Raises:
        ValueError: A number is below 1.
    """
    check_positive("inspect_split", max_words=max_words, samples=samples)
    damaged = ErrorReport("list")
    damaged.skipped += dataset.report.skipped
    entries, sizes = [], []
    kept: list[CaptionedImage] = []
    for i, entry in enumerate(dataset.entries):
        try:
            sample = dataset[i]
            sizes.append(dataset.stored_size(i))
            entries.append(entry)
        except DamagedSample as error:
            damaged.add("inspect_split", *error.skipped)
        else:
            # The first intact sample at or after each evenly spaced index.
            if len(kept) < samples and i >= len(kept) * len(dataset) // samples:
                kept.append(sample)
        progress()
    lengths, words = [], Counter[str]()
    for entry in entries:
        for caption in entry.captions:
            caption_words = split_words(caption)
            lengths.append(len(caption_words))
            words.update(caption_words)
    return SplitFacts(
        images=len(entries),
        captions_each=Spread.of(len(entry.captions) for entry in entries),
        captions=len(lengths),
        shorter_side=Spread.of(min(size) for size in sizes),
        longer_side=Spread.of(max(size) for size in sizes),
        caption_words=Spread.of(lengths),
        long_captions=sum(length > max_words for length in lengths),
        classes=frozenset(entry.class_id for entry in entries),
        words=words,
        damaged=tuple(damaged.skipped),
        ignored=tuple(dataset.report.ignored),
        samples=tuple(kept),
    )


def describe_splits(training: SplitFacts, validation: SplitFacts, *, max_words: int = 18, min_count: int = 1) -> str:
    """Format a table of both splits, the coverage of the training vocabulary, and lists of damaged and ignored files.

    Args:
        training: Statistics of the training split, whose captions make up the vocabulary.
        validation: Statistics of the validation split, whose words are looked up in that vocabulary.
        max_words: As passed to `inspect_split`.
        min_count: Minimum number of occurrences of a word in the vocabulary.

    Returns:
        Several lines of text.

    Raises:
        ValueError: A number is below 1.
    """
    check_positive("describe_splits", max_words=max_words, min_count=min_count)
    rows: list[tuple[str, Callable[[SplitFacts], object]]] = [
        ("images", lambda facts: f"{facts.images:,}"),
        ("damaged", lambda facts: f"{len(facts.damaged):,}"),
        ("shorter side, pixels", lambda facts: facts.shorter_side),
        ("longer side, pixels", lambda facts: facts.longer_side),
        ("classes", lambda facts: f"{len(facts.classes):,}"),
        ("captions", lambda facts: f"{facts.captions:,}"),
        ("captions per image", lambda facts: facts.captions_each),
        ("words per caption", lambda facts: facts.caption_words),
        (f"longer than {max_words} words", lambda facts: _share(facts.long_captions, facts.captions)),
        ("distinct words", lambda facts: f"{len(facts.words):,}"),
    ]
    lines = [f"{'':<22} {'training':>20} {'validation':>20}   (minimum / median / maximum)"]
    for name, value in rows:
        cells = (str(value(facts) if value(facts) is not None else "-") for facts in (training, validation))
        lines.append(f"{name:<22} " + " ".join(f"{cell:>20}" for cell in cells))
    known = {word for word, count in training.words.items() if count >= min_count}
    covered = sum(count for word, count in validation.words.items() if word in known)
    lines += [
        f"vocabulary: {len(known):,} words from the training captions, with min_count={min_count}; it covers "
        f"{_share(covered, sum(validation.words.values()))} of the words of the validation captions, and "
        f"{_share(len(known & validation.words.keys()), len(validation.words))} of the distinct words",
    ]
    # Meaningless if each image is its own class.
    if len(training.classes) < training.images and len(validation.classes) < validation.images:
        lines.append(f"classes in both splits: {len(training.classes & validation.classes):,}")
    damaged = [*training.damaged, *validation.damaged]
    if damaged:
        lines.append(f"damaged: {len(damaged):,} of {training.images + validation.images + len(damaged):,}")
        lines += _listing(damaged)
    ignored = [*training.ignored, *validation.ignored]
    if ignored:
        lines.append(f"ignored, without loss of an image: {len(ignored):,}")
        lines += _listing(ignored)
    return "\n".join(lines)


def _listing(entries: Sequence[Skipped] | Sequence[Ignored]) -> list[str]:
    """The first files, one a line, and the number of further ones."""
    lines = [f"  {file} {reason}" for file, reason in entries[:MAX_LISTED]]
    return lines + [f"  and {len(entries) - MAX_LISTED:,} more"] * (len(entries) > MAX_LISTED)


class Inspection(NamedTuple):
    """The result of `inspect_folder`."""

    text: str
    """Several lines: the format, the statistics, the damaged and the ignored files, and the command that trains."""
    samples: tuple[CaptionedImage, ...]
    """A few samples of both splits, all of one size; empty if no image can be read."""


def inspect_folder(
    path: str | Path,
    *,
    source: str = "auto",
    resolution: int | None = None,
    max_words: int = 18,
    min_count: int = 1,
) -> Inspection:
    """Read every file of a data set and report statistics and damaged files.

    Args:
        path: Folder of the data set.
        source: Its format, as for `open_captions`.
        resolution: Height and width of the samples; None takes 64, or less if the folder was prepared at less.
        max_words: Captions with more words count as long.
        min_count: Minimum number of occurrences of a word in the vocabulary.

    Returns:
        The statistics as text, and a few samples.

    Raises:
        FileNotFoundError: The folder, or a part of its layout, is missing.
        ValueError: The folder has no known format, a list in it is damaged, or a number is below 1.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from mirror_modules.data.inspection import inspect_folder
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 30), "red").save(root / "red.png")
        >>> _ = (root / "red.txt").write_text("a red sheet of paper")
        >>> text, samples = inspect_folder(root)
        >>> len(samples), samples[0].image.shape
        (1, (64, 64, 3))
    """
    from tqdm import tqdm

    sizes = {} if resolution is None else {"resolution": resolution}
    check_positive("inspect_folder", **sizes, max_words=max_words, min_count=min_count)
    name = recognize(path) if source == "auto" else source
    if resolution is None:
        resolution = RESOLUTION
        if name == "prepared":
            resolution = min(resolution, *open_captions(path, SPLITS[0], 1, name).stored_size(0))
    facts = []
    for split in SPLITS:
        dataset = open_captions(path, split, resolution, name, on_error="list")
        with tqdm(total=len(dataset), desc=f"{split} images", unit=" images", dynamic_ncols=True, disable=None) as bar:
            facts.append(inspect_split(dataset, max_words=max_words, progress=bar.update))
    text = f"{printable(path)} is read as {name!r}\n"
    text += describe_splits(*facts, max_words=max_words, min_count=min_count)
    if all(each.images for each in facts):
        named = "" if source == "auto" else f" --data.source {source}"
        text += f"\ntrain with: mirror-modules train photos-64 --data {shlex.quote(printable(path))}{named}"
    return Inspection(text, tuple(sample for each in facts for sample in each.samples))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
