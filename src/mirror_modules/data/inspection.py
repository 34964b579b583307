"""What a data set on disk holds: counts, sizes, words, classes, and what of it is damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

from mirror_modules._checks import check_positive
from mirror_modules.data.damage import DamagedSample, ErrorReport, Skipped
from mirror_modules.data.files import CaptionedFiles
from mirror_modules.data.sample import CaptionedImage
from mirror_modules.stem.vocabulary import split_words

LISTED = 20


class Spread(NamedTuple):
    """Where some numbers lie."""

    smallest: float
    middle: float
    largest: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread | None:
        """Their least, median and greatest; None if there is no number."""
        listed = list(numbers)
        return cls(min(listed), median(listed), max(listed)) if listed else None

    def __str__(self) -> str:
        return " / ".join(f"{number:g}" for number in self)


class SplitFacts(NamedTuple):
    """What one split holds."""

    images: int
    """Those that can be read, as everything below."""
    captions_each: Spread | None
    captions: int
    shorter_side: Spread | None
    """Of the images as they are stored, in pixels."""
    longer_side: Spread | None
    caption_words: Spread | None
    long_captions: int
    """Captions of more than `max_words` words."""
    classes: frozenset[int]
    words: Counter[str]
    """How often each word occurs."""
    damaged: tuple[Skipped, ...]
    pictures: tuple[CaptionedImage, ...]
    """Some samples, spread over all."""


def inspect_split(
    dataset: CaptionedFiles, *, max_words: int = 18, pictures: int = 8, progress: Callable[[], object] = lambda: None
) -> SplitFacts:
    """Read every image of a split that was opened with `on_error="list"`.

    Args:
        dataset: The split.
        max_words: Captions of more words are counted as long.
        pictures: Samples to keep.
        progress: Called after each sample.

    Returns:
        What it holds.

    Raises:
        ValueError: A number is below 1.
    """
    check_positive("inspect_split", max_words=max_words, pictures=pictures)
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
            # The first one at or after each of the evenly spaced places.
            if len(kept) < pictures and i >= len(kept) * len(dataset) // pictures:
                kept.append(sample)
        progress()
    lengths, words = [], Counter[str]()
    for entry in entries:
        for caption in entry.captions:
            found = split_words(caption)
            lengths.append(len(found))
            words.update(found)
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
        pictures=tuple(kept),
    )


def describe_splits(training: SplitFacts, validation: SplitFacts, *, max_words: int = 18, min_count: int = 1) -> str:
    """A table of both splits, the vocabulary of the training captions, and the damaged files by name.

    Args:
        training: Of the captions that the vocabulary is built from.
        validation: Of those that are read with it.
        max_words: As given to `inspect_split`.
        min_count: Occurrences that a word needs to enter the vocabulary.

    Returns:
        Several lines.

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
        ("captions of an image", lambda facts: facts.captions_each),
        ("words of a caption", lambda facts: facts.caption_words),
        (f"longer than {max_words} words", lambda facts: _share(facts.long_captions, facts.captions)),
        ("distinct words", lambda facts: f"{len(facts.words):,}"),
    ]
    lines = [f"{'':<22} {'training':>20} {'validation':>20}   (least / median / greatest)"]
    for name, value in rows:
        cells = (str(value(facts) if value(facts) is not None else "-") for facts in (training, validation))
        lines.append(f"{name:<22} " + " ".join(f"{cell:>20}" for cell in cells))
    known = {word for word, count in training.words.items() if count >= min_count}
    read = sum(count for word, count in validation.words.items() if word in known)
    lines += [
        f"vocabulary: {len(known):,} words of training captions, with min_count={min_count}; they are "
        f"{_share(read, sum(validation.words.values()))} of the words of validation captions, and "
        f"{_share(len(known & validation.words.keys()), len(validation.words))} of the distinct ones",
    ]
    # Where each image is its own class, numbers of classes say nothing.
    if len(training.classes) < training.images and len(validation.classes) < validation.images:
        lines.append(f"classes in both splits: {len(training.classes & validation.classes):,}")
    damaged = [*training.damaged, *validation.damaged]
    if damaged:
        lines.append(f"damaged: {len(damaged):,} of {training.images + validation.images + len(damaged):,}")
        lines += [f"  {file} {reason}" for file, reason in damaged[:LISTED]]
        lines += [f"  and {len(damaged) - LISTED:,} more"] * (len(damaged) > LISTED)
    return "\n".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
