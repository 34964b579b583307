"""Damaged samples: raise at the first one, or skip, count and list them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mirror_modules._checks import check_choice

ON_ERROR = ("stop", "skip", "list")
# A larger share of damaged samples is no accident: something is wrong with the data set as a whole.
MAX_DAMAGED_SHARE = 0.05
MAX_EXCERPT = 200


class Skipped(NamedTuple):
    """A skipped sample."""

    file: str
    """The file at fault, with the line or entry in it if known."""
    reason: str
    """What is wrong with it: the predicate of a sentence whose subject is the file."""


class Ignored(NamedTuple):
    """A file, or damage to one, that costs no sample."""

    file: str
    reason: str
    """Why the file, or a part of it, is ignored: the predicate of a sentence whose subject is the file."""


class DamagedSample(ValueError):
    """Raised for one sample that cannot be read; others may be intact.

    Args:
        owner: The class or function that raises the error.
        file: The file at fault.
        reason: What is wrong with it: the predicate of a sentence whose subject is the file.

    Examples:
        >>> from mirror_modules.data import DamagedSample
        >>> error = DamagedSample("CaptionFolder", "red.png", "is empty")
        >>> str(error)
        'CaptionFolder: red.png is empty.'
        >>> error.skipped
        Skipped(file='red.png', reason='is empty')
    """

    def __init__(self, owner: str, file: str | Path, reason: str) -> None:
        super().__init__(owner, printable(file), printable(reason))

    @property
    def skipped(self) -> Skipped:
        """File and reason, as `ErrorReport` lists them."""
        return Skipped(*self.args[1:])

    def __str__(self) -> str:
        owner, file, reason = self.args
        return f"{owner}: {file} {reason}."


class ErrorReport:
    """The skipped samples of a data set, both those found on opening it and those found while reading it.

    Args:
        on_error: "stop" raises at the first damaged sample; "skip" skips damaged samples up to 5 % of the data set;
            "list" skips any number of them.

    Raises:
        ValueError: `on_error` is none of these.

    Examples:
        >>> from mirror_modules.data import ErrorReport
        >>> report = ErrorReport("list")
        >>> report.add("CaptionFolder", "red.png", "is empty")
        >>> report.add("CaptionFolder", "blue.png", "is not an image")
        >>> report.listing()
        'red.png is empty; blue.png is not an image'
    """

    skipped: list[Skipped]
    """The samples skipped so far."""
    ignored: list[Ignored]
    """Files that belong to no sample, such as a README.txt, and damaged metadata of samples that were read."""
    share_at_opening: float
    """Share of the samples skipped on opening the data set, before any image was read."""

    def __init__(self, on_error: str = "stop") -> None:
        check_choice("ErrorReport", "on_error", on_error, ON_ERROR)
        self.on_error = on_error
        self.skipped = []
        self.ignored = []
        self._ignored: set[Ignored] = set()
        self.share_at_opening = 0.0

    def add(self, owner: str, file: str | Path, reason: str, *, missing: bool = False) -> None:
        """Record a skipped sample, or raise its error.

        Args:
            owner: The class or function that skips it.
            file: The file at fault.
            reason: What is wrong with it: the predicate of a sentence whose subject is the file.
            missing: Whether a file is missing, which decides the type of the error.

        Raises:
            ValueError: With `on_error="stop"`; a FileNotFoundError if a file is `missing`.
        """
        if self.on_error == "stop":
            kind = FileNotFoundError if missing else ValueError
            raise kind(printable(f"{owner}: {file} {reason}; fix it, or skip it with on_error='skip'."))
        self.skipped.append(Skipped(printable(file), printable(reason)))

    def ignore(self, file: str | Path, reason: str) -> None:
        """Record a file that costs no sample, once for each reason."""
        ignored = Ignored(printable(file), printable(reason))
        if ignored not in self._ignored:
            self._ignored.add(ignored)
            self.ignored.append(ignored)

    def check(self, owner: str, count: int, total: int) -> None:
        """Raise if too many samples are damaged: `count` of `total`, in addition to those skipped on opening.

        Raises:
            ValueError: With `on_error="skip"`, more than 5 % are.
        """
        share = self.share_at_opening + (1 - self.share_at_opening) * count / max(total, 1)
        # The margin keeps rounding from refusing 3 of 60.
        if self.on_error == "skip" and share > MAX_DAMAGED_SHARE + 1e-9:
            raise ValueError(
                f"{owner}: {len(self.skipped)} samples cannot be read, more than {MAX_DAMAGED_SHARE:.0%} of them: "
                f"{self.listing()}. Fix or remove these files; `mirror-modules data inspect` lists them all."
            )

    def listing(self, limit: int = 5) -> str:
        """The first `limit` skipped files and reasons, in one line."""
        return one_line(self.skipped, limit)


def one_line(entries: Sequence[Skipped] | Sequence[Ignored], limit: int = 5) -> str:
    """The first `limit` files and reasons, in one line."""
    lines = [f"{file} {reason}" for file, reason in entries[:limit]]
    more = len(entries) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def printable(text: str | Path) -> str:
    """Text that UTF-8 can encode: file names on disk need not be Unicode, so surrogates are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def excerpt(text: str) -> str:
    """The first `MAX_EXCERPT` characters of a text of any length, printable and on one line, for a message."""
    line = " ".join(printable(text[: MAX_EXCERPT + 1]).split())
    return line if len(text) <= MAX_EXCERPT else f"{line[:MAX_EXCERPT]}..."
